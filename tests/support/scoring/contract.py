"""The systems under the contract of `dsmip.models.base`: every registered one, every part of it and the whole."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from dsmip.config import ExperimentConfig
from dsmip.data.collate import ItemBatch
from dsmip.data.table import Table
from dsmip.encoders.feature_cache import whole_features
from dsmip.models import systems
from dsmip.models.base import System
from dsmip.runs.load_config import parse_config
from dsmip.runs.weights import own_weights
from dsmip.units.matcher import Matcher, Part, Scores
from tests.support.tokens import mask_to_end

FORMS: dict[str, list[dict[str, Any]]] = {
    "dsmip": [
        {"gate": {"picture": "clip"}},
        {"gate": {"picture": "clip", "choice": "mention"}},
        {"gate": {"picture": "clip"}, "mask_padding": False},
        {
            "gate": {"picture": "clip", "text": "tower", "mlp": "shared"},
            "experts": {name: {} for name in ("text_image", "image_text", "text", "visual", "multimodal")},
            "use": ["text_image", "image_text", "text", "visual", "multimodal"],
        },
    ],
    "mimic": [{}, {"mask_padding": True}],
    "mmoe": [{}],
    "albef": [{"layers": 1, "heads": 2, "masked_weight": 0.0}],
    "blink": [{"pooling": "tower"}],
    "bert": [{"pooling": "tower"}, {"pooling": "word", "similarity": "cosine"}],
    "dzmned": [{"width": 16}],
    "jmel": [{}, {"hardest": True}],
    "ghmfc": [{"width": 16, "heads": 2}],
    "m3el": [{}, {"cross": "bidirectional", "match_keys": "tokens", "mask_padding": True, "contrast_weight": 0.0}],
}
# Deep enough for every default (nine layers of prompts), and narrow.
BACKBONE = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 9, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 9},
}
CPU = torch.device("cpu")
START, END, IMAGE_SIZE = 49406, 49407, 16
NUM_MENTIONS, NUM_ENTITIES, LONGEST = 7, 11, 20
# Scores are sums over tens of channels with values of order one: float32 in another order of summation.
TOLERANCE: dict[str, Any] = {"atol": 1e-3, "rtol": 1e-5}

Encode = Callable[[ItemBatch], Table]


@dataclass(frozen=True)
class Subject:
    """A matcher under test, and how its features are made from raw items.

    Attributes:
        image_token_columns: Of its features, as their encoders declare them.
        rebuild: Makes the same with fresh weights.
    """

    matcher: Matcher
    encode_mentions: Encode
    encode_entities: Encode
    image_token_columns: Sequence[str]
    rebuild: Callable[[], "Subject"]
    draws_noise: bool = False

    def encode(self, mentions: ItemBatch, entities: ItemBatch) -> tuple[Table, Table]:
        return self.encode_mentions(mentions), self.encode_entities(entities)

    def score(self, mentions: Table, entities: Table) -> Scores:
        """From features."""
        return self.matcher.score(self.matcher.prepare_mentions(mentions), self.matcher.prepare_entities(entities))


def cases() -> Iterator[Any]:
    for name, system in systems().items():
        for number, form in enumerate(FORMS.get(name, [{}])):
            tree = {"model": name, "backbone": {"architecture": "tiny"}, "system": form}
            section = parse_config(tree).system
            matchers = [part for part in system.part_names(section) if part not in system.rerankers(section)]
            for part in (*matchers, None):
                # The quick tests run over each system's first form; the whole of one part is that part without towers.
                slow = [pytest.mark.slow] if number or (part is None and not system.gated) else []
                yield pytest.param((name, form, part), id=f"{name}{number}-{part or 'whole'}", marks=slow)


def part_of(system: type[System], part: str, config: ExperimentConfig) -> Subject:
    matcher = system.build_part(part, config, with_encoder=True)
    return Subject(
        matcher,
        matcher.encode_mentions,
        matcher.encode_entities,
        matcher.image_token_columns(),
        rebuild=lambda: part_of(system, part, config),
    )


def whole(system: type[System], config: ExperimentConfig) -> Subject:
    """A gated system scores its parts' features side by side; any other is its one part without towers."""
    names = system.feature_parts(config.system)
    encoders = {name: system.build_encoder(name, config) for name in names}

    def encode(batch: ItemBatch, method: str) -> Table:
        tables = {name: getattr(encoder, method)(batch) for name, encoder in encoders.items()}
        return whole_features(tables, names) if system.gated else tables[names[0]]

    image_token_columns = [
        f"{name}.{column}" if system.gated else column
        for name, encoder in encoders.items()
        for column in encoder.image_token_columns()
    ]

    def build() -> Subject:
        return Subject(
            system.build_whole(config),
            lambda batch: encode(batch, "encode_mentions"),
            lambda batch: encode(batch, "encode_entities"),
            image_token_columns,
            rebuild=build,
            draws_noise=system.gated,
        )

    return build()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def shake(part: Part) -> None:
    """Norms and biases start at 1 and 0, which would hide mistakes. A frozen tower stays as its configuration says."""
    for tensor in own_weights(part).values():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.randn_like(tensor)


