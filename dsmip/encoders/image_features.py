"""Picture features of a whole data set beside its shards: computed once by `dsmip features`, read by every run's gate.

<data>/features/<kind>-<hash of the network>-<size>px-<dtype>/kb.safetensors, train.safetensors ...
<data>/features/.../manifest.json   written last; the features of another version of the data are not taken

A table has the columns `picture` [N, d] and `has_image` [N] (False: `picture` is what the network says of a missing
picture), in row order of the kb or shard order of a split.
"""

import fnmatch
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError

from dsmip.data.collate import ImageCollator
from dsmip.data.dataset import Dataset
from dsmip.data.images import CLIP_PIXELS, PixelForm
from dsmip.data.manifest import KB, SECTIONS, SPLITS, Count, Digest, Section
from dsmip.data.table import Table
from dsmip.encoders.feature_keys import fingerprint
from dsmip.encoders.image_networks import Identity, ImageNetwork, Kind
from dsmip.errors import UserError
from dsmip.keys import plain_text
from dsmip.storage.atomic import sha256_file, write_json
from dsmip.storage.dataset_storage import MANIFEST_FILE, DatasetStorage, FileInfo

KB_AND_SPLITS = (KB, *SPLITS)
DTypeName = Literal["float32", "float16"]
DTYPES: dict[DTypeName, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}
FOLDER = "features"
_MANIFEST = "manifest.json"


class Weights(Section):
    """`sha256` is of the network: its tensors, its form, its pixel statistics. `name` is for readers."""

    name: str
    sha256: Digest


class Pixels(Section):
    """Pictures are fitted to `size` x `size` (`form` says how), brought to the network's `side`, and normalised."""

    size: Annotated[int, Field(ge=1)]
    side: Annotated[int, Field(ge=1)]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    form: PixelForm = CLIP_PIXELS

    @property
    def fitted(self) -> str:
        """What pictures are before the network, in a word."""
        return fitted_name(self.size, self.form)


def fitted_name(size: int, form: PixelForm) -> str:
    """40px; where pictures do not become squares as CLIP's do, how they do."""
    if form == CLIP_PIXELS:
        return f"{size}px"
    part = "" if form.part == 1 else f"-{form.part:g}"
    return f"{size}px-{form.resize}-{form.filter}{part}"


class Data(Section):
    """The data set's name and the SHA-256 of its manifest."""

    name: str
    sha256: Digest


class Origin(Section):
    """All that the features depend on."""

    format: Literal[1] = 1
    kind: Kind
    weights: Weights
    pixels: Pixels
    dtype: DTypeName
    data: Data

    @property
    def folder_name(self) -> str:
        return f"{self.kind}-{self.weights.sha256[:16]}-{self.pixels.fitted}-{self.dtype}"


class FeatureFile(Section):
    """One table: items, how many of them have a picture, size in bytes, SHA-256."""

    items: Count
    with_image: Count
    bytes: Count
    sha256: Digest


class FeatureManifest(Section):
    """`manifest.json`: `files` by split and for the kb, `width` numbers per picture."""

    origin: Origin
    width: Annotated[int, Field(ge=1)]
    files: dict[str, FeatureFile]


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """Finished features of a data set.

    Attributes:
        files: The data set's own.
        name: Of the folder with the tables, below them.
    """

    files: DatasetStorage
    name: str
    manifest: FeatureManifest

    @property
    def folder(self) -> Path:
        """Where the tables, or their copies, lie on this node."""
        return self.files.folder / self.name

    def file(self, split: str) -> Path:
        """The checked table of a split or of the kb, on this node.

        Raises:
            UserError: It is missing or damaged.
        """
        expected = self.manifest.files[split]
        asked = FileInfo(features_file(self.name, split), expected.sha256, expected.bytes)
        path = self.files.use(asked, lambda path: path)
        again = "delete the folder, or have 'dsmip features' make it again"
        if not path.is_file():
            raise UserError(f"{path}: the features are missing; {again}")
        if path.stat().st_size != expected.bytes or sha256_file(path) != expected.sha256:
            raise UserError(f"{path}: the features are damaged (not the manifest's SHA-256); {again}")
        return path


