"""Picture features of a whole data set beside its shards: computed once by `dsmip features`, read by every run's gate.

<data>/features/<kind>-<hash of the network>-<size>px-<dtype>/kb.safetensors, train.safetensors ...
<data>/features/.../manifest.json   written last; the features of another version of the data are not taken

A table has the columns `picture` [N, d] and `has_image` [N] (False: `picture` is what the network says of a missing
picture), in row order of the kb or shard order of a split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError

from dsmip.collate import PictureCollator
from dsmip.encoders.picture_networks import Identity, Kind, PictureNetwork, picture_vectors
from dsmip.errors import UserError
from dsmip.features import fingerprint
from dsmip.files import sha256_file, write_json
from dsmip.manifest import KB, SPLITS, Count, Digest, Part
from dsmip.shards import Dataset
from dsmip.table import Table

PARTS = (KB, *SPLITS)
DTypeName = Literal["float32", "float16"]
DTYPES: dict[DTypeName, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}
_MANIFEST = "manifest.json"


class Weights(Part):
    """`sha256` is of the network: its tensors, its form, its pixel statistics. `name` is for readers."""

    name: str
    sha256: Digest


class Pixels(Part):
    """Pictures are fitted to `size` x `size`, brought to the network's `side`, and normalised."""

    size: Annotated[int, Field(ge=1)]
    side: Annotated[int, Field(ge=1)]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Data(Part):
    """The data set's name and the SHA-256 of its manifest."""

    name: str
    sha256: Digest


class Origin(Part):
    """All that the features depend on."""

    format: Literal[1] = 1
    kind: Kind
    weights: Weights
    pixels: Pixels
    dtype: DTypeName
    data: Data

    @property
    def folder_name(self) -> str:
        return f"{self.kind}-{self.weights.sha256[:16]}-{self.pixels.size}px-{self.dtype}"


class FeatureFile(Part):
    """One table: items, how many of them have a picture, size in bytes, SHA-256."""

    items: Count
    with_image: Count
    bytes: Count
    sha256: Digest


class FeatureManifest(Part):
    """`manifest.json`: `files` by split and for the kb, `width` numbers per picture."""

    origin: Origin
    width: Annotated[int, Field(ge=1)]
    files: dict[str, FeatureFile]


@dataclass(frozen=True, slots=True)
class PictureFeatures:
    """Finished features of a data set."""

    folder: Path
    manifest: FeatureManifest

    def file(self, part: str) -> Path:
        """The checked table of a split or of the kb. Raises UserError when it is missing or damaged."""
        path, expected = features_file(self.folder, part), self.manifest.files[part]
        again = "delete the folder, or have 'dsmip features' make it again"
        if not path.is_file():
            raise UserError(f"{path}: the features are missing; {again}")
        if path.stat().st_size != expected.bytes or sha256_file(path) != expected.sha256:
            raise UserError(f"{path}: the features are damaged (not the manifest's SHA-256); {again}")
        return path


def features_folder(dataset: Dataset, origin: Origin) -> Path:
    return dataset.folder / "features" / origin.folder_name


def features_file(folder: Path, part: str) -> Path:
    return folder / f"{part}.safetensors"


def network_hash(identity: Identity) -> str:
    """Hex digest of a network."""
    return fingerprint(identity.tensors, identity.form, identity.mean, identity.std, identity.side)


def read_features(folder: Path) -> PictureFeatures | None:
    """Finished features, None where none are finished. Raises UserError for a damaged manifest."""
    path = folder / _MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = FeatureManifest.model_validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise UserError(f"{path}: {where}: {first['msg']}; delete the folder and run 'dsmip features' again") from error
    if set(manifest.files) != set(PARTS):
        raise UserError(f"{path}: files must be {', '.join(PARTS)}; delete the folder and run 'dsmip features' again")
    return PictureFeatures(folder, manifest)


def find_features(dataset: Dataset, kind: Kind, size: int, dtype: DTypeName) -> Iterator[PictureFeatures]:
    """Finished features of this very data, by any weights."""
    for folder in sorted((dataset.folder / "features").glob(f"{kind}-*-{size}px-{dtype}")):
        found = read_features(folder)
        if found and found.manifest.origin.data.sha256 == dataset.manifest_hash:
            yield found


def write_manifest(folder: Path, origin: Origin) -> PictureFeatures:
    """Says that the tables in `folder` are finished: the last file of all."""
    files, width = {}, 0
    for part in PARTS:
        path = features_file(folder, part)
        table = Table.load(path)
        width = table.dense("picture").shape[1]
        with_image = int(table.dense("has_image").sum())
        files[part] = FeatureFile(
            items=len(table), with_image=with_image, bytes=path.stat().st_size, sha256=sha256_file(path)
        )
    manifest = FeatureManifest(origin=origin, width=width, files=files)
    write_json(folder / _MANIFEST, manifest.model_dump(mode="json"))
    return PictureFeatures(folder, manifest)


def forget(folder: Path) -> None:
    """Takes back that features are finished, before their tables are written anew."""
    (folder / _MANIFEST).unlink(missing_ok=True)


@torch.no_grad()
def picture_rows(
    network: PictureNetwork,
    dataset: Dataset,
    part: str,
    rows: range,
    pictures: PictureCollator,
    dtype: DTypeName,
    device: torch.device,
) -> Table:
    """The features of some rows of a split or of the kb, on the CPU."""
    items = list(dataset.entities(rows)) if part == KB else list(dataset.mentions(part, rows))
    pixels, has_image = pictures(items)
    vectors = picture_vectors(network, pixels.to(device), has_image.to(device)).cpu()
    return Table({"picture": vectors.to(DTYPES[dtype]), "has_image": has_image})