def make_items(count: int, seed: int) -> ItemBatch:
    """Texts of different length, every third item without a picture."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, LONGEST + 1, (count,), generator=generator).tolist()
    token_ids = torch.zeros(count, max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        token_ids[row, 0], token_ids[row, length - 1] = START, END
        token_ids[row, 1 : length - 1] = torch.randint(1, 49000, (length - 2,), generator=generator)
    shape = (count, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    has_image = torch.arange(count) % 3 != 1
    images[~has_image] = 0
    word_ids = token_ids[:, :3].clamp(min=1)  # of systems that read an item's name apart
    extras = {"word_ids": word_ids, "word_mask": torch.ones_like(word_ids, dtype=torch.bool)}
    extras["word_places"] = torch.arange(max(lengths)) == 1  # of those that read where the name stands
    extras["word_places"] = extras["word_places"].expand(count, -1)
    return ItemBatch(token_ids, mask_to_end(token_ids), images, has_image, extras)


def trimmed(batch: ItemBatch) -> ItemBatch:
    """Without columns that are padding in every row."""
    longest = int(batch.token_mask.sum(dim=1).max())
    return replace(batch, token_ids=batch.token_ids[:, :longest], token_mask=batch.token_mask[:, :longest])


def padded(batch: ItemBatch, columns: int) -> ItemBatch:
    """With padding, whose ids mean nothing: the highest one would be taken for an end of text."""
    ids, mask = torch.full((len(batch), columns), END), torch.zeros(len(batch), columns, dtype=torch.bool)
    padded_ids, padded_mask = torch.cat([batch.token_ids, ids], dim=1), torch.cat([batch.token_mask, mask], dim=1)
    return replace(batch, token_ids=padded_ids, token_mask=padded_mask)


MENTIONS, ENTITIES = make_items(NUM_MENTIONS, seed=2), make_items(NUM_ENTITIES, seed=3)


def assert_equal_bits(actual: Scores, expected: Scores) -> None:
    assert torch.equal(actual.total_ME, expected.total_ME)
    assert actual.parts.keys() == expected.parts.keys()
    assert all(torch.equal(actual.parts[name], expected.parts[name]) for name in expected.parts)
    if expected.chosen_ME is not None:
        assert actual.chosen_ME is not None
        assert torch.equal(actual.chosen_ME, expected.chosen_ME)


def assert_close(actual: Scores, expected: Scores) -> None:
    for name, value in expected.parts.items():
        torch.testing.assert_close(actual.parts[name], value, **TOLERANCE)
    if expected.chosen_ME is not None:
        assert actual.chosen_ME is not None
        assert torch.equal(actual.chosen_ME, expected.chosen_ME)
    torch.testing.assert_close(actual.total_ME, expected.total_ME, **TOLERANCE)
