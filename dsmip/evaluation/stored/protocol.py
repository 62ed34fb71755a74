"""The protocol of an evaluation: all that two figures must share before one may be called better than the other."""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, Self

from pydantic import Field, ValidationError

from dsmip.config import Frozen
from dsmip.data.dataset import Dataset
from dsmip.data.records import Mention
from dsmip.errors import UserError
from dsmip.runs.cleanup import SWEEP
from dsmip.runs.provenance import environment
from dsmip.runs.run import Run
from dsmip.storage.parsing import read_json
from dsmip.units.matcher import FixedBatches

_FOR_THE_RECORD = {"fixed_batches", "seed", "tune_seed", "versions"}
_LATER = "texts_sha256"  # which evaluations of older versions have not


def ids_hash(ids: Sequence[str]) -> str:
    """SHA-256 of ids in any order."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


def _texts_hash(dataset: Dataset, mentions: Sequence[Mention]) -> str:
    entities = dataset.entity_texts().select(["entity_id", "name", "attributes"]).to_pylist()
    texts = [list(each.values()) for each in entities]
    texts += [[each.mention_id, each.word, each.sentence] for each in mentions]
    return ids_hash([json.dumps(each, ensure_ascii=False) for each in texts])


class EvaluationProtocol(Frozen):
    """The section `protocol` of metrics.json, and of the metadata of ranks.parquet.

    Attributes:
        entities: How many are ranked.
        entities_sha256: Of their ids, in any order.
        texts: What `dsmip prepare` made the texts of entities and mentions of.
        split: The split's name.
        mentions: How many of it are ranked.
        mentions_sha256: Of their ids and golds, in any order.
        texts_sha256: Of the entities' names and attributes and the mentions' words and sentences, in any order; None:
            an older version did not look.
        ranked: Every rank is over all entities; figures among candidates are a section of their own.
        ties: A gold stands in the middle of the entities that score as it does.
        fixed_batches: How many mentions and entities were prepared at a time, where scores depend on it: of a model
            that is compared with others all the same.
        seed: Of the run; figures of several seeds are comparable.
        tune_seed: Of the sweep whose best trial the model is, or gives the experts' settings and scales (`dsmip tune
            --seed`, which draws the trials; they train by the run's seed); comparable, too. None: there was no sweep,
            or nothing says which.
        versions: Of what computed the figures; comparable, too.
    """

    entities: int = Field(ge=1)
    entities_sha256: str
    texts: dict[str, str]
    split: str
    mentions: int = Field(ge=1)
    mentions_sha256: str
    texts_sha256: str | None = None
    ranked: Literal["all entities"] = "all entities"
    ties: Literal["realistic"] = "realistic"
    fixed_batches: str | None = None
    seed: int
    tune_seed: int | None = None
    versions: dict[str, str | None]

    @classmethod
    def of(
        cls,
        run: Run,
        model: str,
        split: str,
        mentions: Sequence[Mention],
        entity_ids: Sequence[str],
        fixed: FixedBatches | None = None,
    ) -> Self:
        """That of the evaluation of one of a run's models, in this process."""
        return cls(
            entities=len(entity_ids),
            entities_sha256=ids_hash(entity_ids),
            texts_sha256=_texts_hash(run.dataset, mentions),
            fixed_batches=fixed and f"{fixed.mentions} mentions, {fixed.entities} entities",
            texts=run.dataset.manifest.choices,
            split=split,
            mentions=len(mentions),
            mentions_sha256=ids_hash([f"{mention.mention_id}\t{mention.entity_id}" for mention in mentions]),
            seed=run.config.seed,
            tune_seed=_tune_seed(run, model),
            versions=_versions(),
        )

    @classmethod
    def read(cls, text: bytes | None) -> Self | None:
        """That of stored ranks; None where an older version or another program wrote them."""
        try:
            return None if text is None else cls.model_validate_json(text)
        except ValidationError:
            return None

    def differences(self, other: "EvaluationProtocol") -> list[str]:
        """What keeps figures of two evaluations from being compared, in words."""
        own, others = self._compared(), other._compared()
        names = sorted(own.keys() | others.keys())
        return [
            f"{name} ({_shown(own.get(name))} and {_shown(others.get(name))})"
            for name in names
            if own.get(name) != others.get(name) and not (name == _LATER and None in (own[name], others[name]))
        ]

    def _compared(self) -> dict[str, Any]:
        tree: dict[str, Any] = self.model_dump(exclude=_FOR_THE_RECORD | {"texts"})
        return tree | self.texts


def _tune_seed(run: Run, model: str) -> int | None:
    whole = run.system.name
    if not run.system.gated or model not in (whole, *run.system.fusions):
        return None
    report = run.part_report(whole)
    if "tune_seed" in report:
        return int(report["tune_seed"])
    try:  # an older version's report names its sweep alone, and another one may have begun since
        sweep, seed = read_json(run.folder / SWEEP, lambda it: (it["sha256"], int(it["seed"])))
    except (UserError, OSError):
        return None
    return seed if report.get("sweep") == sweep else None


@cache
def _versions() -> dict[str, str | None]:
    """Of this process, in which they do not change."""
    here = environment()
    return {
        "dsmip": here["dsmip"],
        "revision": (here["git"] or {}).get("revision"),
        "source_sha256": here["source_sha256"],
        **{name: here["packages"].get(name) for name in ("torch", "open_clip_torch", "transformers")},
    }


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)[:16]
