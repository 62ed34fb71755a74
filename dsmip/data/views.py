"""A view of a dataset directory: the same shards, of the training mentions only some. For low-resource settings.

<view>/manifest.json names the dataset it is a view of, relative to its own folder, and the keys that are kept.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from dsmip.data.manifest import FORMAT, Digest, Manifest, Section, SplitCounts
from dsmip.data.sampler import permutation
from dsmip.errors import UserError
from dsmip.storage.parsing import parse_json_object

TRAIN = "train"
_BASE = "view_of"
Take = Literal["random", "first"]


class View(Section):
    """`manifest.json` of a view.

    Attributes:
        view_of: The dataset's folder, relative, or its URI in a store.
        base_sha256: Of the dataset's manifest.
        take: Which training mentions are kept: `random` ones, drawn with `seed`, or the `first` of the release.
        seed: None where nothing is drawn.
    """

    format: int = FORMAT
    view_of: str
    base_sha256: Digest
    train_fraction: Annotated[float, Field(gt=0, le=1)]
    take: Take = "random"
    seed: int | None
    train: SplitCounts
    train_keys: tuple[str, ...]

    def rows(self) -> list[int]:
        """Positions of the kept mentions in the dataset's training split, ascending."""
        return sorted(int(key.rpartition("-")[2]) for key in self.train_keys)

    def applied(self, manifest: Manifest) -> Manifest:
        """The dataset's manifest with the view's counts."""
        return manifest.model_copy(update={"splits": manifest.splits | {TRAIN: self.train}})


def is_view(value: Any) -> bool:
    """Whether a parsed manifest is a view's."""
    return isinstance(value, dict) and _BASE in value


def parse_view(content: bytes, path: str) -> View | None:
    """The view that a manifest's content describes; None when it is a dataset's own. `path` is for messages.

    Raises:
        UserError: it is a view, but a wrong one.
    """
    if not is_view(parse_json_object(content, path)):
        return None
    try:
        view = View.model_validate_json(content, strict=True)
        view.rows()
    except (ValidationError, ValueError) as error:
        raise UserError(f"{path}: no view of a dataset ({error}); make it again") from error
    return view


def draw_rows(num_mentions: int, fraction: float, seed: int) -> list[int]:
    """Positions to keep, ascending: round(fraction * num_mentions), at least one.

    Those of a smaller fraction are among those of a larger one with the same seed.
    """
    count = max(round(fraction * num_mentions), min(num_mentions, 1))
    return sorted(permutation(num_mentions, "view", seed)[:count].tolist())
