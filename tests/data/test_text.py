"""Templates and token rows: what is cut, what is kept, and what a template may say."""

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dsmip.data.records import Entity, Mention
from dsmip.data.text import Template, entity_text, mention_text
from dsmip.encoders.architecture import build_tokenizer
from dsmip.errors import UserError

START, END = 49406, 49407
TOKENIZER = build_tokenizer("tiny")

MENTION = Mention("m1", "Jaguar", "A {fast} jaguar crossed the river.", "Q1", 0)
ENTITY = Entity(0, "Q1", "jaguar", "")


def test_default_templates_are_the_papers() -> None:
    assert mention_text(MENTION, Template()) == "Jaguar : A {fast} jaguar crossed the river."
    assert entity_text(ENTITY, Template()) == "jaguar : "
    assert entity_text(ENTITY, Template(entity="{attributes}{name}{{}}")) == "jaguar{}"


@pytest.mark.parametrize(
    "template",
    ["{word} {qid}", "no field", "{word", "{word!r}", "{word:>10}", "{word.__class__}", "{}", "{0}", "{word[0]}"],
)
def test_wrong_templates_are_refused(template: str) -> None:
    with pytest.raises(ValidationError, match="template"):
        Template(mention=template)


def test_entity_template_has_the_entitys_fields() -> None:
    with pytest.raises(ValidationError, match=r"\{word\} is not one of \{attributes\}, \{name\}"):
        Template(entity="{word}")


def test_rows_are_open_clips_trimmed_to_the_longest() -> None:
    texts = ["a dog", "a photo of two dogs, running!", ""]
    token_ids, mask = TOKENIZER(texts)
    whole = open_clip.tokenize(texts)
    longest = int((whole != 0).sum(dim=1).max())
    assert token_ids.dtype == torch.int64
    assert torch.equal(token_ids, whole[:, :longest])
    assert not whole[:, longest:].any()
    assert torch.equal(mask, whole[:, :longest] != 0)


@pytest.mark.parametrize("reserve", [0, 2, 50])
def test_truncation_keeps_end_of_text(reserve: int) -> None:
    token_ids, _ = TOKENIZER(["word " * 200, "short"], reserve)
    assert token_ids.shape == (2, 77 - reserve)
    assert token_ids[0, 0] == START
    assert token_ids[0, -1] == END
    assert (token_ids == END).sum(dim=1).tolist() == [1, 1]
    assert torch.equal(token_ids[0, :-1], TOKENIZER(["word " * 200]).ids[0, : 76 - reserve])


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=40), max_size=4), reserve=st.integers(0, 74))
def test_every_row_is_start_words_end_zeros(texts: list[str], reserve: int) -> None:
    token_ids, mask = TOKENIZER(texts, reserve)
    assert token_ids.shape[0] == len(texts)
    assert token_ids.shape[1] <= 77 - reserve
    for row, real in zip(token_ids.tolist(), mask.tolist(), strict=True):
        end = row.index(END)
        assert real == [place <= end for place in range(len(row))]
        assert row[0] == START
        assert not any(row[end + 1 :])
        assert all(token < START for token in row[1:end])
    if texts:
        # The batch does not change a row.
        alone = TOKENIZER(texts[:1], reserve).ids[0]
        assert torch.equal(token_ids[0, : len(alone)], alone)


def test_special_tokens_written_in_a_text_mean_nothing() -> None:
    assert torch.equal(TOKENIZER(["a <end_of_text> dog <start_of_text>"]).ids, TOKENIZER(["a dog"]).ids)


def test_tokenizers_of_all_supported_names_agree() -> None:
    other = build_tokenizer("ViT-B-32")
    assert other.context_length == TOKENIZER.context_length == 77
    assert torch.equal(other(["a dog"]).ids, TOKENIZER(["a dog"]).ids)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="tinny"):
        build_tokenizer("tinny")
    with pytest.raises(ValueError, match="reserve 75"):
        TOKENIZER(["a"], 75)
