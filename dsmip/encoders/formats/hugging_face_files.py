"""Files of a Hugging Face text model that are no weights: its configuration and tokenizer, of a folder or the hub."""

import shutil
from functools import cache
from pathlib import Path

from dsmip.errors import UserError, first_line

# In the order of their use: sizes, pooling and places (sentence-transformers), the tokenizers of the library's kinds.
_FILES = (
    "config.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)


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


def copy_model_files(name: str, folder: Path) -> None:
    """Puts a model's configuration and tokenizer into a new folder, which stands for it where no weights are read.

    Raises:
        UserError: As `model_file`.
    """
    for file in _FILES:
        if (source := model_file(name, file, needed=file == _FILES[0])) is not None:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / file)


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
