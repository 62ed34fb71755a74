"""What a user is told of a backbone that cannot be: wrong configurations, weights of another network, none at all."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsmip.encoders.architecture import resolve_architecture
from dsmip.encoders.clip import Backbone
from dsmip.encoders.weights import read_weights, stored_activation
from dsmip.errors import UserError
from tests.support.encoders.backbones import small_config, write_config


def without_text(key: str, value: object) -> dict[str, Any]:
    config = small_config()
    config["text_cfg"][key] = value
    return {"text_cfg": config["text_cfg"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_confg": {}}, "unknown key vision_confg; did you mean vision_cfg"),
        (without_text("widht", 3), "unknown key text_cfg.widht; did you mean text_cfg.width"),
        (without_text("pool_type", "nth"), "cannot be built"),
        (without_text("heads", 5), "cannot be built"),
        ({"embed_dim": None}, "embed_dim"),
        ({"vision_cfg": {"timm_model_name": 5}}, "cannot be built"),
    ],
)
def test_wrong_configurations_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_config(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        Backbone.build(path, None)
    assert path in str(caught.value)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ([1], "preprocess_cfg must be an object, not list"),
        ({"mean": 5}, "preprocess_cfg: mean must be three numbers, not 5"),
        ({"mean": [0.5]}, r"mean must be three numbers, not \[0.5\]"),
        ({"mean": "abc"}, "mean must be three numbers, not abc"),
        ({"std": [0.5, 0.5, None]}, "std must be three numbers"),
        ({"std": [1, 1, 0]}, "std must be above 0"),
        ({"resize_mode": ["x"]}, "resize_mode is shortest or squash"),
        ({"crop_pct": 7}, "crop_pct a share of the picture, not None, None, 7"),
    ],
)
def test_what_stands_wrongly_of_pictures_is_named(tmp_path: Path, stated: Any, message: str) -> None:
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": small_config(), "preprocess_cfg": stated}))
    with pytest.raises(UserError, match=f"{path}.*{message}") as caught:
        Backbone.checked(str(path), None)
    assert "\n" not in str(caught.value)


def test_unknown_architecture_lists_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown backbone architecture 'vit-b32'.*ViT-B-32"):
        resolve_architecture("vit-b32")


def test_broken_json_names_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{\n "embed_dim": 3,,\n}')
    with pytest.raises(UserError, match=r"backbone file .*bad\.json: line 2 column 17: wrong JSON"):
        resolve_architecture(str(tmp_path / "bad.json"))
    with pytest.raises(UserError, match=r"nowhere\.json does not exist"):
        resolve_architecture("nowhere.json")


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    Backbone.build(path, None).save_weights(tmp_path / "good.safetensors")
    state = load_file(tmp_path / "good.safetensors")
    save_file({**state, "ln_final.bias": torch.zeros(7)}, tmp_path / "shape.safetensors")
    state.pop("ln_final.weight")
    save_file({**state, "surplus": torch.zeros(1)}, tmp_path / "keys.safetensors")
    with pytest.raises(UserError, match=r"ln_final\.bias has shape \(7,\), the network \(32,\)"):
        Backbone.build(path, str(tmp_path / "shape.safetensors"))
    with pytest.raises(UserError, match=r"ln_final\.weight is missing; surplus is not part"):
        Backbone.build(path, str(tmp_path / "keys.safetensors"))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_weights_with_code_are_refused_unexecuted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb()}, "bomb.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Bomb()))
    Path("broken.safetensors").write_bytes(b"not tensors")
    for name in ("bomb.pt", "plain.pt", "broken.safetensors"):
        with pytest.raises(UserError, match=f"weights file {name}"):
            Backbone.build(write_config(tmp_path), name)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("content", [b"", b"(", b".", b"Nb", b"X", b"K", b"\x80\x02", b"PK\x03\x04", b"no weights"])
@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
def test_files_that_are_no_weights_are_one_line(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"weights.{suffix}") as refused:
        read_weights(path)
    assert "\n" not in str(refused.value)


def test_unknown_weights_list_the_tags(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'opnai' of ViT-B-32.*known tags: .*laion2b"):
        Backbone.build("ViT-B-32", "opnai", device="meta")
    with pytest.raises(UserError, match="it has no weights by tag"):
        Backbone.build("tiny", "openai")
    with pytest.raises(UserError, match=r"weights file gone\.safetensors does not exist"):
        Backbone.build("tiny", "gone.safetensors")


def test_activation_of_the_weights_must_be_the_architectures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fetched(model_id: str, filename: str = "open_clip_model.safetensors") -> str:
        assert filename == "open_clip_config.json", "weights fetched before the check"
        (tmp_path / filename).write_text(json.dumps({"model_cfg": {"quick_gelu": model_id == "owner/model"}}))
        return str(tmp_path / filename)

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", lambda config: pytest.fail("fetched"))
    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", fetched)
    for pretrained in ("openai", "hf-hub:owner/model"):
        with pytest.raises(UserError, match=r"trained with QuickGELU.*use architecture ViT-B-32-quickgelu"):
            Backbone.build("ViT-B-32", pretrained, device="meta")
    with pytest.raises(UserError, match=r"trained without QuickGELU.*use architecture ViT-L-14$"):
        Backbone.build("ViT-L-14-quickgelu", "hf-hub:other/model", device="meta")
    with pytest.raises(UserError, match='set "quick_gelu": true in it'):
        Backbone.build("tiny", "hf-hub:owner/model")


def test_what_a_file_says_of_its_activation_must_be_the_architectures(tmp_path: Path) -> None:
    gelu, quick = write_config(tmp_path / "gelu"), write_config(tmp_path / "quick", quick_gelu=True)
    made = Backbone.build(quick, None)
    (files := tmp_path / "files").mkdir()
    state = made.clip.state_dict()
    made.save_weights(files / "own.safetensors")
    save_file(state, files / "silent.safetensors")
    save_file(state, files / "open_clip_model.safetensors")
    (files / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    torch.save(state, files / "vit_b_32-quickgelu-laion400m_e32-46683a32.pt")
    numbers = {"input_resolution": 64, "context_length": 77, "vocab_size": 49408}
    torch.save({**state, **{name: torch.tensor(value) for name, value in numbers.items()}}, files / "state.pt")
    for name, because in (
        ("own.safetensors", "so its metadata say"),
        ("open_clip_model.safetensors", "so .*open_clip_config.json says"),
        ("vit_b_32-quickgelu-laion400m_e32-46683a32.pt", "those published under this name were"),
        ("state.pt", "it is a state dict of OpenAI's"),
    ):
        with pytest.raises(
            UserError, match=rf"trained with QuickGELU \({because}\) but the architecture .* without it"
        ):
            Backbone.checked(gelu, str(files / name))
        Backbone.checked(quick, str(files / name))
        Backbone.build(gelu, str(files / name), device="meta")  # a run that has begun with it still opens
    assert stored_activation(files / "silent.safetensors") is None
    Backbone.checked(gelu, str(files / "silent.safetensors"))
    Backbone.build(gelu, None).save_weights(files / "other.safetensors")
    with pytest.raises(UserError, match=r"trained without QuickGELU .* is with it; set .quick_gelu.: false in it"):
        Backbone.checked(quick, str(files / "other.safetensors"))


def test_files_that_are_no_state_dict_of_open_clips_are_called_what_they_are(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(UserError, match=r"ViT-B-32.pt .* do not fit the architecture: .* is missing"):
        Backbone.checked(config, str(tmp_path / "ViT-B-32.pt"))
    save_file({"bert.embeddings.word_embeddings.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"model.safetensors .* are a Hugging Face text encoder's, one tower of .* backbone.text: hf:<"
    ):
        Backbone.checked(config, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="are a Hugging Face text encoder's"):
        Backbone.checked(config, str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"a Hugging Face model without model.safetensors or pytorch_model.bin"):
        Backbone.checked(config, str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"are in several files \(model.safetensors.index.json\)"):
        Backbone.checked(config, str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"name its file .*/open_clip_model.safetensors, and .*config.json as arch"):
        Backbone.checked(config, str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is a folder; name a .safetensors or .pt file in it"):
        Backbone.checked(config, str(tmp_path / "empty"))


@pytest.mark.parametrize("pretrained", ["laion2b_s34b_b79k", "hf-hub:owner/model"])
def test_no_internet_points_to_local_files(monkeypatch: pytest.MonkeyPatch, pretrained: str) -> None:
    def offline(*_: object, **__: object) -> str:
        raise FileNotFoundError("Failed to download file\nmore detail")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", offline)
    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", offline)
    with pytest.raises(UserError, match=r"could not be downloaded.*local \.safetensors") as caught:
        Backbone.build("ViT-B-32", pretrained, device="meta")
    assert "\n" not in str(caught.value)
