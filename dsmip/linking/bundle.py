"""A bundle: a folder that a linker is opened from, without the run and the data that it was made of.

<bundle>/bundle.json            last: present means complete. Names, hashes and sizes of all other files
<bundle>/README.md              the model card
<bundle>/config.yaml            the run's configuration; files that it names are files/... of the bundle
<bundle>/<part>/, variants/     finished parts, as in a run (`dsmip.runs.loaded_model`)
<bundle>/files/                 what the configuration names, such as the backbone's weights
<bundle>/index/                 the entity index (`dsmip.evaluation.index`)
<bundle>/entities.parquet       entity_id, name, attributes, image (a small JPEG), by row
<bundle>/segments/<name>/       index/ and entities.parquet of entities that came later (`dsmip.linking.growing`)
<bundle>/calibration.json       where the model is calibrated
<bundle>/candidates.safetensors what finds candidates, where global vectors do not (`dsmip.distillation.vectors`)

Nothing in it is executed: tensors are safetensors, all else is JSON, YAML, Markdown and parquet.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from dsmip.config import ExperimentConfig, Frozen
from dsmip.data.manifest import ImageSettings
from dsmip.errors import UserError, first_line
from dsmip.runs.load_config import parse_config, with_files
from dsmip.runs.loaded_model import TrainedParts
from dsmip.storage.atomic import sha256_file
from dsmip.storage.parsing import parse_json_object

BUNDLE = "bundle.json"
Format = Literal[1, 2]
FORMATS: tuple[Format, ...] = (1, 2)
"""2: indexes hold distilled vectors for candidates. Without them a bundle is of format 1, which older versions read."""
ENTITIES, CALIBRATION, INDEX, FILES, CARD = "entities.parquet", "calibration.json", "index", "files", "README.md"
CANDIDATES = "candidates.safetensors"
IndexDtype = Literal["float32", "float16", "int8"]
SEGMENTS = "segments"
_NAME = re.compile(r"[A-Za-z0-9_][\w.@+-]*(/[A-Za-z0-9_][\w.@+-]*)*")


class BundleFile(Frozen):
    """Bytes and SHA-256 of a file."""

    bytes: int = Field(ge=0)
    sha256: str


class Example(Frozen):
    """A mention that may be tried."""

    word: str
    sentence: str = ""


class Segment(Frozen):
    """Entities that were written together.

    Attributes:
        folder: Of its index and its entities.parquet, below the bundle; "": the bundle's own.
        entities: How many rows it has.
        removed: Those of them that are entities no more, ascending; they stay in its files until it is compacted.
    """

    folder: str = Field(pattern=rf"^({SEGMENTS}/[0-9a-f]+)?$")
    entities: int = Field(ge=1)
    removed: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _rows_are_its_own(self) -> Self:
        if list(self.removed) != sorted({row for row in self.removed if 0 <= row < self.entities}):
            raise ValueError("removed holds other rows than its own, or not in order")
        return self

    def has(self, name: str) -> bool:
        """Whether a file of the bundle is one of its files."""
        inside = name.removeprefix(f"{self.folder}/") if self.folder else name
        return name.startswith(self.folder) and (inside == ENTITIES or inside.startswith(f"{INDEX}/"))


class BundleManifest(Frozen):
    """`bundle.json`.

    Attributes:
        made_with: The version of dsmip.
        model: The part's or system's name.
        data: Name of the data set.
        data_sha256: Of its manifest.
        images: How its pictures were prepared, and pictures of mentions are.
        entities: How many there are.
        index_dtype: In which the index is stored.
        segments: Where they are, in the order of their rows; none: as they were exported.
        examples: Some test mentions, for a page.
        files: All others of the bundle.
    """

    format: Format = 1
    made_with: str
    model: str
    data: str
    data_sha256: str
    licence: str
    images: dict[str, Any]
    entities: int = Field(ge=1)
    index_dtype: IndexDtype = "float32"
    segments: tuple[Segment, ...] = ()
    examples: tuple[Example, ...] = ()
    files: dict[str, BundleFile]

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        if self.segments and self.entities != sum(each.entities - len(each.removed) for each in self.segments):
            raise ValueError("entities is not the sum of those of the segments")
        return self

    @model_validator(mode="after")
    def _vectors_are_there(self) -> Self:
        if self.has_distilled_vectors != (CANDIDATES in self.files):
            raise ValueError(f"format {self.format} does not go with the files: {CANDIDATES}")
        return self

    @property
    def has_distilled_vectors(self) -> bool:
        """Whether its indexes hold vectors of their own for candidates."""
        return self.format == 2

    @property
    def all_segments(self) -> tuple[Segment, ...]:
        """The segments; of a bundle as it was exported, the one that it is."""
        return self.segments or (Segment(folder="", entities=self.entities),)

    @property
    def model_files(self) -> dict[str, BundleFile]:
        """What the model is made of: all files but those of its entities and what is said of it."""
        of_entities = (Segment(folder="", entities=1), *self.segments)
        beside = (CARD, CALIBRATION)
        return {
            name: file
            for name, file in self.files.items()
            if name not in beside and not any(segment.has(name) for segment in of_entities)
        }

    @property
    def image_settings(self) -> ImageSettings:
        return ImageSettings.model_validate(self.images)


@dataclass(frozen=True)
class BundledParts(TrainedParts):
    """The finished parts of a bundle, whose configurations name its files.

    Attributes:
        files: Paths of those that its manifest lists, and whose hashes are known: what may be there or not is there
            only if it is one of them.
    """

    files: frozenset[Path]

    def has_file(self, path: Path) -> bool:
        return path in self.files

    def stored_config(self, path: Path) -> ExperimentConfig:
        return bundled_config(path, self.folder)


def bundled_config(path: Path, folder: Path) -> ExperimentConfig:
    """A configuration of a bundle, with the places of its files here.

    Raises:
        UserError: It is no configuration of this version.
    """

    def here(name: str) -> str:
        return str(folder.absolute() / name) if name.startswith(f"{FILES}/") else name

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); copy the bundle again") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must be a mapping of keys, not {type(tree).__name__}; export the run again")
    return parse_config(with_files(tree, here), f"config {path}")


def is_bundle(folder: Path) -> bool:
    """Whether there is a complete bundle."""
    return (folder / BUNDLE).is_file()


def read_manifest(folder: Path) -> tuple[BundleManifest, str]:
    """The manifest of a bundle, and a hash of it; its files are not looked at.

    Raises:
        UserError: It is damaged, or of another version.
    """
    path = folder / BUNDLE
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(content: bytes, path: str) -> tuple[BundleManifest, str]:
    """The manifest and a hash of it; `path` is for messages. Errors are those of `read_manifest`."""
    tree = parse_json_object(content, path)
    if tree.get("format") not in FORMATS:
        readable = " and ".join(map(str, FORMATS))
        raise UserError(
            f"{path}: bundle format {tree.get('format')!r}, this version reads {readable}; export the run again"
        )
    try:
        manifest = BundleManifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg']}; export the run again") from None
    for name in manifest.files:
        if not _NAME.fullmatch(name):
            raise UserError(f"{path}: {name!r} is no name of a bundle's file; export the run again")
    return manifest, hashlib.sha256(content).hexdigest()


def check_files(folder: Path, files: Mapping[str, BundleFile]) -> None:
    """Reads files of a bundle once.

    Raises:
        UserError: One is missing, or has not the size and hash that are stated.
    """
    for name, stated in files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing: the bundle is damaged; copy it again")
        if file.stat().st_size != stated.bytes or sha256_file(file) != stated.sha256:
            raise UserError(f"{file} is not the file that the bundle was made with; copy it again")


def check_no_others(folder: Path, files: Mapping[str, BundleFile]) -> None:
    """Looks for further files beside those that a configuration names: libraries read what they find in a tokenizer's
    folder, such as added_tokens.json. Hidden ones, which file managers leave, they do not.

    Raises:
        UserError: There is one.
    """
    for path in sorted((folder / FILES).rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.as_posix() not in files and not any(part.startswith(".") for part in name.parts):
            raise UserError(f"{path} is not of the bundle (bundle.json does not list it), and would be read; remove it")


def stated_files(folder: Path) -> dict[str, BundleFile]:
    """Sizes and hashes of all files in a folder, by their names below it."""
    return {
        path.relative_to(folder).as_posix(): BundleFile(bytes=path.stat().st_size, sha256=sha256_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