def features_name(origin: Origin) -> str:
    """Of the folder with the tables, below the data set."""
    return f"{FOLDER}/{origin.folder_name}"


def features_file(name: str, split: str) -> str:
    """The table of a split or of the kb in that folder."""
    return f"{name}/{split}.safetensors"


def network_hash(identity: Identity) -> str:
    """Hex digest of a network, version 1 (as `dsmip.encoders.feature_keys.feature_key`)."""
    return fingerprint(identity.tensors, plain_text((identity.form, identity.mean, identity.std, identity.side)))


def read_features(files: DatasetStorage, name: str) -> ImageFeatures | None:
    """Finished features, None where none are finished.

    Raises:
        UserError: Their manifest is damaged.
    """
    address = files.address(f"{name}/{_MANIFEST}")
    content = files.read(f"{name}/{_MANIFEST}")
    if content is None:
        return None
    try:
        manifest = FeatureManifest.model_validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(key) for key in first["loc"]) or "manifest"
        raise UserError(
            f"{address}: {where}: {first['msg']}; delete the folder and run 'dsmip features' again"
        ) from error
    if not set(KB_AND_SPLITS) <= set(manifest.files) <= {KB, *SECTIONS}:
        raise UserError(
            f"{address}: files must be {', '.join(KB_AND_SPLITS)}; delete the folder and run 'dsmip features' again"
        )
    return ImageFeatures(files, name, manifest)


def find_features(
    dataset: Dataset, kind: Kind, size: int, form: PixelForm, dtype: DTypeName
) -> Iterator[ImageFeatures]:
    """Finished features of this very data, of pictures fitted alike, by any weights.

    Of a view also those of the data set that it is a view of, whose tables hold more (`load_features`).
    """
    for found in stored_features(dataset, f"{kind}-*-{fitted_name(size, form)}-{dtype}"):
        if not is_outdated(found):
            yield found


def stored_features(dataset: Dataset, pattern: str = "*") -> Iterator[ImageFeatures]:
    """Finished features beside the data, and beside what they are a view of, also of other versions of them."""
    for files in [dataset.own, *([dataset.files] if dataset.files is not dataset.own else [])]:
        for folder in fnmatch.filter(files.children(FOLDER), pattern):
            if found := read_features(files, f"{FOLDER}/{folder}"):
                yield found


def is_outdated(features: ImageFeatures) -> bool:
    """Whether they are of another version of the data beside them, which no run takes."""
    manifest = features.files.read(MANIFEST_FILE) or b""
    return features.manifest.origin.data.sha256 != hashlib.sha256(manifest).hexdigest()


def write_manifest(files: DatasetStorage, origin: Origin, sections: Sequence[str] = KB_AND_SPLITS) -> ImageFeatures:
    """Says that the tables of the features, one of each section and of the kb, are finished: the last file of all."""
    described, width, name = {}, 0, features_name(origin)
    for split in sections:
        path = files.folder / features_file(name, split)
        table = Table.load(path)
        width = table.dense("picture").shape[1]
        with_image = int(table.dense("has_image").sum())
        described[split] = FeatureFile(
            items=len(table), with_image=with_image, bytes=path.stat().st_size, sha256=sha256_file(path)
        )
        files.send(features_file(name, split))
    manifest = FeatureManifest(origin=origin, width=width, files=described)
    write_json(files.folder / name / _MANIFEST, manifest.model_dump(mode="json"))
    files.send(f"{name}/{_MANIFEST}")
    return ImageFeatures(files, name, manifest)


def forget(files: DatasetStorage, name: str) -> None:
    """Takes back that features are finished, before their tables are written anew."""
    files.remove(f"{name}/{_MANIFEST}")


@torch.no_grad()
def image_rows(
    network: ImageNetwork,
    dataset: Dataset,
    split: str,
    rows: range,
    collator: ImageCollator,
    dtype: DTypeName,
    device: torch.device,
) -> Table:
    """The features of some rows of a split or of the kb, on the CPU."""
    items = list(dataset.entities(rows)) if split == KB else list(dataset.mentions(split, rows))
    pixels, has_image = collator(items)
    vectors = network.vectors(pixels.to(device), has_image.to(device)).cpu()
    return Table({"picture": vectors.to(DTYPES[dtype]), "has_image": has_image})
