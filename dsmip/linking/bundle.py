"""A bundle: a folder that a linker is opened from, without the run and the data that it was made of.

<bundle>/bundle.json            last: present means complete. Names, hashes and sizes of all other files
<bundle>/README.md              the model card
<bundle>/config.yaml            the run's configuration; files that it names are files/... of the bundle
<bundle>/<part>/, variants/     finished parts, as in a run (`dsmip.runs.loaded_model`)
<bundle>/files/                 what the configuration names, such as the backbone's weights
<bundle>/index/                 the entity index (`dsmip.evaluation.index`)
<bundle>/entities.parquet       entity_id, name, attributes, image (a small JPEG), by row
<bundle>/calibration.json       where the model is calibrated

Nothing in it is executed: tensors are safetensors, all else is JSON, YAML, Markdown and parquet.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from pydantic import Field, ValidationError

from dsmip.config import ExperimentConfig, Frozen
from dsmip.data.manifest import ImageSettings
from dsmip.errors import UserError, first_line
from dsmip.evaluation.index import EntityIndex
from dsmip.linking.knowledge_base import KnowledgeBase
from dsmip.runs.load_config import parse_config, with_files
from dsmip.runs.loaded_model import TrainedParts
from dsmip.storage.atomic import sha256_file
from dsmip.storage.parsing import parse_json_object

BUNDLE = "bundle.json"
FORMAT: Literal[1] = 1
ENTITIES, CALIBRATION, INDEX, FILES, CARD = "entities.parquet", "calibration.json", "index", "files", "README.md"
IndexDtype = Literal["float32", "float16"]
GROUP_ROWS = 256  # of entities.parquet that are read for a picture
_KEPT_GROUPS = 16
_NAME = re.compile(r"[A-Za-z0-9_][\w.@+-]*(/[A-Za-z0-9_][\w.@+-]*)*")
ENTITY_SCHEMA = pa.schema(
    [("entity_id", pa.string()), ("name", pa.string()), ("attributes", pa.string()), ("image", pa.binary())]
)


class BundleFile(Frozen):
    """Bytes and SHA-256 of a file."""

    bytes: int = Field(ge=0)
    sha256: str


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
        files: All others of the bundle.
    """

    format: Literal[1] = FORMAT
    made_with: str
    model: str
    data: str
    data_sha256: str
    licence: str
    images: dict[str, Any]
    entities: int = Field(ge=1)
    index_dtype: IndexDtype = "float32"
    files: dict[str, BundleFile]

    @property
    def image_settings(self) -> ImageSettings:
        return ImageSettings.model_validate(self.images)


@dataclass(frozen=True)
class BundledParts(TrainedParts):
    """The finished parts of a bundle, whose configurations name its files."""

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
    return parse_config(with_files(tree, here), f"config {path}")


def is_bundle(folder: Path) -> bool:
    """Whether there is a complete bundle."""
    return (folder / BUNDLE).is_file()


def open_bundle(folder: Path) -> BundleManifest:
    """The checked manifest of a bundle; every file is read once and has the size and hash that it states.

    Raises:
        UserError: It is of another version, or a file is missing or changed.
    """
    path = folder / BUNDLE
    tree = parse_json_object(path.read_bytes(), str(path))
    if tree.get("format") != FORMAT:
        raise UserError(
            f"{path}: bundle format {tree.get('format')!r}, this version reads {FORMAT}; export the run again"
        )
    try:
        manifest = BundleManifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg']}; export the run again") from None
    for name, stated in manifest.files.items():
        if not _NAME.fullmatch(name):
            raise UserError(f"{path}: {name!r} is no name of a bundle's file; export the run again")
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing: the bundle is damaged; copy it again")
        if file.stat().st_size != stated.bytes or sha256_file(file) != stated.sha256:
            raise UserError(f"{file} is not the file that the bundle was made with; copy it again")
    return manifest


def bundled_index(folder: Path) -> EntityIndex:
    """An index as it is read: numbers that are stored in half precision are held in single precision.

    Raises:
        UserError: A slice is missing or cut off.
    """
    index = EntityIndex.open(folder, {})
    return EntityIndex([table.cast(torch.float32) for table in index.tables], index.first_row)


def bundled_entities(folder: Path, num_entities: int) -> KnowledgeBase:
    """The entities of a bundle; pictures are read some hundred at a time, when they are asked for.

    Raises:
        UserError: The table is of something else.
    """
    path = folder / ENTITIES
    try:
        texts = pq.read_table(path, columns=ENTITY_SCHEMA.names[:3]).combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the bundle again") from None
    if len(texts) != num_entities:
        raise UserError(f"{path}: {len(texts)} entities instead of {num_entities}; export the run again")

    @lru_cache(maxsize=_KEPT_GROUPS)
    def group(number: int) -> pa.ChunkedArray:
        return pq.ParquetFile(path).read_row_group(number, columns=["image"]).column("image")

    def image_of(row: int) -> bytes | None:
        return group(row // GROUP_ROWS)[row % GROUP_ROWS].as_py()  # type: ignore[no-any-return]

    return KnowledgeBase(texts, image_of)
