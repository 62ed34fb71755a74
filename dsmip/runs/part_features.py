"""The features of one part of a run, split by split: read beside the shards, from the run's cache, or encoded."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch

from dsmip.config import ExperimentConfig
from dsmip.data.collate import Collator
from dsmip.data.manifest import KB
from dsmip.data.table import Table
from dsmip.encoders.base import FeatureEncoder
from dsmip.encoders.feature_cache import encode_rows, load_features
from dsmip.encoders.shared_tables.tables import Say
from dsmip.messages import on_stderr
from dsmip.progress import Progress, counting, no_progress
from dsmip.runs.run import Run


class PartFeatures:
    """The features of a finished part, or of a gate's inputs.

    Raises:
        UserError: Stored features are damaged.
    """

    def __init__(self, home: Run, part: str, config: ExperimentConfig) -> None:
        self.home, self.part, self._config = home, part, config
        self._stored = home.system.stored_features(part, config, home.dataset)

    @property
    def beside(self) -> Path | None:
        """The folder beside the shards that some columns are read from."""
        return self._stored.folder if self._stored else None

    @cached_property
    def encoder(self) -> FeatureEncoder:
        """Of what is not stored."""
        return self._stored.rest if self._stored else self.home.load_encoder(self.part, self._config)

    @cached_property
    def collator(self) -> Collator:
        """In the form that the encoder reads."""
        if self._stored:
            return self.home.collator_of(self._stored.rest_format)
        return self.home.collator(self.part)

    def name(self, split: str) -> str:
        """What stands in keys for what the encoder says of a split or the kb: the file of a run that keeps its own."""
        return self.home.cache.path(self.part, split, self.encoder, self.home.dataset, self.collator).name

    def cached(self, split: str) -> Path | None:
        """The cache file of what the encoder says of a split or the kb, if that is computed."""
        return self.home.cache.find(self.part, split, self.encoder, self.home.dataset, self.collator)

    def table(self, split: str, device: torch.device, progress: Progress = no_progress) -> Table:
        """The features of a split or the kb, memory-mapped; computed where they are missing."""
        return load_features(self.files(split, device, progress), self.home.dataset.kept.get(split))

    def files(
        self, split: str, device: torch.device, progress: Progress = no_progress, say: Say = on_stderr
    ) -> list[Path]:
        """The files of those features, whose columns belong side by side; made where they are missing.

        Of a view they may be those of the whole split (`load_features`).

        Args:
            say: Told of damaged ones.
        """
        data = self.home.dataset
        total = data.num_entities if split == KB else data.num_mentions(split)
        encoded = counting(progress, f"{split} encoded by {self.part}", total)
        encoder = self.encoder.to(device)
        ensured = self.home.cache.ensure(self.part, split, encoder, data, self.collator, device, encoded, say)
        return [ensured, *self.files_beside(split)]

    def kb_rows(self, device: torch.device) -> Callable[[range], Table]:
        """What gives the features of kb rows: the cache file, or the encoder without keeping them."""
        if (cached := self.cached(KB)) is not None:
            return rows_of(load_features([cached, *self.files_beside(KB)]))
        encoder, collator, data, dtype = (
            self.encoder.to(device),
            self.collator,
            self.home.dataset,
            self.home.cache.dtype,
        )
        beside = rows_of(load_features(self.files_beside(KB)))
        return lambda rows: encode_rows(rows, encoder, data, collator, device, dtype).merged(beside(rows))

    def files_beside(self, split: str) -> list[Path]:
        """Those of them that lie beside the shards."""
        return [self._stored.file_of(split)] if self._stored else []


def rows_of(table: Table) -> Callable[[range], Table]:
    """What gives some rows of a table, with nothing else."""
    if not table.columns:
        return lambda rows: table
    return lambda rows: table.take(slice(rows.start, rows.stop))
