"""Texts of items: templates over a record's fields, and tokenizers (CLIP's byte pairs, Hugging Face's)."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from string import Formatter
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, field_validator
from torch import Tensor

from dsmip.data.records import Entity, Mention
from dsmip.errors import UserError, first_line

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

_KEPT_TEXTS = 1 << 17  # training reads the same texts every epoch
_SHORTEST = 3  # start of text, a token, end of text


class Template(BaseModel):
    """How a mention and an entity become one line of text (DSMIP eq. 2).

    Each is a format string that may name its record's fields only: word and sentence, what stands left and right of the
    word in its sentence, and (of enhanced data) desc; name and attributes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mention: str = "{word} : {sentence}"
    entity: str = "{name} : {attributes}"

    @property
    def reads_desc(self) -> bool:
        """Whether a mention's line has its description."""
        return "desc" in _fields(self.mention)

    @property
    def has_words(self) -> bool:
        """Whether the lines have the mention's word and the entity's name."""
        return "word" in _fields(self.mention) and "name" in _fields(self.entity)

    @field_validator("mention")
    @classmethod
    def _check_mention(cls, value: str) -> str:
        return _checked(value, {"word", "sentence", "left", "right", "desc"})

    @field_validator("entity")
    @classmethod
    def _check_entity(cls, value: str) -> str:
        return _checked(value, {"name", "attributes"})


def _fields(template: str) -> set[str | None]:
    return {name for _, name, _, _ in Formatter().parse(template)}


def _checked(template: str, allowed: set[str]) -> str:
    names = "{" + "}, {".join(sorted(allowed)) + "}"
    try:
        fields = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; write braces as {{{{ and }}}}") from None
    used = [(name, spec, conversion) for _, name, spec, conversion in fields if name is not None]
    if not used:
        raise ValueError(f"template {template!r} uses no field; it may use {names}")
    for name, spec, conversion in used:
        if name not in allowed or spec or conversion:
            raise ValueError(f"template {template!r}: {{{name}}} is not one of {names}")
    return template


def mention_text(mention: Mention, template: Template, without: Sequence[str] = ()) -> str:
    """The line that stands for a mention.

    Args:
        without: Texts that mean something in the template, and are taken out of what a user wrote.
    """
    return template.mention.format(**_stripped(_mention_fields(mention, template), without))


def entity_text(entity: Entity, template: Template, without: Sequence[str] = ()) -> str:
    """The line that stands for an entity; `without` as in `mention_text`."""
    return template.entity.format(**_stripped(_entity_fields(entity), without))


def before_word(item: Mention | Entity, template: Template, without: Sequence[str] = ()) -> tuple[str, str]:
    """What of an item's line stands before its word or name, and the same with it."""
    if isinstance(item, Entity):
        line, key, fields = template.entity, "name", _entity_fields(item)
    else:
        line, key, fields = template.mention, "word", _mention_fields(item, template)
    fields, before = _stripped(fields, without), ""
    for literal, field, _, _ in Formatter().parse(line):
        before += literal
        if field == key:
            break
        before += fields[field] if field else ""
    return before, before + fields[key]


def _mention_fields(mention: Mention, template: Template) -> Mapping[str, str]:
    beside = any(name in template.mention for name in ("{left}", "{right}"))
    left, right = beside_word(mention.word, mention.sentence) if beside else ("", "")
    return {"word": mention.word, "sentence": mention.sentence, "left": left, "right": right, "desc": mention.desc}


def _entity_fields(entity: Entity) -> Mapping[str, str]:
    return {"name": entity.name, "attributes": entity.attributes}


def beside_word(word: str, sentence: str) -> tuple[str, str]:
    """What stands left and right of a word where it first stands in its sentence, as a word of its own if it does.

    Of a sentence without the word all is on the right.

    >>> beside_word("Java", "JavaScript is not Java, nor java.")
    ('JavaScript is not', ', nor java.')
    >>> beside_word("Paris", "The capital of France.")
    ('', 'The capital of France.')
    """
    found = word and (
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", sentence, re.IGNORECASE)
        or re.search(re.escape(word), sentence, re.IGNORECASE)
    )
    if not found:
        return "", sentence.strip()
    return sentence[: found.start()].strip(), sentence[found.end() :].strip()


def _stripped(fields: Mapping[str, str], without: Sequence[str]) -> Mapping[str, str]:
    if not any(text in value for text in without for value in fields.values()):
        return fields
    pattern = re.compile("|".join(map(re.escape, without)))
    return {name: pattern.sub(" ", value) for name, value in fields.items()}


class Tokens(NamedTuple):
    """Tokens of N texts, at most L of each.

    Attributes:
        ids: int64 [N, L], the tokenizer's padding behind each text.
        mask: bool [N, L], False at padding.
    """

    ids: Tensor
    mask: Tensor


