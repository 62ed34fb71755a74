"""The manifest of a dataset directory: what is in it, where it came from, and whether it is complete.

It is written last and atomically, so a folder with a `manifest.json` is complete; nothing in it depends on the
machine, the path or the time of the build.

A view of a dataset directory has the same shards, of the training mentions only some, for low-resource settings: its
manifest names the dataset it is a view of, relative to its own folder, and the keys that are kept.
"""

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
)

from dsmip.data.sampler import permutation
from dsmip.errors import UserError
from dsmip.storage.dataset_storage import MANIFEST_FILE, MISSING, FileInfo
from dsmip.storage.parsing import parse_json_object

SPLITS = ("train", "validation", "test")
UNKNOWN_OF = {split: f"{split}-unknown" for split in SPLITS}
"""Where a split's mentions are that have no gold in the kb (`dsmip prepare --keep-nil`): in shards of their own."""
SECTIONS = (*SPLITS, *UNKNOWN_OF.values())
"""All that holds mentions; read alike, by these names."""
KB = "kb"
ENTITIES_FILE = "kb/entities.parquet"
REJECTS_FILE = "rejects.jsonl"
NIL = "nil"  # of the choices: "kept", where mentions without a gold in the kb were
MENTION_DESC = "mention_desc"  # of the choices: how 'dsmip enhance' has given descriptions to mentions
FORMAT = 1
MAX_FILE_BYTES = 1 << 28  # of a picture as a release has it
TRAIN = "train"
_BASE = "view_of"
Take = Literal["random", "first"]

# Nothing else is ever opened: no other folder, no URL, no shell pipe.
_SHARD_PATH = rf"({'|'.join(f'{name}/{name}' for name in (KB, *SECTIONS))})-\d{{6}}\.tar"
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A section of a manifest: frozen, no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(Section):
    """The release a dataset was made from: its folder name and the SHA-256 of its content."""

    name: str
    sha256: Digest


class ImageSettings(Section):
    """How pictures were prepared: shorter side at most `size` pixels, JPEG `quality` where they were encoded again.

    Attributes:
        keep_original: Nothing was resized, and upright JPEGs are the release's own files byte for byte.
    """

    size: Annotated[int, Field(ge=1)]
    quality: Annotated[int, Field(ge=1, le=100)]
    keep_original: bool = False


class SplitCounts(Section):
    """Mentions of a split, and how many of them have a picture."""

    mentions: Count
    with_image: Count


class ShardInfo(Section):
    """One tar: path below the dataset's folder, number of samples, size in bytes, SHA-256."""

    path: Annotated[str, StringConstraints(pattern=f"^{_SHARD_PATH}$")]
    samples: Count
    bytes: Count
    sha256: Digest


class Manifest(Section):
    """`manifest.json`.

    Attributes:
        layout, choices: The release's layout and what was chosen of it (which text, which split).
        shard_bytes: About the size of the kb's shards.
        unknown: Mentions without a gold in the kb that were kept, by split: in no split's counts and shards.
        rejects: Records left out, by reason (inputs = in shards + rejected).
        repaired, degraded: What was changed, or lost, in records that are kept, by reason.
    """

    format: int = FORMAT
    name: str
    licence: str
    source: Source
    layout: str
    choices: dict[str, str]
    tool_version: str
    seed: int
    shard_bytes: Count
    image: ImageSettings
    entities: Count
    entities_with_image: Count
    splits: dict[str, SplitCounts]
    entities_sha256: Digest
    shards: tuple[ShardInfo, ...]
    rejects: dict[str, Count]
    repaired: dict[str, Count]
    degraded: dict[str, Count]
    unknown: dict[str, SplitCounts] = {}

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Data without mentions of the unknown has the manifest, and so the hash, that it always had."""
        tree: dict[str, Any] = handler(self)
        return {name: value for name, value in tree.items() if name != "unknown" or value}

    @property
    def entities_file(self) -> FileInfo:
        """The table of the kb."""
        return FileInfo(ENTITIES_FILE, self.entities_sha256)

    @property
    def sections(self) -> dict[str, SplitCounts]:
        """Counts of all that holds mentions here: the splits, then what they have of the unknown."""
        return {**self.splits, **{UNKNOWN_OF[split]: self.unknown[split] for split in SPLITS if split in self.unknown}}

    def num_mentions(self, section: str) -> int:
        """Mentions of a split, or of what it has of the unknown.

        Raises:
            ValueError: no such section.
        """
        if section not in SECTIONS:
            raise ValueError(f"no split {section!r}; there are {', '.join(SECTIONS)}")
        return self.sections[section].mentions if section in self.sections else 0

    def shards_of(self, split: str) -> tuple[ShardInfo, ...]:
        """Shards of the kb (`kb`) or of a section, in order."""
        return tuple(shard for shard in self.shards if shard.path.startswith(f"{split}/"))


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The checked manifest of a dataset directory and the SHA-256 of its file.

    Raises:
        UserError: there is no such folder, the dataset is incomplete, or the manifest is not one.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such dataset directory")
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise UserError(f"{folder}: {MISSING}")
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(content: bytes, path: str) -> tuple[Manifest, str]:
    """The checked manifest and its SHA-256; `path` is for messages.

    Raises:
        UserError: it is no manifest, or contradicts itself.
    """
    value = parse_json_object(content, path)
    if value.get("format") != FORMAT:
        raise UserError(
            f"{path}: dataset format {value.get('format')!r}, this version reads {FORMAT}; prepare it again"
        )
    try:
        # JSON mode: arrays become tuples; numbers are not guessed from strings.
        manifest = Manifest.model_validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(key) for key in first["loc"]) or "manifest"
        raise UserError(f"{path}: {where}: {first['msg']}; prepare the dataset again") from error
    _check_sums(manifest, path)
    return manifest, hashlib.sha256(content).hexdigest()


def _check_sums(manifest: Manifest, path: str) -> None:
    """Names and sums that the types cannot say."""
    if tuple(sorted(manifest.splits)) != tuple(sorted(SPLITS)):
        raise UserError(f"{path}: splits must be {', '.join(SPLITS)}; found {', '.join(sorted(manifest.splits))}")
    if other := manifest.unknown.keys() - set(SPLITS):
        raise UserError(f"{path}: unknown: splits must be of {', '.join(SPLITS)}; found {', '.join(sorted(other))}")
    counts = dict.fromkeys(SECTIONS, 0) | {name: each.mentions for name, each in manifest.sections.items()}
    expected = {KB: manifest.entities} | counts
    for split, count in expected.items():
        found = sum(shard.samples for shard in manifest.shards_of(split))
        if found != count:
            raise UserError(f"{path}: {split} has {count} samples, but its shards hold {found}; prepare it again")


def shard_path(split: str, index: int) -> str:
    """Path of shard `index` of the kb or of a section, below the dataset's folder."""
    path = f"{split}/{split}-{index:06d}.tar"
    if not is_shard_path(path):
        raise ValueError(f"no shard name: {path}")
    return path


def is_shard_path(name: str) -> bool:
    """Whether a path below a dataset's folder is that of a shard."""
    return re.fullmatch(_SHARD_PATH, name) is not None


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
