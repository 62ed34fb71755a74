"""Texts of items: templates over a record's fields, and CLIP's byte-pair tokens."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from string import Formatter
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, field_validator
from torch import Tensor

from dsmip.data.records import Entity, Mention

_KEPT_TEXTS = 1 << 17


class Template(BaseModel):
    """How a mention and an entity become one line of text (DSMIP eq. 2).

    Each is a format string that may name its record's fields only: word and sentence, name and attributes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mention: str = "{word} : {sentence}"
    entity: str = "{name} : {attributes}"

    @field_validator("mention")
    @classmethod
    def _check_mention(cls, value: str) -> str:
        return _checked(value, {"word", "sentence"})

    @field_validator("entity")
    @classmethod
    def _check_entity(cls, value: str) -> str:
        return _checked(value, {"name", "attributes"})


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


def mention_text(mention: Mention, template: Template) -> str:
    """The line that stands for a mention."""
    return template.mention.format(word=mention.word, sentence=mention.sentence)


def entity_text(entity: Entity, template: Template) -> str:
    """The line that stands for an entity."""
    return template.entity.format(name=entity.name, attributes=entity.attributes)


class Tokens(NamedTuple):
    """Tokens of N texts, at most L of each.

    Attributes:
        ids: int64 [N, L].
        mask: bool [N, L], False at padding.
    """

    ids: Tensor
    mask: Tensor


class Tokenizer:
    """CLIP's byte-pair tokenizer (the same vocabulary for all backbones that are supported).

    Args:
        context_length: positions of the text tower.
        options: of open_clip's `SimpleTokenizer`, such as how texts are cleaned.
    """

    def __init__(self, context_length: int, options: Mapping[str, Any] = MappingProxyType({})) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.context_length = context_length
        # training reads the same texts every epoch
        self._encode = lru_cache(maxsize=_KEPT_TEXTS)(self._encode_anew)
        self._bpe = SimpleTokenizer(context_length=context_length, **options)
        self.vocab_size: int = self._bpe.vocab_size
        self._start: int = self._bpe.sot_token_id
        self._end: int = self._bpe.eot_token_id

    def __call__(self, texts: Sequence[str], reserve: int = 0) -> Tokens:
        """Start-of-text, tokens, end-of-text, padding (zeros); L is the longest text of the batch.

        A text longer than context_length - reserve is cut at its end; its last token is still end-of-text.

        Args:
            reserve: positions to leave free for prompts.

        Raises:
            ValueError: reserve leaves no room for one token between start and end.
        """
        limit = self.context_length - reserve
        if reserve < 0 or limit < 3:
            raise ValueError(f"reserve {reserve} does not fit the context length {self.context_length}")
        rows = [[self._start, *self._encode(text)[: limit - 2], self._end] for text in texts]
        token_ids = torch.zeros(len(rows), max(map(len, rows), default=2), dtype=torch.int64)
        for row, ids in enumerate(rows):
            token_ids[row, : len(ids)] = torch.tensor(ids)
        length_N1 = torch.tensor([[len(ids)] for ids in rows], dtype=torch.int64).view(-1, 1)
        return Tokens(token_ids, torch.arange(token_ids.shape[1]) < length_N1)

    def num_positions(self, text: str) -> int:
        """Positions that a text takes before it is cut, start and end of text included."""
        return len(self._encode(text)) + 2

    def _encode_anew(self, text: str) -> list[int]:
        # The vocabulary's two special tokens may be written out in a text; there they mean nothing.
        return [token for token in self._bpe.encode(text) if token < self._start]
