"""Configurations: what is shipped, what is refused and what the refusal says."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dsmip.config import ExperimentConfig, TrainConfig, Workers, merged
from dsmip.errors import UserError
from dsmip.runs.load_config import job_config, load_config, parse_config, shadowed, shipped_configs, to_yaml

MINIMAL: dict[str, Any] = {
    "model": "dsmip",
    "backbone": {"architecture": "tiny"},
    "system": {"gate": {"picture": "clip"}},
}


def written(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refused(tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(tree)
    return str(caught.value)


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configurations_load_and_survive_a_round_trip(tmp_path: Path, name: str) -> None:
    config = load_config(name)
    again = load_config(written(tmp_path, to_yaml(config)))
    assert again == config
    assert type(again.system) is type(config.system)
    for part in config.parts:
        assert isinstance(config.train_of(part), TrainConfig)
    assert isinstance(config.tune_train(), TrainConfig)


def test_the_demo_is_shipped() -> None:
    assert {"demo", "emoji"} <= set(shipped_configs())


def test_small_numbers_survive_a_round_trip(tmp_path: Path) -> None:
    """YAML's own notation of 1e-05 would be read back as text."""
    tree = {**MINIMAL, "train": {"learning_rate": 1e-5, "weight_decay": 3e-7}}
    tree["tune"] = {
        "space": {"train.learning_rate": {"loguniform": [1e-6, 1e-3]}, "train.clip_norm": {"values": [1, 2, None]}}
    }
    tree["backbone"] = {"architecture": "tiny", "pretrained": "12e5"}  # text that looks like a number
    config = parse_config(tree)
    assert load_config(written(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize(
    ("change", "key", "nearest"),
    [
        ({"trian": {}}, "trian", "train"),
        ({"train": {"learning_rat": 1}}, "train.learning_rat", "learning_rate"),
        ({"train": {"augment": {"rotate": 3}}}, "train.augment.rotate", "rotation"),
        ({"backbone": {"architecture": "tiny", "pretained": None}}, "backbone.pretained", "pretrained"),
        ({"system": {"gates": {}}}, "system.gates", "gate"),
        ({"system": {"gate": {"temprature": 1}}}, "system.gate.temprature", "temperature"),
        ({"system": {"experts": {"text": {"prompt_lenght": 2}}}}, "system.experts.text.prompt_lenght", "prompt_length"),
        ({"parts": {"text": {"resource": {}}}}, "parts.text.resource", "resources"),
        ({"parts": {"text": {"resources": {"gpus": 1}}}}, "parts.text.resources.gpus", "gpu"),
        ({"parts": {"text": {"train": {"epoch": 3}}}}, "parts.text.train.epoch", "epochs"),
        ({"tune": {"trial": 3}}, "tune.trial", "trials"),
        ({"tune": {"train": {"batchsize": 3}}}, "tune.train.batchsize", "batch_size"),
        ({"tune": {"space": {"seed": {"value": [1]}}}}, "tune.space.seed.value", "values"),
        ({"pretrain": {"epoch": 3}}, "pretrain.epoch", "epochs"),
    ],
)
def test_an_unknown_key_names_the_nearest(change: dict[str, Any], key: str, nearest: str) -> None:
    message = refused({**MINIMAL, **change})
    assert f"unknown key '{key}'" in message
    assert f"did you mean '{nearest}'?" in message


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"train": {"epochs": 0}}, "train.epochs"),
        ({"train": {"batch_size": 1}}, "train.batch_size"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate"),
        ({"train": {"learning_rate": float("inf")}}, "train.learning_rate: Input should be a finite number"),
        ({"tune": {"space": {"train.learning_rate": {"loguniform": [1e-3, float("inf")]}}}}, "a finite number"),
        ({"train": {"precision": "int8"}}, "train.precision"),
        ({"train": {"augment": {"hue": 0.7}}}, "train.augment.hue"),
        ({"train": 5}, "train"),
        ({"train": None}, "train"),
        ({"system": [1]}, "system"),
        ({"system": {"use": ["text"]}}, "system"),
        ({"system": {"use": ["text", "text"]}}, "system"),
        ({"system": {"experts": {"text": {}}, "use": ["text", "visual"]}}, "visual"),
        ({"system": {"experts": {"sound": {}}}}, "system.experts.sound"),
        ({"system": {"experts": {"multimodal": {"prompt_length": -1}}}}, "system.experts.multimodal.prompt_length"),
        ({"system": {"experts": {"multimodal": {"prompt_depth": -1}}}}, "system.experts.multimodal.prompt_depth"),
        ({"system": {"gate": {"temperature": 0}}}, "system.gate.temperature"),
        ({"system": {"template": {"mention": "{wrd}"}}}, "system.template"),
        ({"parts": {"txt": {}}}, "parts.txt"),
        ({"parts": {"text": {"train": {"epochs": -1}}}}, "parts.text.train.epochs"),
        ({"parts": {"text": {"resources": {"cpu": -1}}}}, "parts.text.resources.cpu"),
        ({"tune": {"train": {"patience": 0}}}, "tune.train.patience"),
        ({"tune": {"rungs": [4, 2]}}, "tune"),
        ({"tune": {"rungs": []}}, "tune"),
        ({"tune": {"space": {"seed": {}}}}, "tune.space.seed"),
        ({"tune": {"space": {"seed": {"values": [1], "uniform": [0, 1]}}}}, "tune.space.seed"),
        ({"tune": {"space": {"seed": {"uniform": [1, 0]}}}}, "tune.space.seed"),
        ({"tune": {"space": {"seed": {"loguniform": [0, 1]}}}}, "tune.space.seed"),
        ({"backbone": {}}, "backbone.architecture"),
        ({"model": "dsmop"}, "dsmip"),
        ({"model": None}, "model"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_wrong_value_names_its_key(change: dict[str, Any], key: str) -> None:
    message = refused({**MINIMAL, **change})
    assert key in message
    assert "\n" not in message


@pytest.mark.parametrize(("name", "key"), [("text", "prompt_length"), ("visual", "prompt_depth")])
def test_prompts_of_a_single_modality_are_refused(name: str, key: str) -> None:
    experts = {"text": {}, "visual": {}, "multimodal": {}, name: {key: 2}}
    message = refused({**MINIMAL, "system": {"experts": experts}})
    assert f"experts.{name}: only the multimodal expert has prompts" in message


def test_all_mistakes_are_named_at_once() -> None:
    message = refused({**MINIMAL, "train": {"epochs": 0, "batch": 3}, "sed": 1})
    assert all(key in message for key in ("train.epochs", "train.batch", "'sed'"))


def test_parts_and_tune_change_single_settings() -> None:
    tree = {
        **MINIMAL,
        "train": {"epochs": 7, "batch_size": 16, "augment": {"flip": 0.5, "scale": 0.1}},
        "parts": {"text": {"workers": 2, "train": {"epochs": 3, "augment": {"flip": 0.0}}}},
        "tune": {"train": {"patience": 2}},
    }
    config = parse_config(tree)
    text = config.train_of("text")
    assert (text.epochs, text.batch_size, text.augment.flip, text.augment.scale) == (3, 16, 0.0, 0.1)
    assert config.train_of("visual") == config.train
    assert config.part("text").workers == Workers(2, 2)
    assert config.part("visual").workers == Workers(1, 1)
    assert config.tune_train() == merged(config.train, {"patience": 2})
    assert config.tune_train().patience == 2


def override(*overrides: str) -> ExperimentConfig:
    return load_config("demo", overrides)


@pytest.mark.parametrize("number", ["5e-4", "0.0005", "5.0e-4", ".0005"])
def test_numbers_in_overrides(number: str) -> None:
    assert override(f"train.learning_rate={number}").train.learning_rate == 5e-4


def test_overrides_of_all_kinds() -> None:
    config = override(
        "train.micro_batch_size=32",
        "train.patience=null",
        "system.mask_padding=false",
        "system.use=[text, visual]",
        "tune.rungs=[1,2,4]",
        "parts.text.train={epochs: 3, learning_rate: 1e-3}",
        "tune.space={train.learning_rate: {loguniform: [1e-5, 1e-3]}}",
        "system.experts.multimodal.prompt_depth=2",
        "backbone.pretrained=some=file.safetensors",
        "seed=1",
        "seed=7",
    )
    assert config.train.micro_batch_size == 32
    assert config.train.patience is None
    assert config.system.mask_padding is False
    assert config.system.use == ("text", "visual")
    assert config.tune.rungs == (1, 2, 4)
    assert config.train_of("text").learning_rate == 1e-3
    assert config.tune.space["train.learning_rate"].loguniform == (1e-5, 1e-3)
    assert config.system.experts["multimodal"].prompt_depth == 2
    assert config.backbone.pretrained == "some=file.safetensors"
    assert config.seed == 7
    assert config.train.epochs == load_config("demo").train.epochs


def test_numbers_in_lists_of_overrides() -> None:
    """YAML 1.1 reads 5e-4 as text in a list as well."""
    values = override("tune.space={train.weight_decay: {values: [5e-4, 1e-3]}}").tune.space["train.weight_decay"]
    assert values.values == (5e-4, 1e-3)


@pytest.mark.parametrize("text", ["train.epochs", "=5", "train.epochs=[", "train.epochs=many", "train.epoch=5"])
def test_wrong_overrides_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"train\.epoch|key=value"):
        override(text)


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a file nor a shipped name.*demo"):
        load_config("demmo")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(written(tmp_path, "a: [1"))
    with pytest.raises(UserError, match="must be a mapping"):
        load_config(written(tmp_path, "- a"))
    with pytest.raises(UserError, match="must be a mapping"):
        load_config(written(tmp_path, ""))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bytes\.yaml"):
        load_config(str(tmp_path / "bytes.yaml"))


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValidationError):
        parse_config(MINIMAL).train.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(("given", "workers", "dumped"), [(1, (1, 1), 1), ("1..4", (1, 4), "1..4"), ("3", (3, 3), 3)])
