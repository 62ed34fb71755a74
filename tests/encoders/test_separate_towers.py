"""A backbone of two separate towers: each gives its own library's features, and `dsmip pretrain` joins them."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertModel

from dsmip.config import BackboneConfig, PretrainConfig, validated
from dsmip.data.dataset import Dataset
from dsmip.data.images import PixelForm, fit
from dsmip.data.text import Template
from dsmip.encoders.architecture import build_tokenizer, resolve_architecture
from dsmip.encoders.base import feature_sizes
from dsmip.encoders.clip import Backbone
from dsmip.errors import UserError
from dsmip.models import find_system
from dsmip.runs.checks import check_pretraining
from dsmip.runs.load_config import job_config, parse_config, read_config, to_yaml
from dsmip.separate_towers import SeparateTowers
from dsmip.training.local_context import LocalContext
from dsmip.training.pretraining import PairSource, pretrain
from tests.support.encoders.small_bert import write_small_bert

VISION = "test_efficientnet"  # of timm's own tests: batch norms, 160 pixels
WORDS = ["the", "lion", "arms", "of", "a", "red", "blue", ":"]
ALIKE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def text_folder(small_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [word for entity in small_data.entities() for word in f"{entity.name} {entity.attributes}".split()]
    return write_small_bert(tmp_path_factory.mktemp("text"), [*WORDS, *words])


@pytest.fixture(scope="module")
def vision_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a classifier of another number of classes than timm's own."""
    path = tmp_path_factory.mktemp("vision") / "own.safetensors"
    torch.manual_seed(2)
    save_file(timm.create_model(VISION, num_classes=7).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def pair(text_folder: Path, vision_file: Path) -> SeparateTowers:
    return SeparateTowers(str(text_folder), VISION, str(vision_file), 16)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("width", [16, 24])
def test_towers_give_their_own_libraries_features(pair: SeparateTowers, pixels: Tensor, width: int) -> None:
    backbone = Backbone.build(str(replace(pair, embed_dim=width)), None, seed=5)
    assert backbone.context_length == 24
    tokens = build_tokenizer(str(pair))(["the lion", "arms of a red lion"])
    assert tokens.ids[0].tolist() == [2, 4, 5, 3, 0, 0, 0]
    bert: Any = BertModel.from_pretrained(pair.text)
    bert.eval()
    states = bert(input_ids=tokens.ids, attention_mask=tokens.mask.long()).last_hidden_state
    mean = (states * tokens.mask[..., None]).sum(dim=1) / tokens.mask.sum(dim=1, keepdim=True)
    text = backbone.encode_text(*tokens)
    if width == 24:
        mean = backbone.text.projection[0].new_tensor(mean) @ backbone.text.projection[0].T
    torch.testing.assert_close(text.pooled, mean, **ALIKE)  # of the shared width the tower's vectors stay as they are
    assert len(backbone.text.projection) == (width == 24)

    assert pair.vision_file is not None
    trunk = timm.create_model(VISION, num_classes=7, checkpoint_path=pair.vision_file).eval()
    features = trunk.forward_head(trunk.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(
        backbone.encode_image(pixels).pooled, features @ backbone.vision.projection[0].T, **ALIKE
    )
    sizes = feature_sizes(str(replace(pair, embed_dim=width)))
    assert (sizes.text_width, sizes.embed_width) == (16, width)


def test_pictures_are_as_timm_says(pair: SeparateTowers) -> None:
    network, stated = resolve_architecture(str(pair)), timm.get_pretrained_cfg(VISION)
    assert stated is not None
    assert (network.mean, network.std, network.image_size) == (stated.mean, stated.std, stated.input_size[1])
    assert network.pixels == PixelForm(filter="bicubic", part=stated.crop_pct)
    image = torch.arange(100).expand(3, 60, 100).to(torch.uint8)
    middle = fit(image, 48, PixelForm(part=0.8))  # 60 high before and after: nothing is resized
    assert torch.equal(middle, image[:, 6:54, 26:74])


@torch.no_grad()
def test_pictures_may_have_another_size_where_the_network_takes_it(pair: SeparateTowers, pixels: Tensor) -> None:
    sized, small = Backbone.build(str(replace(pair, image_size=96)), None, seed=5), pixels[:, :, :96, :96]
    assert sized.image_size == resolve_architecture(str(replace(pair, image_size=96))).image_size == 96
    own = Backbone.build(str(pair), None, seed=5)
    assert torch.equal(sized.encode_image(small).pooled, own.encode_image(small).pooled)
    message = "image_size 96: timm:vit_tiny_patch16_224 takes pictures of 224 px, not these .*model"
    with pytest.raises(UserError, match=message):
        resolve_architecture("timm:vit_tiny_patch16_224 + 96px")


def test_a_configuration_names_the_towers_by_keys_or_in_one_text(pair: SeparateTowers) -> None:
    keys = {"text": f"hf:{pair.text}", "vision": f"timm:{VISION}@{pair.vision_file}", "embed_dim": 16}
    config = validated(BackboneConfig, keys, "here", "backbone.")
    assert config == BackboneConfig(architecture=str(pair))
    assert SeparateTowers.parsed(config.architecture) == pair
    hub = validated(BackboneConfig, {"text": "hf:owner/model", "vision": "timm:resnet18.a1_in1k"}, "here", "")
    assert hub.architecture == "hf:owner/model + timm:resnet18.a1_in1k + 256"
    assert BackboneConfig.model_validate(hub.model_dump()) == hub
    sized = validated(BackboneConfig, keys | {"image_size": 96}, "here", "backbone.")
    assert sized.architecture == f"{pair} + 96px"
    assert SeparateTowers.parsed(sized.architecture) == replace(pair, image_size=96)
    assert SeparateTowers.parsed("timm:resnet18 + 96px") == SeparateTowers(None, "resnet18", image_size=96)
    taken_away = dict.fromkeys(("text", "vision", "embed_dim", "image_size")) | {"architecture": "tiny"}
    assert validated(BackboneConfig, taken_away, "here", "") == BackboneConfig(architecture="tiny")
    for name in ("ViT-B-32", "tiny", "hf-hub:a", "a + b + 3", "models/a + b.json"):
        assert SeparateTowers.parsed(name) is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"text": "hf:a", "vision": "timm:b", "architecture": "tiny"}, "give architecture, or text and vision"),
        ({"text": "hf:a", "vision": "b"}, r"vision is timm:<name> or timm:<name>@<file of weights>, not 'b'"),
        ({"text": "hf:a", "embed_dim": 3}, "embed_dim is the width that two .* one tower has its own"),
        ({"embed_dim": 3}, "embed_dim and image_size are of towers: give text and vision, or one of them"),
        ({"text": "hf:a", "image_size": 96}, "image_size is of the tower vision: there is none"),
        ({"vision": "timm:b", "image_size": 0}, "image_size is the side of the pictures .* not 0"),
        ({"text": "bert", "vision": "timm:b"}, "text is hf:<name or folder>.* not 'bert'"),
        ({"text": "hf:a", "vision": "timm:b", "embed_dim": 0}, "embed_dim is the width that both .* not 0"),
        ({"text": "hf:a", "vision": "timm:b", "visoin": "timm:c"}, "unknown key 'visoin'; did you mean 'vision'"),
        ({"embed_dim": 3, "architecture": "tiny"}, "give architecture, or text and vision"),
    ],
)
def test_a_pair_that_is_not_of_its_form_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validated(BackboneConfig, keys, "here", "")


