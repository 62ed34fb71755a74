"""Files of a Hugging Face text model that are no weights: its configuration and tokenizer, of a folder or the hub."""

import shutil
from functools import cache
from pathlib import Path

from dsmip.data.text import HuggingFaceTokenizer
from dsmip.errors import UserError, first_line

# Sizes; how sentence-transformers pools, and how many places it used.
_CONFIGURATION = ("config.json", "1_Pooling/config.json", "sentence_bert_config.json")
_PROBE = "A Jaguar, the 2nd: déjà vu at 10 o'clock (Ünïcode 中文 😀) don't"
_PLACES = 512  # more than the probe takes


def model_file(name: str, file: str, *, needed: bool) -> Path | None:
    """A file of a model; None where it has none and none is needed.

    Args:
        name: A folder, or a model of the hub, which is asked once in a process: that may take half a minute.

    Raises:
        UserError: A needed one is not there, or the hub cannot be reached.
    """
    if Path(name).is_dir():
        if (Path(name) / file).is_file():
            return Path(name) / file
        if needed:
            raise UserError(f"{name} has no {file}: no folder of a Hugging Face model")
        return None
    found = _of_hub(name, file, needed=needed)
    if isinstance(found, Exception):
        raise UserError(f"{name} cannot be had ({first_line(found)}); without internet give a folder")
    return None if found is None else Path(found)


def copy_configuration(name: str, folder: Path) -> None:
    """Puts what a text tower is built by into a folder, which stands for the model where its weights are not read.

    Raises:
        UserError: As `model_file`.
    """
    for file in _CONFIGURATION:
        if (source := model_file(name, file, needed=file == _CONFIGURATION[0])) is not None:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / file)


def save_tokenizer(name: str, folder: Path) -> None:
    """Puts a tokenizer into a folder: one that reads texts alike.

    Raises:
        UserError: It cannot be had, or what was saved reads a text otherwise.
    """
    tokenizer = HuggingFaceTokenizer(name, _PLACES)
    tokenizer.save(folder)
    again = HuggingFaceTokenizer(str(folder), _PLACES)
    if again.num_ids != tokenizer.num_ids or not again([_PROBE]).ids.equal(tokenizer([_PROBE]).ids):
        raise UserError(f"tokenizer {name} cannot be saved: what the library makes of its files reads texts otherwise")


@cache
def _of_hub(name: str, file: str, *, needed: bool) -> str | Exception | None:
    from transformers.utils.hub import cached_file

    try:
        path: str | None = cached_file(
            name, file, _raise_exceptions_for_missing_entries=needed, _raise_exceptions_for_connection_errors=needed
        )
    except (OSError, ValueError) as error:
        return error
    return path
