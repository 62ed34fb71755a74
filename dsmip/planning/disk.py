"""Bytes on disk of the whole way: tables of features, weights, checkpoints, a sweep's trials, the index, ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dsmip.config import ExperimentConfig
from dsmip.encoders.shared_tables.tables import LIMIT
from dsmip.models import find_system
from dsmip.planning import amounts
from dsmip.planning.amounts import Counts
from dsmip.planning.probing.parts import EncoderCosts, PartCosts, SystemCosts
from dsmip.planning.probing.pretraining import PretrainCosts
from dsmip.planning.steps import Problem, mebibytes
from dsmip.runs.checkpoints import KEPT
from dsmip.storage.cache import stated_limit

Place = Literal["data", "run", "backbone"]
_RANKS_OF_MENTION = 700  # bytes of ranks.parquet and metrics.json, of the best 20 entities
_CANDIDATE = 20  # bytes of a row and a score, and of a hard negative
_EVALUATED = "test"


@dataclass(frozen=True, slots=True)
class Stored:
    """Files that are written.

    Attributes:
        what: Which.
        place: Beside the data (shared by runs), in the run, or where pretrained weights go.
        until: What takes them away again; empty: nothing does.
    """

    what: str
    place: Place
    num_bytes: int
    until: str = ""


def stored(
    config: ExperimentConfig, costs: SystemCosts, pretrain: PretrainCosts | None, counts: Counts, trials: int
) -> list[Stored]:
    """All files of the way from `pretrain` to `evaluate --split test`, largest items of a kind together."""
    found = list[Stored]()
    if pretrain is not None:
        found.append(Stored("pretrained backbone", "backbone", pretrain.module))
        found.append(Stored("its checkpoints", "backbone", 4 * KEPT * pretrain.module, "its end"))
    found += _features(config, costs, counts)
    parts = [*costs.parts.values()]
    found.append(Stored("weights of parts", "run", sum(each.num_bytes.stored for each in parts)))
    trained = [each for each in parts if each.step is not None]
    if trained:
        size = sum(each.num_bytes.checkpoints for each in trained)
        found.append(Stored("checkpoints of parts", "run", size, "dsmip clean"))
    if any(each.kind == "reranker" for each in parts):
        mentions = counts.mentions["train"] + counts.mentions["validation"]
        candidates = find_system(config.model).num_candidates(config.system)
        found.append(Stored("candidates of the first stage", "run", mentions * candidates * _CANDIDATE))
    if costs.whole is not None:
        whole = costs.whole.num_bytes
        found.append(Stored(f"weights of {config.model}", "run", whole.stored))
        found.append(Stored("trials", "run", trials * (whole.stored + whole.checkpoints), "dsmip clean"))
    prepared = costs.whole.prepared if costs.whole is not None else _first(parts).prepared
    index = prepared["entities"].of_index(*counts.items("kb"))
    found.append(Stored("index", "run", index))
    found.append(Stored("prepared mentions of test", "run", prepared["mentions"].of(*counts.items(_EVALUATED))))
    found.append(Stored("ranks of test", "run", counts.mentions[_EVALUATED] * _RANKS_OF_MENTION))
    return found


def _features(config: ExperimentConfig, costs: SystemCosts, counts: Counts) -> list[Stored]:
    """Tables by part; those that two parts share once."""
    seen, found = set[str](), list[Stored]()
    evaluated = amounts.feature_encoders(config, costs)
    if costs.whole is None:
        evaluated = {
            name: encoder for name, encoder in evaluated.items() if name == _first([*costs.parts.values()]).name
        }
    encoders = {name: part.encoder for name, part in costs.parts.items() if part.encoder is not None}
    for name, encoder in {**encoders, **evaluated}.items():
        splits = set(amounts.training_tables(costs.parts[name])) if name in costs.parts else set[str]()
        if name in evaluated:
            splits |= {_EVALUATED} | ({"train", "validation", "kb"} if costs.whole is not None else set())
        if not splits or encoder.shared in seen:
            continue
        if encoder.shared:
            seen.add(encoder.shared)
        size = table_bytes_of(encoder, counts, sorted(splits))
        found.append(Stored(f"features of {name}", "data" if encoder.shared else "run", size))
    return found


def table_bytes_of(encoder: EncoderCosts, counts: Counts, splits: Sequence[str]) -> int:
    """Tables of features of some splits, or of the kb."""
    return sum(encoder.stored[amounts.side_of(split)].of(*counts.items(split)) for split in splits)


def _first(parts: Sequence[PartCosts]) -> PartCosts:
    return next(each for each in parts if each.kind != "reranker")


def disk_problems(files: Sequence[Stored], free: int | None, config: ExperimentConfig) -> list[Problem]:
    """What has no room, and the key to set.

    Args:
        free: Bytes of the disk; None: nobody says.
    """
    problems = list[Problem]()
    total = sum(each.num_bytes for each in files)
    largest = max(files, key=lambda each: each.num_bytes)
    if free is not None and total > free:
        halved = config.cache_dtype == "float32"
        remedies = {
            "features": "set cache_dtype to float16" if halved else "set DSMIP_FEATURES to a folder of a larger disk",
            "index": "take a --run on a larger disk (a bundle's may be smaller: dsmip export --index-dtype float16)",
            "checkpoints": "run 'dsmip clean RUN' between the steps, or take a --run on a larger disk",
            "trials": "set tune.trials lower",
        }
        otherwise = "take a --run on a larger disk"
        remedy = next((text for word, text in remedies.items() if word in largest.what), otherwise)
        most = f"most is {largest.what} ({mebibytes(largest.num_bytes)})"
        what = f"disk: {mebibytes(total)} will be written, {mebibytes(free)} are free; {most}"
        problems.append(Problem(what, remedy))
    shared, limit = sum(each.num_bytes for each in files if each.place == "data"), stated_limit(LIMIT)
    if limit is not None and shared > limit:
        what = f"feature tables take {mebibytes(shared)}, and {LIMIT} allows {mebibytes(int(limit))}"
        problems.append(
            Problem(what, f"set {LIMIT} to {math.ceil(shared / 1e8) / 10} or more, or cache_dtype to float16")
        )
    return problems
