"""The report of an inspection: counts of checks by split, lengths of texts, batches, and records that show faults."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_prep.inspection.batches import SameGold, same_gold_pairs
from data_prep.inspection.checks import NOBODY, Check, Count, Row
from data_prep.inspection.columns import Columns, Flags, Ints, read_columns
from data_prep.inspection.findings import Finding, findings_of
from data_prep.inspection.images import image_checks
from data_prep.inspection.meanings import OF_ENTITIES, OF_MENTIONS, Meaning
from data_prep.inspection.texts import entity_checks, mention_checks
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import SPLITS
from dsmip.data.records import Entity, Mention
from dsmip.progress import Progress, no_progress

_EXAMPLES_OF_A_CHECK = 3
_SAMPLES_OF_A_SPLIT = 3
# Whose example is shown, where there is a choice: the split that results are reported on first.
_SHOWN_FIRST = tuple(reversed(SPLITS))


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of texts before they are cut, start and end included."""

    texts: int
    mean: float
    median: int
    p95: int
    longest: int
    cut: int


@dataclass(frozen=True, slots=True)
class Example:
    """Records that show what a check found: a mention with its gold, or an entity, and the other record if any.

    Attributes:
        title: The check's label, or "sample".
        finding: The name of the finding that it shows; "" for a sample.
        split: Where they are from, a split or the kb.
        records: Roles and records, to be shown side by side.
    """

    title: str
    finding: str
    split: str
    records: tuple[tuple[str, Mention | Entity], ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that was found.

    Attributes:
        name: The dataset's name.
        licence: Its licence.
        manifest_sha256: Digest of its manifest.
        with_images: Whether images were compared.
        sizes: Mentions by split, and entities of the kb.
        unknown: Mentions by split that have no gold in the kb, where they were kept.
        context_length: Tokens at which a text is cut.
        golds: By split, distinct golds and how many of them are unseen in training.
        mentions: Counts of the checks over mentions.
        entities: Counts of the checks over entities.
        lengths: Lengths of texts, by split and of the kb.
        same_gold: Pairs with the same gold in training batches.
        findings: What was found, judged, the worst first.
        prepared: What preparation touched, by action and reason.
        samples: Some records of each split.
        examples: Some records that show what the checks found.
    """

    name: str
    licence: str
    manifest_sha256: str
    with_images: bool
    sizes: Mapping[str, int]
    unknown: Mapping[str, int]
    context_length: int
    golds: Mapping[str, Count]
    mentions: tuple[Row, ...]
    entities: tuple[Row, ...]
    lengths: Mapping[str, Lengths]
    same_gold: SameGold
    findings: tuple[Finding, ...]
    prepared: Mapping[str, Mapping[str, int]]
    samples: tuple[Example, ...]
    examples: tuple[Example, ...]

    def to_json(self) -> dict[str, Any]:
        """The figures, and the ids of the examples' records."""
        return {
            "dataset": {"name": self.name, "licence": self.licence, "manifest_sha256": self.manifest_sha256},
            "with_pictures": self.with_images,
            "sizes": dict(self.sizes),
            "unknown": dict(self.unknown),
            "mentions": {row.name: _json_counts(row) for row in self.mentions},
            "entities": {row.name: _json_counts(row)["kb"] for row in self.entities},
            "golds": {
                split: {"distinct": count.of, "unseen": count.count, "share": count.share}
                for split, count in self.golds.items()
            },
            "tokens": {"limit": self.context_length, **{split: asdict(each) for split, each in self.lengths.items()}},
            "same_gold_pairs": asdict(self.same_gold),
            "findings": [finding.to_json() for finding in self.findings],
            "prepared": {action: dict(reasons) for action, reasons in self.prepared.items()},
            "examples": [
                {
                    "check": example.title,
                    "split": example.split,
                    "records": [{"role": role, "id": _record_id(record)} for role, record in example.records],
                }
                for example in self.examples
            ],
        }


def inspect_dataset(
    dataset: Dataset, *, images: bool = True, workers: int = 1, progress: Progress = no_progress
) -> Inspection:
    """Reads and checks a whole dataset.

    Args:
        dataset: What to inspect.
        images: Whether to read and compare its images.
        workers: Number of processes.
        progress: Called while shards are read.

    Raises:
        UserError: A shard is missing or damaged.
    """
    columns = read_columns(dataset, images=images, workers=workers, progress=progress)
    of_mentions, of_entities = mention_checks(columns), entity_checks(columns)
    if images:
        found = image_checks(columns)
        of_mentions, of_entities = of_mentions + found[0], of_entities + found[1]
    manifest, mentions = dataset.manifest, columns.mentions
    in_split = {split: mentions.split == number for number, split in enumerate(SPLITS)}
    show = _Shower(dataset, columns)
    rows_M = tuple(_row(check, OF_MENTIONS, in_split) for check in of_mentions)
    rows_E = tuple(_row(check, OF_ENTITIES, {"kb": np.ones_like(check.of)}) for check in of_entities)
    same_gold = same_gold_pairs(
        mentions.gold[in_split["train"]], [len(samples) for _, samples in dataset.samples_of("train")]
    )
    return Inspection(
        name=manifest.name,
        licence=manifest.licence,
        manifest_sha256=dataset.manifest_hash,
        with_images=images,
        sizes={split: dataset.num_mentions(split) for split in SPLITS} | {"kb": dataset.num_entities},
        unknown={split: each.mentions for split, each in dataset.manifest.unknown.items()},
        context_length=columns.context_length,
        golds=_golds(columns, in_split),
        mentions=rows_M,
        entities=rows_E,
        lengths={split: _lengths(mentions.positions[inside], columns) for split, inside in in_split.items()}
        | {"kb": _lengths(columns.entities.positions, columns)},
        same_gold=same_gold,
        findings=findings_of(rows_M, rows_E, same_gold),
        prepared={"rejected": manifest.rejects, "repaired": manifest.repaired, "degraded": manifest.degraded},
        samples=tuple(show.samples(in_split)),
        examples=tuple(show.examples(of_mentions, of_entities, in_split)),
    )


def _row(check: Check, meanings: Mapping[str, Meaning], splits: Mapping[str, Flags]) -> Row:
    counts = {
        split: Count(int((check.hits & check.of & inside).sum()), int((check.of & inside).sum()))
        for split, inside in splits.items()
    }
    return Row(check.name, check.label, meanings[check.name], counts)


def _golds(columns: Columns, in_split: Mapping[str, Flags]) -> dict[str, Count]:
    golds = {split: np.unique(columns.mentions.gold[inside]) for split, inside in in_split.items()}
    return {split: Count(int((~np.isin(rows, golds["train"])).sum()), len(rows)) for split, rows in golds.items()}


def _lengths(positions: Ints, columns: Columns) -> Lengths:
    if not len(positions):
        return Lengths(0, 0.0, 0, 0, 0, 0)
    median, p95 = np.percentile(positions, [50, 95], method="lower")
    cut = int((positions > columns.context_length).sum())
    return Lengths(len(positions), float(positions.mean()), int(median), int(p95), int(positions.max()), cut)


def _json_counts(row: Row) -> dict[str, dict[str, float | int | None]]:
    return {split: {"count": each.count, "of": each.of, "share": each.share} for split, each in row.counts.items()}


def _record_id(record: Mention | Entity) -> str:
    return record.mention_id if isinstance(record, Mention) else record.entity_id


class _Shower:
    """Reads the few records that are shown."""

    def __init__(self, dataset: Dataset, columns: Columns) -> None:
        self._dataset, self._gold, self._split = dataset, columns.mentions.gold, columns.mentions.split
        self._start = {split: int((self._split < number).sum()) for number, split in enumerate(SPLITS)}

    def samples(self, in_split: Mapping[str, Flags]) -> Iterator[Example]:
        for split, inside in in_split.items():
            rows = np.flatnonzero(inside)
            picked = rows[np.linspace(0, len(rows) - 1, min(_SAMPLES_OF_A_SPLIT, len(rows))).astype(np.int64)]
            for row in picked.tolist():
                yield Example("sample", "", split, self._mention(row, "mention"))

    def examples(
        self, of_mentions: Sequence[Check], of_entities: Sequence[Check], in_split: Mapping[str, Flags]
    ) -> Iterator[Example]:
        for check in of_mentions:
            if OF_MENTIONS[check.name].kind != "property" or check.partner is not None:
                hits = check.hits & check.of
                rows = np.concatenate([np.flatnonzero(hits & in_split[split]) for split in _SHOWN_FIRST])
                for row in rows[:_EXAMPLES_OF_A_CHECK].tolist():
                    records = self._mention(row, "mention") + self._partner(check, row)
                    yield Example(check.label, check.name, SPLITS[self._split[row]], records)
        for check in of_entities:
            if OF_ENTITIES[check.name].kind != "property" or check.partner is not None:
                for row in np.flatnonzero(check.hits & check.of)[:_EXAMPLES_OF_A_CHECK].tolist():
                    records = (("entity", self._dataset.entity(row)), *self._partner(check, row))
                    yield Example(check.label, f"kb_{check.name}", "kb", records)

    def _partner(self, check: Check, row: int) -> tuple[tuple[str, Mention | Entity], ...]:
        other = NOBODY if check.partner is None else int(check.partner[row])
        if other == NOBODY:
            return ()
        if check.partner_kind == "entity":
            return (("the other entity", self._dataset.entity(other)),)
        return self._mention(other, f"the other mention, of {SPLITS[self._split[other]]}")

    def _mention(self, row: int, role: str) -> tuple[tuple[str, Mention | Entity], ...]:
        split = SPLITS[self._split[row]]
        index = row - self._start[split]
        (mention,) = self._dataset.mentions(split, range(index, index + 1))
        return ((role, mention), ("gold", self._dataset.entity(int(self._gold[row]))))