def test_a_job_knows_its_towers_wherever_it_runs(
    pair: SeparateTowers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_folder: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "minilm").symlink_to(text_folder)
    (tmp_path / "own.pth").write_bytes(b"")
    sets = [
        "text=hf:~/minilm",
        f"vision=timm:{VISION}@~/own.pth",
        "embed_dim=32",
        "architecture=null",
        "pretrained=null",
    ]
    config = job_config("demo", [f"backbone.{each}" for each in sets])
    assert config.backbone.architecture == f"hf:{text_folder} + timm:{VISION}@{tmp_path}/own.pth + 32"
    assert read_config(to_yaml(config)) == config


def test_towers_that_cannot_be_had_are_named(pair: SeparateTowers, tmp_path: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            Backbone.checked(str(replace(pair, **changes)), None)
        assert "\n" not in str(caught.value)

    refused(r"vision timm:test_eficientnet: Unknown model .*; nearest: .*test_efficientnet", vision="test_eficientnet")
    refused(r"weights file gone.pth of backbone.vision does not exist", vision_file="gone.pth")
    save_file(timm.create_model("test_convnext").state_dict(), tmp_path / "other.safetensors")
    refused(
        "other.safetensors do not fit timm:test_efficientnet: .*Missing", vision_file=f"{tmp_path}/other.safetensors"
    )
    (tmp_path / "empty").mkdir()
    refused(r"hf:.*empty has no config.json", text=f"{tmp_path}/empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "clip"}))
    refused(r"of the type 'clip'; a text tower is one of bert, roberta", text=f"{tmp_path}/empty")
    config = json.loads((Path(str(pair.text)) / "config.json").read_text())
    (tmp_path / "empty" / "config.json").write_text(json.dumps(config))
    refused(r"weights of backbone.text hf:.*empty cannot be had", text=f"{tmp_path}/empty")
    save_file(
        {"embeddings.word_embeddings.weight": torch.zeros(config["vocab_size"], 16)},
        tmp_path / "empty" / "model.safetensors",
        {"format": "pt"},
    )
    refused(r"hf:.*empty have no embeddings.LayerNorm.bias, .* and \d+ more", text=f"{tmp_path}/empty")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", '{"model_type": "bert", "hidden_size": "x"}', "hidden_size must be a whole number .*, not 'x'"),
        ("config.json", '{"model_type": "bert"}', "its config.json has neither hidden_size nor d_model"),
        ("config.json", '{"model_type": "bert", "hidden_size": 24, "hidden_act": "x"}', "built .*: KeyError..x"),
        ("config.json", "[1]", "config.json must hold a JSON object"),
        ("sentence_bert_config.json", '{"max_seq_length": [1]}', r"max_seq_length must be a whole number .*'\[1\]'"),
        ("model.safetensors", "cut off", "weights of backbone.text hf:.* cannot be had"),
        ("pytorch_model.bin", "no pickle", r"hf:.* cannot be had \(its file is not a plain file of tensors\)"),
    ],
)
def test_a_damaged_folder_is_one_line(
    pair: SeparateTowers, tmp_path: Path, file: str, content: str, message: str
) -> None:
    folder = tmp_path / "text"
    shutil.copytree(str(pair.text), folder)
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        Backbone.checked(str(replace(pair, text=str(folder))), None)
    assert "\n" not in str(caught.value)


