"""The systems under the contract of `dsmip.models.base`: every one, every part and the whole, every kind of encoder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch

from dsmip.config import ExperimentConfig
from dsmip.data.collate import ItemBatch
from dsmip.data.table import Table
from dsmip.encoders.architecture import resolve_architecture
from dsmip.encoders.clip import Backbone
from dsmip.encoders.feature_cache import whole_features
from dsmip.models import systems
from dsmip.models.base import System
from dsmip.runs.load_config import parse_config
from dsmip.runs.weights import own_weights
from dsmip.units.matcher import Matcher, Part, Scores
from tests.support.encoders.items import Form, Sample, filled
from tests.support.encoders.small_backbones import SMALL_BACKBONES
from tests.support.scoring.small_systems import BERTS_VOCABULARY, form_with

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
NUM_MENTIONS, NUM_ENTITIES = 7, 11
_CLIPS = Form(start=49406, end=49407, words=range(1, 49000), longest=20, places=50, image_size=16)
_BERTS = Form(start=2, end=3, words=range(4, 150), longest=11, places=22, image_size=16)
DEEP = "deep ViT"
"""The kind of `BACKBONE`, which every form of every system is tested with; other kinds have one form."""
OTHER_KINDS = [kind for kind in SMALL_BACKBONES if kind != "open_clip ViT"]
_DEEP_SAMPLE = _CLIPS.sample(NUM_MENTIONS, NUM_ENTITIES)
MENTIONS, ENTITIES = _DEEP_SAMPLE.mentions, _DEEP_SAMPLE.entities

Encode = Callable[[ItemBatch], Table]


@dataclass(frozen=True)
class Subject:
    """A matcher under test, and how its features are made from raw items.

    Attributes:
        sample: Items that its encoders can read.
        kind: Of these.
        image_token_columns: Of its features, as their encoders declare them.
        rebuild: Makes the same with fresh weights.
    """

    matcher: Matcher
    sample: Sample
    encode_mentions: Encode
    encode_entities: Encode
    image_token_columns: Sequence[str]
    rebuild: Callable[[], "Subject"]
    kind: str = DEEP
    draws_noise: bool = False

    def encode(self, mentions: ItemBatch, entities: ItemBatch) -> tuple[Table, Table]:
        return self.encode_mentions(mentions), self.encode_entities(entities)

    def score(self, mentions: Table, entities: Table) -> Scores:
        """From features."""
        return self.matcher.score(self.matcher.prepare_mentions(mentions), self.matcher.prepare_entities(entities))


@dataclass(frozen=True)
class Case:
    """A part of a system, or the whole of it (None), with a kind of encoder."""

    name: str
    form: dict[str, Any]
    kind: str
    part: str | None

    def subject(self, architecture: str) -> Subject:
        tree = {"model": self.name, "backbone": {"architecture": architecture}, "system": self.form}
        system, config, sample = systems()[self.name], parse_config(tree), sample_of(self.kind, architecture)
        if self.part is None:
            return replace(_whole(system, config, sample), kind=self.kind)
        return replace(_part_of(system, self.part, config, sample), kind=self.kind)


def cases() -> Iterator[Any]:
    """The quick ones are each system's first form with `DEEP`; a whole of one part is that part without towers.

    With the other kinds of encoders that is not tested again, and neither is what only depends on prepared tables.
    """
    for name, system in systems().items():
        for number, form in enumerate(FORMS.get(name, [{}])):
            for part in _matchers(name, form):
                slow = number > 0 or (part is None and not system.gated)
                yield _param(Case(name, form, DEEP, part), f"{name}{number}-{part or 'whole'}", slow=slow)
        for kind in OTHER_KINDS:
            if (small := form_with(name, kind)) is not None:
                for part in _matchers(name, small):
                    if part is not None or system.gated:
                        yield _param(Case(name, small, kind, part), f"{name}-{kind}-{part or 'whole'}", slow=True)


def _param(case: Case, name: str, *, slow: bool) -> Any:
    return pytest.param(case, id=name, marks=[pytest.mark.slow] if slow else [])


def _matchers(name: str, form: dict[str, Any]) -> list[str | None]:
    """The parts that are no re-rankers, and None for the whole."""
    system = systems()[name]
    section = parse_config({"model": name, "backbone": {"architecture": "tiny"}, "system": form}).system
    return [*(part for part in system.part_names(section) if part not in system.rerankers(section)), None]


def sample_of(kind: str, architecture: str) -> Sample:
    if kind == DEEP:
        return _DEEP_SAMPLE
    form, side = _BERTS if kind in BERTS_VOCABULARY else _CLIPS, resolve_architecture(architecture).image_size
    return replace(form, longest=_BERTS.longest, places=_BERTS.places, image_size=side).sample(
        NUM_MENTIONS, NUM_ENTITIES
    )


on_meta = cache(partial(Backbone.build, pretrained=None, device="meta"))


def reader(system: type[System], part: str, config: ExperimentConfig) -> Callable[[ItemBatch], ItemBatch]:
    """What a collator does for a tower that reads padding: it fills all places but those of prompts."""
    backbone = on_meta(config.backbone.architecture)
    room = backbone.context_length - system.item_format(config.system, part).reserve
    return (lambda batch: filled(batch, room)) if backbone.text.reads_padding else (lambda batch: batch)


def _part_of(system: type[System], part: str, config: ExperimentConfig, sample: Sample) -> Subject:
    matcher, read = system.build_part(part, config, with_encoder=True), reader(system, part, config)
    sample = replace(sample, mentions=read(sample.mentions), entities=read(sample.entities))
    return Subject(
        matcher,
        sample,
        lambda batch: matcher.encode_mentions(read(batch)),
        lambda batch: matcher.encode_entities(read(batch)),
        matcher.image_token_columns(),
        rebuild=lambda: _part_of(system, part, config, sample),
    )


def _whole(system: type[System], config: ExperimentConfig, sample: Sample) -> Subject:
    """A gated system scores its parts' features side by side; any other is its one part without towers."""
    names = system.feature_parts(config.system)
    encoders = {name: system.build_encoder(name, config) for name in names}
    readers = {name: reader(system, name, config) for name in names}

    def encode(batch: ItemBatch, method: str) -> Table:
        tables = {name: getattr(encoder, method)(readers[name](batch)) for name, encoder in encoders.items()}
        return whole_features(tables, names) if system.gated else tables[names[0]]

    image_token_columns = [
        f"{name}.{column}" if system.gated else column
        for name, encoder in encoders.items()
        for column in encoder.image_token_columns()
    ]

    def build() -> Subject:
        return Subject(
            system.build_whole(config),
            sample,
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


def assert_equal_bits(actual: Scores, expected: Scores) -> None:
    assert torch.equal(actual.total_ME, expected.total_ME)
    assert actual.parts.keys() == expected.parts.keys()
    assert all(torch.equal(actual.parts[name], expected.parts[name]) for name in expected.parts)
    if expected.chosen_ME is not None:
        assert actual.chosen_ME is not None
        assert torch.equal(actual.chosen_ME, expected.chosen_ME)


def spread(scores: Scores) -> float:
    """By how much scores of an item differ, of the item for which they differ least."""
    return min(float(scores.total_ME.std(dim=axis).min()) for axis in (0, 1))


def tolerance(scores: Scores) -> dict[str, float]:
    """Scores are sums over tens of channels: float32 in another order of summation, and far less than their spread."""
    return {"atol": min(1e-3, spread(scores) / 10), "rtol": 1e-5}


def assert_close(actual: Scores, expected: Scores, within: Mapping[str, float] | None = None) -> None:
    """Within the tolerance of `expected`, unless that is a cut-out of more."""
    limits: Mapping[str, Any] = tolerance(expected) if within is None else within
    for name, value in expected.parts.items():
        torch.testing.assert_close(actual.parts[name], value, **limits)
    if expected.chosen_ME is not None:
        assert actual.chosen_ME is not None
        assert torch.equal(actual.chosen_ME, expected.chosen_ME)
    torch.testing.assert_close(actual.total_ME, expected.total_ME, **limits)
