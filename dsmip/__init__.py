"""dsmip, multimodal entity linking: the public face of the library. What it names is imported when it is first used.

import dsmip

dataset = dsmip.open_dataset("demo/data")          # a folder, or s3://...
print(dataset.num_entities, list(dsmip.systems()))
result = dsmip.evaluate("demo/run", "test")        # exact ranks over the whole knowledge base
print(result.metrics["overall"]["hits@1"], result.folder)
"""

import importlib
from typing import TYPE_CHECKING, Any

from dsmip.errors import UserError
from dsmip.version import VERSION

if TYPE_CHECKING:
    from pathlib import Path

    from dsmip.data.dataset import Dataset
    from dsmip.data.records import Entity, Mention
    from dsmip.evaluation.report import Evaluated
    from dsmip.models.base import System
    from dsmip.storage.locations import Location

__version__ = VERSION
__all__ = ["Entity", "Mention", "UserError", "__version__", "evaluate", "open_dataset", "systems"]

_LAZY = {"Entity": "dsmip.data.records", "Mention": "dsmip.data.records"}


def open_dataset(location: "str | Path") -> "Dataset":
    """Opens a dataset directory that `dsmip prepare` made.

    Args:
        location: its folder, or its URI in an object store.

    Returns:
        The dataset: counts, `entities()`, `mentions(split)`, batches.

    Raises:
        UserError: there is none, or it is not complete.
    """
    from dsmip.data.dataset import Dataset

    return Dataset.open(location)


def evaluate(run: "Location", split: str = "test", model: str | None = None) -> "Evaluated":
    """Ranks the whole knowledge base for every mention of a split, in this process, as `dsmip evaluate` does.

    It writes the same files, a record of it in the run's `records/` among them, and prints nothing.

    Args:
        run: the run's folder, or its URI in an object store.
        split: train, validation or test.
        model: a finished part, or the system's name for the whole of a gated system (None: the first of these).

    Returns:
        The metrics, as in `metrics.json`, and the folder with it and with `ranks.parquet`.

    Raises:
        UserError: no such run, split or model, or the model is not trained yet.
    """
    import torch

    from dsmip.evaluation.index_builder import OpenedEvaluation
    from dsmip.evaluation.report import evaluate_model
    from dsmip.reranking.second_stage import second_stage
    from dsmip.runs.run import Run

    opened = Run.open(run)
    with opened.recorded("evaluate"):
        evaluation, device = OpenedEvaluation(opened, split, model), torch.device("cpu")
        return evaluate_model(evaluation, device, second_stage=second_stage(evaluation, device))


def systems() -> "dict[str, type[System]]":
    """The published systems by name: what `model:` in a configuration may say."""
    from dsmip.models import systems as registered

    return registered()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dsmip' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
