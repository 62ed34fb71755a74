"""Batches from records: what a part reads is there, the rest is empty."""

import io

import pytest
import torch
from PIL import Image

from dsmip.data.collate import Collator, ItemFormat
from dsmip.data.images import decode, fit
from dsmip.data.records import Entity, Mention
from dsmip.data.text import Template, Tokenizer
from dsmip.encoders.architecture import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer("tiny")


def _image_bytes(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (90, 70), colour).save(stream, "JPEG")
    return stream.getvalue()


def _mention(word: str, image: bytes | None) -> Mention:
    return Mention("m", word, "in a sentence", "E1", 0, {"kind": "easy"}, image)


def test_mentions_become_texts_and_pictures(tokenizer: Tokenizer) -> None:
    image = _image_bytes("red")
    batch = Collator(tokenizer, ItemFormat(Template()), 32).mentions(
        [_mention("one", None), _mention("two words", image)]
    )
    assert batch.has_image.tolist() == [False, True]
    assert torch.equal(batch.token_ids, tokenizer(["one : in a sentence", "two words : in a sentence"]).ids)
    assert not batch.images[0].any()
    assert torch.equal(batch.images[1], fit(decode(image), 32))


def test_an_entity_shows_its_first_picture(tokenizer: Tokenizer) -> None:
    entity = Entity(0, "E1", "name", "attributes", (_image_bytes("red"), _image_bytes("blue")))
    batch = Collator(tokenizer, ItemFormat(Template()), 32).entities([entity])
    assert torch.equal(batch.token_ids, tokenizer(["name : attributes"]).ids)
    assert torch.equal(batch.images[0], fit(decode(entity.images[0]), 32))


def test_an_unreadable_picture_counts_as_missing(tokenizer: Tokenizer) -> None:
    batch = Collator(tokenizer, ItemFormat(Template()), 32).mentions([_mention("one", b"broken")])
    assert batch.has_image.tolist() == [False]


def test_what_is_not_read_is_empty(tokenizer: Tokenizer) -> None:
    mentions = [_mention("one", _image_bytes("red"))]
    text = Collator(tokenizer, ItemFormat(Template(), modalities=("text",)), 32).mentions(mentions)
    image = Collator(tokenizer, ItemFormat(Template(), modalities=("image",)), 32).mentions(mentions)
    assert not text.has_image.any()
    assert image.has_image.all()
    assert torch.equal(image.token_ids, tokenizer([""]).ids)


def test_lengths(tokenizer: Tokenizer) -> None:
    long, short = _mention("word " * 99, None), _mention("one", None)
    reserved = Collator(tokenizer, ItemFormat(Template(), reserve=2), 32).mentions([long])
    fixed = Collator(tokenizer, ItemFormat(Template(), num_tokens=40), 32).mentions([long, short])
    assert reserved.token_ids.shape == (1, tokenizer.context_length - 2)
    assert fixed.token_ids.shape == (2, 40)
    assert fixed.token_mask.sum(dim=1).tolist() == [40, len(tokenizer(["one : in a sentence"]).ids[0])]
    assert fixed.token_ids[0, -1] == fixed.token_ids[1].max()  # both keep their end-of-text