def test_a_damaged_tokenizer_is_one_line(pair: SeparateTowers, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    shutil.copytree(str(pair.text), folder)
    (folder / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(UserError, match=r"tokenizer .*text cannot be had"):
        build_tokenizer(str(replace(pair, text=str(folder))))


def test_a_folder_without_a_tokenizer_is_one_line(pair: SeparateTowers, tmp_path: Path) -> None:
    """The library makes one of a few special tokens then, to which every word is unknown."""
    folder = tmp_path / "text"
    shutil.copytree(str(pair.text), folder, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    with pytest.raises(UserError, match=r"tokenizer .*text (knows no words|cannot be had)"):
        build_tokenizer(str(replace(pair, text=str(folder))))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c"])
def test_a_folder_that_is_not_there_is_no_name_of_the_hub(pair: SeparateTowers, name: str) -> None:
    config = job_config("demo", [f"backbone={{architecture: null, text: 'hf:{name}', vision: 'timm:{VISION}'}}"])
    with pytest.raises(UserError, match=f"^backbone.text hf:{re.escape(name)}: no such folder$"):
        resolve_architecture(config.backbone.architecture)


@pytest.mark.slow
@pytest.mark.parametrize("towers", ["locked", "tuned"])
def test_pretraining_joins_them(
    towers: Any, pair: SeparateTowers, small_data: Dataset, tmp_path: Path, pixels: Tensor
) -> None:
    config = PretrainConfig(epochs=20, batch_size=8, learning_rate=1e-3, warmup_steps=2, towers=towers)
    backbone = Backbone.build(str(pair), None)
    before = {name: tensor.clone() for name, tensor in backbone.clip.state_dict().items()}
    source = PairSource(small_data, resolve_architecture(str(pair)), Template(), config, seed=3)
    history = pretrain(backbone, source, config, LocalContext(tmp_path / "work"), seed=0)
    assert history[-1]["loss"] < history[0]["loss"]
    changed = {name for name, tensor in backbone.clip.state_dict().items() if not torch.equal(tensor, before[name])}
    joins = {"visual.head.proj.weight", "logit_scale"}  # the text tower has the shared width already
    assert changed == joins if towers == "locked" else joins < changed
    assert not any("running_" in name for name in changed)
    backbone.save_weights(tmp_path / "joined.safetensors")
    again = Backbone.build(str(pair), str(tmp_path / "joined.safetensors"), seed=9)
    with torch.no_grad():
        assert torch.equal(again.encode_image(pixels).pooled, backbone.eval().encode_image(pixels).pooled)
    Backbone.checked(str(pair), str(tmp_path / "joined.safetensors"))


@torch.no_grad()
def test_one_tower_alone_gives_its_librarys_features(pair: SeparateTowers, pixels: Tensor) -> None:
    both = Backbone.build(str(pair), None)
    text, vision = Backbone.build(f"hf:{pair.text}", None), Backbone.build(f"timm:{VISION}@{pair.vision_file}", None)
    tokens = build_tokenizer(f"hf:{pair.text}")(["the lion", "arms of a red lion"])
    assert torch.equal(text.encode_text(*tokens).pooled, both.encode_text(*tokens).pooled)
    trunk: Any = timm.create_model(VISION, num_classes=7, checkpoint_path=str(pair.vision_file)).eval()
    pooled = trunk.forward_head(trunk.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(vision.encode_image(pixels).pooled, pooled, **ALIKE)
    assert text.vision.is_absent
    assert vision.text.is_absent
    assert feature_sizes(f"hf:{pair.text}").embed_width == 16
    assert feature_sizes(f"timm:{VISION}@{pair.vision_file}").embed_width == pooled.shape[1]
    text.tune("full")
    assert all(p.requires_grad for p in text.text.parameters)


def test_what_needs_a_tower_that_is_not_there_is_refused(pair: SeparateTowers, small_data: Dataset) -> None:
    name = f"hf:{pair.text}"
    backbone = Backbone.build(name, None, device="meta")
    for model, system, reads in (
        ("clip", {}, "clip reads pictures"),
        ("mimic", {}, "mimic reads pictures"),
        ("dsmip", {"gate": {"picture": "clip"}}, "visual reads pictures"),
    ):
        config = parse_config({"model": model, "backbone": {"text": name}, "system": system})
        with pytest.raises(UserError, match=f"{reads}, and backbone hf:.* has no vision tower: add one"):
            find_system(model).check(config, backbone)
    alone = parse_config({"model": "clip", "backbone": {"text": name}, "system": {"image_weight": 0}})
    find_system("clip").check(alone, backbone)
    with pytest.raises(UserError, match="is one tower: 'dsmip pretrain' aligns a text and a vision tower"):
        check_pretraining(alone, small_data)


def test_markers_are_one_token_each_and_the_vocabulary_stays(pair: SeparateTowers) -> None:
    plain, marking = build_tokenizer(f"hf:{pair.text}"), build_tokenizer(f"hf:{pair.text}", ("[SEP]", "arms"))
    assert marking(["the [SEP] lion"]).ids[0].tolist() == [2, 4, 3, 5, 3]
    assert marking(["lionarms of"]).ids[0].tolist() == [2, 5, 6, 7, 3]
    assert plain(["lion of"]).ids[0].tolist() == marking(["lion of"]).ids[0].tolist() == [2, 5, 7, 3]
    with pytest.raises(UserError, match=r"has no token \[M\], by which the system's template"):
        build_tokenizer(f"hf:{pair.text}", ("[SEP]", "[M]"))
