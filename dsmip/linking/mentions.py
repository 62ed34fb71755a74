"""Mentions as users give them: checked, cleaned as `dsmip prepare` does it, their pictures prepared likewise."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from dsmip.data.image_preparation import UnusableImage, prepare_image
from dsmip.data.manifest import MAX_FILE_BYTES, ImageSettings
from dsmip.data.records import MAX_TEXT, Mention, is_text, without_control
from dsmip.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

ImageInput = Union[str, Path, bytes, Image.Image, "NDArray[np.uint8]", None]
"""A picture: a file's path, an encoded picture, a Pillow one, uint8 [H, W, 3] (or [H, W] grey, [H, W, 4]), or none."""
ImageFolder = Path | Callable[[str], bytes] | None
"""Where names of pictures start: a folder (None: the present one), or what reads them and says why it cannot."""
MENTION_FIELDS = ("mention_id", "word", "sentence", "image", "desc")
_TABLE_ROWS = 256  # of a table that are Python objects at a time


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record of a file that is no mention at all, such as a line that is no JSON."""

    reason: str


class MentionReader:
    """Makes mentions of what users give.

    Args:
        settings: how the data set's pictures were prepared.
        folder: where relative paths of pictures start.
    """

    def __init__(self, settings: ImageSettings, folder: ImageFolder = None) -> None:
        self._images = ImageReader(settings, folder)

    def read(self, given: Mapping[str, Any] | Mention | Unreadable) -> Mention:
        """A mention to link.

        Args:
            given: word, sentence, image, and if wanted mention_id and desc (a description, see `dsmip enhance`);
                other keys do not count. Or a prepared mention.

        Raises:
            UserError: no word, texts that are none, or a picture that cannot be read; the message names the field.
        """
        if isinstance(given, Unreadable):
            raise UserError(given.reason)
        if isinstance(given, Mention):
            given = {name: getattr(given, name) for name in MENTION_FIELDS}
        if not isinstance(given, Mapping):
            raise UserError(f"a mention is a dict with word and sentence, or a dsmip.Mention; got {kind_of(given)}")
        texts = {name: given_text(name, given.get(name)) for name in ("mention_id", "word", "sentence", "desc")}
        if not texts["word"]:
            raise UserError("word: empty; a mention needs the word that is to be linked")
        mention = Mention(texts["mention_id"], texts["word"], texts["sentence"], "", -1, desc=texts["desc"])
        return replace(mention, image=self._images.read(given.get("image")))


class ImageReader:
    """Makes prepared pictures (JPEG bytes) of what users give.

    Args:
        settings: How the data set's pictures were prepared.
        folder: Where relative paths start; None: the present folder.
        field: What the pictures are called where users give them, for messages.
    """

    def __init__(self, settings: ImageSettings, folder: ImageFolder = None, field: str = "image") -> None:
        self._settings, self._folder, self._field = settings, folder, field

    def read(self, given: Any) -> bytes | None:
        """A prepared picture; None where there is none.

        Raises:
            UserError: It cannot be read.
        """
        if given is None or _is_missing(given) or (isinstance(given, str) and not given.strip()):
            return None
        content = self._encoded(given)
        try:
            return prepare_image(content, self._settings)
        except UnusableImage as error:
            raise UserError(f"{self._field}{_named(given)}: {error}") from None

    def _encoded(self, given: Any) -> bytes:
        if isinstance(given, bytes | bytearray | memoryview):
            return bytes(given)
        if isinstance(given, str | Path):
            return self._file(given)
        if isinstance(given, Image.Image):
            return _as_png(given)
        if isinstance(given, np.ndarray):
            return _as_png(_of_array(given, self._field))
        raise UserError(f"{self._field}: {kind_of(given)}; give a path, bytes, a Pillow image, a uint8 array, or None")

    def _file(self, given: str | Path) -> bytes:
        if callable(self._folder):
            try:
                return self._folder(str(given))
            except UserError as error:
                raise UserError(f"{self._field} {given}: {error}") from None
        if "://" in str(given):
            raise UserError(f"{self._field} {given}: no address is fetched; give a file or the picture's bytes")
        path = Path(given) if self._folder is None else self._folder / given
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise UserError(f"{self._field} {given}: picture too large")
            return path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{self._field} {given}: no such file") from None
        except (OSError, ValueError) as error:  # a NUL in a name
            raise UserError(f"{self._field} {given}: {getattr(error, 'strerror', None) or error}") from None


def records(mentions: Iterable[Any]) -> Iterator[Any]:
    """One by one: of an Arrow table or batches, a pandas frame, or what can be iterated.

    Raises:
        UserError: it is a single mention, or nothing to iterate.
    """
    if isinstance(mentions, Mention | Mapping | str | bytes):
        raise UserError(f"mentions: {kind_of(mentions)}; give a list, or link one by link()")
    if hasattr(mentions, "to_batches"):
        for batch in mentions.to_batches(max_chunksize=_TABLE_ROWS):
            yield from batch.to_pylist()
    elif hasattr(mentions, "iterrows") and hasattr(mentions, "columns"):  # pandas, which need not be installed
        for start in range(0, len(mentions), _TABLE_ROWS):  # type: ignore[arg-type]
            for record in mentions.iloc[start : start + _TABLE_ROWS].to_dict("records"):  # type: ignore[attr-defined]
                yield {name: None if _is_missing(value) else value for name, value in record.items()}
    elif isinstance(mentions, Iterable):
        for item in mentions:
            yield from item.to_pylist() if isinstance(item, pa.RecordBatch) else [item]
    else:
        raise UserError(f"mentions: {kind_of(mentions)}; give a list of dicts, dsmip.Mention, or a table")


def given_text(name: str, value: Any) -> str:
    """A text of a record, cleaned; an id may be a number."""
    if value is None:
        return ""
    if name.endswith("_id") and isinstance(value, int):
        value = str(value)
    if not isinstance(value, str):
        raise UserError(f"{name}: {kind_of(value)} is no text")
    if not is_text(value):
        raise UserError(f"{name}: broken text (lone surrogates)")
    return without_control(value)[:MAX_TEXT].strip()


def _is_missing(value: Any) -> bool:
    """Whether pandas has an empty cell there."""
    return isinstance(value, float) and value != value


def _as_png(image: Image.Image) -> bytes:
    buffer, image = io.BytesIO(), ImageOps.exif_transpose(image)
    try:
        image.save(buffer, "PNG", compress_level=1)
    except (OSError, ValueError):  # a mode that PNG has not
        image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _of_array(array: "NDArray[Any]", field: str) -> Image.Image:
    fits = array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)))
    if not fits or not array.size:
        raise UserError(f"{field}: an array {array.dtype} {list(array.shape)}; give uint8 [H, W, 3]")
    return Image.fromarray(array)


def _named(given: Any) -> str:
    return f" {given}" if isinstance(given, str | Path) else ""


def kind_of(value: Any) -> str:
    """What a value is, for messages."""
    return f"a value of type {type(value).__name__}"
