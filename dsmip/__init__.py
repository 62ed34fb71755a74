"""dsmip, multimodal entity linking: the public face of the library. What it names is imported when it is first used.

import dsmip

dataset = dsmip.open_dataset("demo/data")          # a folder, or s3://...
print(dataset.num_entities, list(dsmip.systems()))
result = dsmip.evaluate("demo/run", "test")        # exact ranks over the whole knowledge base
print(result.metrics["overall"]["hits@1"], result.folder)
links = dsmip.load("demo/run").link("Jaguar", sentence="A Jaguar crossed the river.", image="photo.jpg")
print(links.best)
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
    from dsmip.linking.linker import Linker
    from dsmip.linking.links import Link, Links
    from dsmip.models.base import System
    from dsmip.progress import Progress
    from dsmip.storage.locations import Location

__version__ = VERSION
__all__ = [
    "Entity",
    "Link",
    "Linker",
    "Links",
    "Mention",
    "UserError",
    "__version__",
    "evaluate",
    "load",
    "open_dataset",
    "systems",
]

_LAZY = {
    "Entity": "dsmip.data.records",
    "Link": "dsmip.linking.links",
    "Linker": "dsmip.linking.linker",
    "Links": "dsmip.linking.links",
    "Mention": "dsmip.data.records",
}


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


def evaluate(
    run: "Location", split: str = "test", model: str | None = None, *, data: "Location | None" = None
) -> "Evaluated":
    """Ranks the whole knowledge base for every mention of a split, in this process, as `dsmip evaluate` does.

    It writes the same files, a record of it in the run's `records/` among them, and prints nothing.

    Args:
        run: the run's folder, or its URI in an object store.
        split: train, validation or test.
        model: a finished part, or the system's name for the whole of a gated system (None: the first of these).
        data: other data to rank with the run's model, whose figures have a folder of their own; or the run's own, where
            that has moved.

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

    opened = Run.open(run, data, any_data=True)
    with opened.recorded("evaluate"):
        evaluation, device = OpenedEvaluation(opened, split, model), torch.device("cpu")
        return evaluate_model(evaluation, device, second_stage=second_stage(evaluation, device))


def load(
    location: "Location",
    *,
    model: str | None = None,
    device: str = "cpu",
    data: "Location | None" = None,
    progress: "Progress | None" = None,
) -> "Linker":
    """Opens a trained model to link mentions with.

    The first time, a run's index is built, unless `dsmip evaluate` has left it there.

    Args:
        location: the folder of a run or of a bundle (`dsmip export`), a run's URI in an object store, or a bundle on
            the Hugging Face hub, hf-hub:owner/name.
        model: a finished part, or the system's name for the whole (None: the whole, if there is one).
        device: cpu, cuda, cuda:1 ...
        data: where the run's data lies, if it has moved.
        progress: called with what is done, how far, and of how many, while the index is built.

    Returns:
        The linker: `link(word, sentence, image)` and `link_many(mentions)`.

    Raises:
        UserError: no run, bundle or model there, a model that is not trained yet, data that has moved, or a bundle that
            is damaged.
    """
    from dsmip.linking.load import LoadOptions, load_linker
    from dsmip.progress import no_progress
    from dsmip.rank_options import device_here

    return load_linker(location, device_here(device), LoadOptions(model, data), progress=progress or no_progress)


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
