"""Batches from records: what a part reads is there, the rest is empty."""

import io

import pytest
import torch
from PIL import Image

from dsmip.config import AugmentConfig
from dsmip.data.collate import Collator, ItemFormat, stacked
from dsmip.data.images import decode, fit
from dsmip.data.records import Entity, Mention
from dsmip.data.text import Template, Tokenizer, beside_word, entity_text, mention_text
from dsmip.encoders.architecture import build_tokenizer
from dsmip.ops.augmentation import Draws
from dsmip.training.batches import augmented


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


def test_further_texts_are_extras_and_stay_with_their_items(tokenizer: Tokenizer) -> None:
    form = ItemFormat(Template(), texts=(("word", Template(mention="{word}", entity="{name}")),))
    collator = Collator(tokenizer, form, 32)
    batch = collator.mentions([_mention("one", None), _mention("two words", None)])
    expected = tokenizer(["one", "two words"])
    assert torch.equal(batch.extras["word_ids"], expected.ids)
    assert torch.equal(batch.extras["word_mask"], expected.mask)
    assert torch.equal(batch.rows(1, 2).to(torch.device("cpu")).extras["word_ids"], expected.ids[1:])
    entity = collator.entities([Entity(0, "E1", "a name of four", "attributes")])
    both = stacked(batch, entity)
    assert torch.equal(both.extras["word_ids"][2], tokenizer(["a name of four"]).ids[0])
    assert both.extras["word_mask"].sum(dim=1).tolist() == [3, 4, 6]


@pytest.mark.parametrize(
    ("mention", "word", "sentence", "expected"),
    [
        ("{word} : {sentence}", "two words", "in two words", "two words"),
        ("{left} {word} {right}", "Jaguar", "A red Jaguar crossed the road", "jaguar"),
        ("{left}{word}{right}", "Java", "JavaScript", "javascript"),  # one token with what stands beside it
        ("{sentence} {word}", "gone", "word " * 99, ""),  # cut off
    ],
)
def test_places_of_a_word(mention: str, word: str, sentence: str, expected: str, tokenizer: Tokenizer) -> None:
    form = ItemFormat(Template(mention=mention), word_places=True)
    collator = Collator(tokenizer, form, 32)
    items = [Mention("m", word, sentence, "E1", 0), Mention("n", "a", "a b", "E1", 0)]
    batch = collator.mentions(items)
    places = batch.extras["word_places"]
    assert places.shape == batch.token_ids.shape
    own = tokenizer([expected]).ids[0, 1:-1] if expected else torch.zeros(0, dtype=torch.int64)
    assert torch.equal(batch.token_ids[0][places[0]], own)
    assert collator.mentions([]).extras["word_places"].shape[0] == 0


def test_places_of_a_name_and_what_training_drops(tokenizer: Tokenizer) -> None:
    """A name's tokens that are left are where they are now."""
    form = ItemFormat(Template(entity="{attributes} of {name}"), word_places=True)
    batch = Collator(tokenizer, form, 32).entities(
        [Entity(row, f"E{row}", "red green blue yellow", "a b c d e") for row in range(8)]
    )
    name = set(tokenizer(["red green blue yellow"]).ids[0, 1:-1].tolist())
    draws = Draws(torch.Generator().manual_seed(1), 8)
    changed = augmented(batch, AugmentConfig(drop_tokens=0.5), draws, tokenizer, tokenizer.context_length)
    assert changed.token_ids.shape[1] < batch.token_ids.shape[1]
    for ids, places in zip(changed.token_ids, changed.extras["word_places"], strict=True):
        assert set(ids[places].tolist()) == name & set(ids.tolist())


def test_what_marks_a_template_is_taken_out_of_texts() -> None:
    template = Template(mention="{left} [M] {word} [/M] {right}", entity="{name} [M] {attributes}")
    mention = Mention("m", "Jaguar", "A [M] Jaguar crossed", "E1", 0)
    assert mention_text(mention, template, without=("[M]", "[/M]")) == "A   [M] Jaguar [/M] crossed"
    entity = Entity(0, "E1", "[/M]Jaguar", "a cat")
    assert entity_text(entity, template, without=("[M]", "[/M]")) == " Jaguar [M] a cat"


@pytest.mark.parametrize(
    ("word", "sentence", "left", "right"),
    [
        ("Java", "JavaScript is not java, nor is Java.", "JavaScript is not", ", nor is Java."),
        ("ava", "JavaScript", "J", "Script"),
        ("Paris", " The capital of France. ", "", "The capital of France."),
        ("", "a sentence", "", "a sentence"),
        ("C++ (2020)", "in C++ (2020) one may", "in", "one may"),
    ],
)
def test_what_stands_beside_a_word(word: str, sentence: str, left: str, right: str) -> None:
    assert beside_word(word, sentence) == (left, right)
