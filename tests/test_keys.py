"""Keys of stored results: what they are today is what they stay, or users lose what they have computed.

Digests were taken from the code before its keys were written out. Whoever must change one says so in the release notes.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from dsmip.config import ExperimentConfig, Frozen
from dsmip.data.collate import ItemFormat
from dsmip.data.images import PixelForm
from dsmip.data.text import Template
from dsmip.encoders.feature_keys import feature_key, fingerprint
from dsmip.encoders.image_features import network_hash
from dsmip.encoders.image_networks import NetworkChoice
from dsmip.keys import Plain, key_tree, plain_text
from dsmip.models import find_system
from dsmip.runs.load_config import changed, parse_config
from dsmip.units.expert import ExpertConfig
from ray_jobs.jobs.pretrain import weights_stamp
from ray_jobs.jobs.tune_gate import sweep_key
from ray_jobs.training.trials import draw_trials
from tools.archive_run import write_backbone

WEIGHTS = {"b": torch.ones(2), "a": torch.arange(3.0)}
PLAIN_FORMAT = ItemFormat(Template())
QUOTED_FORMAT = ItemFormat(Template(mention='it\'s {word} \\ "é\u2028" {sentence}'), 3, 40, ("text",))


@pytest.fixture(scope="module")
def config() -> ExperimentConfig:
    return parse_config(
        {
            "model": "dsmip",
            "backbone": {"architecture": "tiny"},
            "system": {
                "experts": {"text": {}, "multimodal": {"prompt_length": 2, "prompt_depth": 3}},
                "use": ["text", "multimodal"],
            },
            "parts": {"text": {"workers": "1..4", "train": {"epochs": 3}}},
            "tune": {
                "trials": 3,
                "space": {
                    "system.gate.temperature": {"loguniform": [0.01, 1.0]},
                    "system.use": {"values": [["text", "multimodal"], ["multimodal", "text"]]},
                    "train.learning_rate": {"uniform": [1e-4, 1e-3]},
                },
            },
            "watch": ["tensorboard"],
        }
    )


@pytest.mark.parametrize(
    ("item_format", "dtype", "digest"),
    [
        (PLAIN_FORMAT, torch.float32, "4ff7d2fcf7f27aa7d311daff9b5527bbbb5c9e7b07059c0f484bd79a51b725b7"),
        (PLAIN_FORMAT, torch.float16, "e13303356a3dfc15589266ec495cbf2a6745cace22abfedbca4b35e531a9b743"),
        (QUOTED_FORMAT, torch.float32, "902adde8968ad7f308d2e98ececd0a08731a398b6dd76a34ed5796a8d205e172"),
        (QUOTED_FORMAT, torch.float16, "b26dbac8149cc5a639b7d4b1faa5667fe1bc3bfed8f027ba15aaf1d50b8b3dad"),
    ],
)
def test_features_are_keyed_as_ever(item_format: ItemFormat, dtype: torch.dtype, digest: str) -> None:
    assert feature_key(WEIGHTS, "abc", item_format, "kb", dtype) == digest


def test_every_field_of_an_item_format_is_in_the_key_of_features() -> None:
    other: Mapping[str, Any] = {
        "template": Template(mention="{word}"),
        "reserve": 1,
        "num_tokens": 12,
        "modalities": ("image",),
        "pixels": PixelForm(resize="squash"),
        "markers": ("[SEP]",),
        "word_places": True,
        "texts": (("word", Template()),),
        "entity_modalities": ("image",),
    }
    formats = [replace(PLAIN_FORMAT, **{field.name: other[field.name]}) for field in fields(ItemFormat)]
    formats += [replace(PLAIN_FORMAT, template=Template(entity="{name}")), PLAIN_FORMAT]
    assert set(Template.model_fields) == {"mention", "entity"}
    assert len({feature_key(WEIGHTS, "abc", each, "kb", torch.float32) for each in formats}) == len(formats)


@pytest.mark.parametrize(
    ("model", "one", "other"),
    [
        ("dsmip", {}, {"mask_padding": False}),
        ("mimic", {"num_tokens": 9}, {"num_tokens": 9, "mask_padding": True}),
        ("clip", {"image_weight": 0.25}, {"image_weight": 0.5}),
        ("bert", {"pooling": "first"}, {"pooling": "tower"}),
        ("bert", {"pooling": "tower"}, {"pooling": "word"}),
        ("blink", {"pooling": "first"}, {"pooling": "tower"}),
    ],
)
def test_settings_that_change_features_change_what_they_are_keyed_by(
    narrow_backbone: Path, model: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    """No tensor of a tower and no item format says them."""

    def key(section: dict[str, Any]) -> str:
        tree = {"model": model, "backbone": {"architecture": str(narrow_backbone)}, "system": section}
        config = parse_config(tree)
        part = find_system(model).feature_parts(config.system)[0]
        return fingerprint(find_system(model).build_encoder(part, config).encoder_state(), "()")

    assert key(one) == key(one)
    assert key(one) != key(other)


def test_other_digests_are_as_ever() -> None:
    index: Plain = {"model": "dsmip", "layout": [2, 4096], "data": "x", "weights": "y", "features": ["a", "b"]}
    network = ("vgg16 fc7", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224)
    assert [fingerprint({}, plain_text((index,))), fingerprint(WEIGHTS, plain_text(network))] == [
        "05b4807e99b3687bcc636f6e6a3f540288b3b06a31fb64228248845f92730d79",
        "7b0bf1821738fa02e94be777500afbb510df15b484dab16f9e9a87a2bcc02597",
    ]


def test_the_network_of_picture_features_is_named_as_ever(tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path)
    choice = NetworkChoice("clip", backbone["pretrained"], backbone["architecture"])
    digest = "3948455ddc797216a3614a4dd6f36ba94c9377522b569eb8d7af35717c8f598c"
    assert network_hash(choice.build().identity()) == digest


def test_parts_of_other_settings_are_keyed_as_ever(config: ExperimentConfig) -> None:
    keys = {part: find_system("dsmip").part_key(part, config) for part in ("text", "multimodal", "gate")}
    assert keys["multimodal"] == (
        "({'tune': 'frozen', 'prompt_length': 2, 'prompt_depth': 3}, 96, True, "
        "{'mention': '{word} : {sentence}', 'entity': '{name} : {attributes}'})"
    )
    assert {part: hashlib.sha256(key.encode()).hexdigest()[:16] for part, key in keys.items()} == {
        "text": "f8e3aff72af795c6",
        "multimodal": "f1d128421a26490d",
        "gate": "4383226d1ef5e673",
    }


def test_every_field_of_an_expert_is_in_its_key(config: ExperimentConfig) -> None:
    other: Mapping[str, Any] = {"tune": "full", "prompt_length": 5, "prompt_depth": 5, "prompts_in": "text"}
    changes = [{name: other[name]} for name in ExpertConfig.model_fields]
    configs = [changed(config, {"system": {"experts": {"multimodal": change}}}) for change in changes]
    keys = {find_system("dsmip").part_key("multimodal", each) for each in [config, *configs]}
    assert len(keys) == len(other) + 1


def test_settings_of_the_whole_system_are_in_the_keys_of_what_they_change(config: ExperimentConfig) -> None:
    def keys(system: dict[str, Any]) -> dict[str, str]:
        other = changed(config, {"system": system})
        return {part: find_system("dsmip").part_key(part, other) for part in ("text", "multimodal", "gate")}

    before, squashed = keys({}), keys({"pixels": {"resize": "squash"}})
    assert all(squashed[part] != key for part, key in before.items())
    assert len({key["gate"] for key in (before, squashed, keys({"pixels": {"resize": "squash", "part": 0.9}}))}) == 3
    of_tower = keys({"gate": {"text": "tower"}})
    assert {part for part, key in before.items() if of_tower[part] != key} == {"gate"}


def test_a_sweep_and_pretrained_weights_are_keyed_as_ever(config: ExperimentConfig) -> None:
    trials = draw_trials(config, 5)
    assert [dict(trial.changes) for trial in trials] == [
        {},
        {
            "system.gate.temperature": pytest.approx(0.012554283274605836),
            "system.use": ["multimodal", "text"],
            "train.learning_rate": pytest.approx(0.0006630470638717024),
        },
        {
            "system.gate.temperature": pytest.approx(0.11606350661046295),
            "system.use": ["text", "multimodal"],
            "train.learning_rate": pytest.approx(0.00020516240740622513),
        },
    ]
    assert sweep_key(trials, 5) == "6bc25b485191fb9c053ccd1a9a1bf27b1d38a3925f9a870ec48459da13eaaeb5"
    assert weights_stamp(config, "ab")["sha256"] == "c641ce2cd842481f4fce34b50b9aa8d9bf83c10e2e8b6638b656ced6fbab8331"


def test_plain_text_refuses_what_would_name_a_class() -> None:
    assert plain_text({"a": [1, 0.5, None], "b": ("x", True)}) == "{'a': [1, 0.5, None], 'b': ('x', True)}"
    for value in (Template(), [PLAIN_FORMAT], {"a": torch.float32}, {1, 2}):
        with pytest.raises(TypeError, match="is no plain data"):
            plain_text(value)  # type: ignore[arg-type]


def test_an_added_field_is_left_out_of_keys_while_all_is_as_before() -> None:
    class Inner(Frozen):
        added: ClassVar[Mapping[str, Any]] = {"new": [0.5, 1.0]}
        old: int = 1
        new: tuple[float, float] = (0.5, 1.0)

    class Outer(Frozen):
        added: ClassVar[Mapping[str, Any]] = {"mode": "off"}
        by_name: dict[str, Inner]
        inner: Any
        mode: str = "on"

    before = Outer(by_name={"x": Inner()}, inner=Inner(old=2), mode="off")
    assert key_tree(before) == {"by_name": {"x": {"old": 1}}, "inner": {"old": 2}}
    now = Outer(by_name={"x": Inner(new=(0.5, 2.0))}, inner=Inner())
    assert key_tree(now) == {"by_name": {"x": {"old": 1, "new": [0.5, 2.0]}}, "inner": {"old": 1}, "mode": "on"}