def test_workers_are_a_number_or_a_range(given: int | str, workers: tuple[int, int], dumped: int | str) -> None:
    config = parse_config({**MINIMAL, "parts": {"text": {"workers": given}}})
    assert config.part("text").workers == workers
    assert config.model_dump(mode="json")["parts"]["text"]["workers"] == dumped
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("given", [0, -1, "4..1", "0..2", "1-4", "many", 1.5, None])
def test_wrong_workers_are_refused(given: object) -> None:
    with pytest.raises(UserError, match=r"parts.text.workers: give a number of workers, or a range such as 1..4, not"):
        parse_config({**MINIMAL, "parts": {"text": {"workers": given}}})


def test_overrides_that_a_part_s_own_settings_shadow_are_told() -> None:
    given = ["train.epochs=9", "parts.text.train.epochs=9", "train.batch_size=32", "seed=1"]
    (warning,) = shadowed(load_config("demo", given), given)
    assert warning == "warning: --set train.epochs does not reach parts.visual.train.epochs=5; set these as well"
    assert shadowed(load_config("demo"), []) == []
    drawn = ["tune.train.learning_rate=0.1", "system.gate.dropout=0.9", "train.learning_rate=0.1"]
    assert shadowed(load_config("own", drawn), drawn) == [  # stage one's own rate is drawn by nothing
        f"warning: --set {name} counts for the first trial of 'dsmip tune' alone: tune.space draws {key} for the "
        "others; set it there too"
        for name, key in (
            ("tune.train.learning_rate", "train.learning_rate"),
            ("system.gate.dropout", "system.gate.dropout"),
        )
    ]


def test_a_home_folder_is_found_in_names_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(to_yaml(load_config("demo", ["backbone.pretrained=~/lost.safetensors"])))
    (tmp_path / "tiny.json").write_text("{}")
    config = job_config("~/mine.yaml", ["backbone.architecture=~/tiny.json"])
    assert (config.backbone.architecture, config.backbone.pretrained) == (
        str(tmp_path / "tiny.json"),
        str(tmp_path / "lost.safetensors"),
    )