class Tokenizer(ABC):
    """Texts as a text tower reads them.

    Attributes:
        context_length: Places of the text tower.
        pad_id: What stands behind a text.
        mask_id: The token that hides another one, such as [MASK]; None: the vocabulary has none.
        fills_context: Every text is padded to all places that it may take, for towers that read padding; else a batch
            is as long as its longest text.
    """

    context_length: int
    pad_id: int = 0
    mask_id: int | None = None
    fills_context: bool = False

    def __call__(self, texts: Sequence[str], reserve: int = 0) -> Tokens:
        """Tokens of texts; one that is too long is cut at its end and keeps the token that ends a text.

        Args:
            reserve: Places to leave free for prompts.

        Raises:
            ValueError: `reserve` leaves no room for one token between start and end.
        """
        limit = self.context_length - reserve
        if reserve < 0 or limit < _SHORTEST:
            raise ValueError(f"reserve {reserve} does not fit the context length {self.context_length}")
        rows = [self._cut(text, limit) for text in texts]
        length = limit if self.fills_context else max(map(len, rows), default=2)
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        for row, own in enumerate(rows):
            ids[row, : len(own)] = torch.tensor(own)
        length_N1 = torch.tensor([len(own) for own in rows], dtype=torch.int64).view(-1, 1)
        return Tokens(ids, torch.arange(length) < length_N1)

    @property
    @abstractmethod
    def num_ids(self) -> int:
        """One more than its highest id: a tower embeds at least so many."""

    @abstractmethod
    def num_positions(self, text: str) -> int:
        """Places that a text takes before it is cut, its first and last token included."""

    @abstractmethod
    def _cut(self, text: str, limit: int) -> Sequence[int]:
        """Ids of a text with its first and last token, at most `limit` of them."""


class ClipTokenizer(Tokenizer):
    """CLIP's byte-pair tokenizer: start-of-text, tokens, end-of-text, zeros.

    Args:
        context_length: Places of the text tower.
        options: Of open_clip's `SimpleTokenizer`, such as how texts are cleaned.
        fills_context: See `Tokenizer`.
    """

    def __init__(
        self, context_length: int, options: Mapping[str, Any] = MappingProxyType({}), *, fills_context: bool = False
    ) -> None:
        self.context_length, self.fills_context = context_length, fills_context
        self._encode = lru_cache(maxsize=_KEPT_TEXTS)(self._encode_anew)
        self._bpe = _byte_pairs(json.dumps(dict(options), sort_keys=True))
        self._start: int = self._bpe.sot_token_id
        self._end: int = self._bpe.eot_token_id

    @property
    def num_ids(self) -> int:
        return self._end + 1

    def num_positions(self, text: str) -> int:
        return len(self._encode(text)) + 2

    def _cut(self, text: str, limit: int) -> Sequence[int]:
        return [self._start, *self._encode(text)[: limit - 2], self._end]

    def _encode_anew(self, text: str) -> list[int]:
        # The vocabulary's two special tokens may be written out in a text; there they mean nothing.
        return [token for token in self._bpe.encode(text) if token < self._start]


@cache
def _byte_pairs(options: str) -> "SimpleTokenizer":
    """CLIP's vocabulary: reading it takes a tenth of a second, and each expert of a system has a tokenizer."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(**json.loads(options))


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face library, as open_clip's `HFTokenizer` uses it.

    Args:
        name: Of the hub, or a folder.
        context_length: Places of the text tower.
        clean: How open_clip cleans a text first.
        strip_sep_token: Separators become zeros and count as padding (CLIPA's towers).
        fills_context: See `Tokenizer`.
        markers: Tokens of its vocabulary that a text may write out.

    Raises:
        UserError: It cannot be had, or knows no words, no padding or not each of the markers.
    """

    def __init__(
        self,
        name: str,
        context_length: int,
        *,
        clean: str = "whitespace",
        strip_sep_token: bool = False,
        fills_context: bool = False,
        markers: Sequence[str] = (),
    ) -> None:
        from open_clip.tokenizer import get_clean_fn
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # tokenizers raises a bare Exception of a file that is none
            raise UserError(
                f"tokenizer {name} cannot be had ({first_line(error)}); without internet give a folder that holds it"
            ) from None
        vocabulary = self._tokenizer.get_vocab()
        if vocabulary.keys() <= set(self._tokenizer.all_special_tokens):  # what the library makes of a missing file
            raise UserError(
                f"tokenizer {name} knows no words: its files are missing or empty; a text tower's folder holds "
                "tokenizer.json, or what the network's own tokenizer has (vocab.txt, spiece.model ...)"
            )
        if self._tokenizer.pad_token_id is None:
            raise UserError(f"tokenizer {name} has no padding token, which texts of different length need")
        if missing := [token for token in markers if token not in vocabulary]:
            raise UserError(
                f"tokenizer {name} has no token {', '.join(missing)}, by which the system's template marks things; "
                "take a text tower of BERT's vocabulary, or a template of tokens that it has"
            )
        self._tokenizer.add_tokens(list(markers), special_tokens=True)  # as one token each; the vocabulary stays
        self._tokenizer.truncation_side = "right"
        self.context_length, self.fills_context = context_length, fills_context
        self.pad_id = 0 if strip_sep_token else int(self._tokenizer.pad_token_id)
        self.mask_id = self._tokenizer.mask_token_id
        self._separator = self._tokenizer.sep_token_id if strip_sep_token else None
        self._clean = get_clean_fn(clean)
        self._num_ids = max(vocabulary.values()) + 1
        self._lock = Lock()  # where texts are cut is a state of the library's tokenizer
        self._encode = lru_cache(maxsize=_KEPT_TEXTS)(self._encode_anew)

    def save(self, folder: Path) -> None:
        """Writes its files, of which one by the folder's name reads texts alike."""
        self._tokenizer.save_pretrained(folder)

    @property
    def num_ids(self) -> int:
        return self._num_ids

    def num_positions(self, text: str) -> int:
        return len(self._encode(text, None))

    def _cut(self, text: str, limit: int) -> Sequence[int]:
        return self._encode(text, limit)

    def _encode_anew(self, text: str, limit: int | None) -> Sequence[int]:
        with self._lock:
            found = self._tokenizer(self._clean(text), truncation=limit is not None, max_length=limit)
        ids: list[int] = found.input_ids
        return ids[:-1] if self._separator is not None and ids[-1] == self._separator else ids
