"""A suite of three systems on WikiMEL and made-up ranks of theirs, for tables and pages."""

from collections.abc import Sequence
from typing import Any

import torch

from dsmip.evaluation.metrics import measure
from dsmip.evaluation.stored.comparison import Evaluation
from dsmip.evaluation.stored.protocol import EvaluationProtocol
from dsmip.ops.ranking import Counts
from dsmip.storage.locations import open_run_storage
from dsmip.suites.figures import Result
from dsmip.suites.members import Column, Row
from dsmip.suites.schema import Suite
from tests.support.small_release import HOSTILE

NUM_MENTIONS = 40
ROWS = [Row(name, label, name, name) for name, label in (("dsmip", "DSMIP"), ("mimic", HOSTILE), ("mmoe", "MMoE"))]
HITS = {"dsmip": 0.9, "mimic": 0.5, "mmoe": 0.3}


def made_suite() -> Suite:
    """Two seeds, two shares."""
    return Suite.model_validate(
        {
            "title": HOSTILE,
            "data": {"wikimel": {"label": "WikiMEL_&%"}},
            "systems": {name: {"config": "x"} for name in HITS},
            "seeds": [0, 1],
            "shares": [0.1, 1.0],
            "metrics": ["hits@1", "mean_rank"],
            "significance": {"of": "dsmip"},
        }
    )


def result(row: Row, share: float, seed: int, better: Sequence[int], **changes: Any) -> Result:
    """A run's; `changes`: of its protocol."""
    about: dict[str, Any] = {
        "entities": 109976,
        "entities_sha256": "0123456789abcdef" * 4,
        "texts": {"entity_text": "attr"},
        "seed": seed,
    }
    about |= {"split": "test", "mentions": len(better), "mentions_sha256": "m", "versions": {}, **changes}
    records = {(f"m{i}", 0): {"gold": f"Q{i}", "better": each, "tied": 0} for i, each in enumerate(better)}
    run = open_run_storage("/nowhere")
    evaluation = Evaluation(run, row.model, b"k", EvaluationProtocol.model_validate(about), records)
    counts = Counts(torch.tensor(better), torch.zeros(len(better), dtype=torch.int64))
    metrics = {name: float(value) for name, value in measure(counts).items()}
    return Result(row, Column("wikimel", share), seed, "wikimel", evaluation, metrics)


def made_results() -> list[Result]:
    """Of every row, share and seed."""
    generator, found = torch.Generator().manual_seed(5), []
    for row in ROWS:
        for share in (0.1, 1.0):
            for seed in (0, 1):
                wrong = torch.rand(NUM_MENTIONS, generator=generator) > HITS[row.name] * (0.5 + share / 2)
                found.append(result(row, share, seed, (wrong * 7).tolist()))
    return found
