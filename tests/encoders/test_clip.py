"""The towers against plain open_clip, the prompts' places, and weights that are saved and loaded again."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsmip.encoders.clip import Backbone
from dsmip.encoders.towers.prompts import InteractivePrompts
from dsmip.errors import UserError
from tests.support.encoders.backbones import small_config, write_config
from tests.support.encoders.small_backbones import SMALL_BACKBONES
from tests.support.tokens import mask_to_end

START, END = 49406, 49407


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.build("tiny", None, seed=3)


@pytest.fixture(scope="module")
def token_ids() -> torch.Tensor:
    ids = torch.zeros(3, 77, dtype=torch.int64)
    for row, length in enumerate((4, 77, 12)):
        ids[row, :length] = torch.randint(1, 49000, (length,), generator=torch.Generator().manual_seed(row))
        ids[row, 0], ids[row, length - 1] = START, END
    return ids


@pytest.fixture(scope="module")
def pixels(backbone: Backbone) -> torch.Tensor:
    images = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return backbone.normalise(images, torch.tensor([True, True, False]))


def test_tiny_has_few_million_parameters(backbone: Backbone) -> None:
    assert sum(p.numel() for p in backbone.parameters()) == 5_890_145
    assert (backbone.text_width, backbone.vision_width, backbone.embed_width) == (96, 128, 96)
    assert (len(backbone.text.layers), len(backbone.vision.layers)) == (2, 4)
    assert (backbone.context_length, backbone.image_size) == (77, 64)
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize(("num_prompts", "depth"), [(None, None), (0, 2), (2, 0)])
def test_without_prompts_equals_open_clip_to_the_last_bit(
    tmp_path: Path, token_ids: torch.Tensor, pixels: torch.Tensor, custom_text: bool, num_prompts: int, depth: int
) -> None:
    backbone = Backbone.build(write_config(tmp_path, custom_text=custom_text), None)
    prompts = None
    if num_prompts is not None:
        prompts = InteractivePrompts(num_prompts, depth, backbone.text_width, backbone.vision_width)
        assert sum(p.numel() for p in prompts.parameters()) == 0
    for training in (False, True):
        backbone.clip.train(training)
        texts, images = (
            backbone.encode_text(token_ids, mask_to_end(token_ids), prompts),
            backbone.encode_image(pixels, prompts),
        )
        assert torch.equal(texts.pooled, backbone.clip.encode_text(token_ids))
        assert torch.equal(images.pooled, backbone.clip.encode_image(pixels))
    assert texts.tokens.shape == (3, 77, 32)
    assert texts.mask.sum(dim=1).tolist() == [4, 77, 12]
    assert images.tokens.shape == (3, 17, 64)
    assert images.mask.all()


def test_text_tokens_are_normed_and_picture_tokens_are_not(
    backbone: Backbone, token_ids: torch.Tensor, pixels: torch.Tensor
) -> None:
    texts, images = backbone.encode_text(token_ids, mask_to_end(token_ids)), backbone.encode_image(pixels)
    end = texts.tokens[torch.arange(3), token_ids.argmax(dim=1)]
    torch.testing.assert_close(end @ backbone.clip.text_projection, texts.pooled)
    class_token = backbone.clip.visual.ln_post(images.tokens[:, 0])
    torch.testing.assert_close(class_token @ backbone.clip.visual.proj, images.pooled)


def test_trimmed_texts_give_the_same_features(backbone: Backbone, token_ids: torch.Tensor) -> None:
    rows = token_ids[[0, 2]]
    full, trimmed = (
        backbone.encode_text(rows, mask_to_end(rows)),
        backbone.encode_text(rows[:, :12], mask_to_end(rows[:, :12])),
    )
    torch.testing.assert_close(trimmed.pooled, full.pooled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trimmed.tokens, full.tokens[:, :12], rtol=1e-5, atol=1e-5)


def test_random_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (Backbone.build(path, None, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["clip.text_projection"], other["clip.text_projection"])


def test_half_precision_towers_return_float32(
    backbone: Backbone, token_ids: torch.Tensor, pixels: torch.Tensor
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        features = [backbone.encode_text(token_ids, mask_to_end(token_ids)), backbone.encode_image(pixels)]
    for feature in features:
        assert feature.pooled.dtype == feature.tokens.dtype == torch.float32


def test_missing_pictures_are_zero_after_normalisation(backbone: Backbone) -> None:
    images = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    pixels = backbone.normalise(images, torch.tensor([True, False]))
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(pixels[0, :, 0, 0], (1 - mean) / std)
    assert pixels.dtype == torch.float32
    assert not pixels[1].any()
    with pytest.raises(ValueError, match="64"):
        backbone.normalise(images[..., :32, :32], torch.tensor([True, False]))


def test_token_embedding_mean_ignores_padding(backbone: Backbone, token_ids: torch.Tensor) -> None:
    table = backbone.clip.token_embedding.weight
    # Token 0 is also a word ("!"): inside the text it counts.
    ids = token_ids.clone()
    ids[0, 1] = 0
    expected = torch.stack([table[row[: row.tolist().index(END) + 1]].mean(dim=0) for row in ids])
    torch.testing.assert_close(backbone.token_embedding_mean(ids, mask_to_end(ids)), expected)


def trainable(backbone: Backbone) -> set[str]:
    return {name.removeprefix("clip.") for name, p in backbone.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("custom_text", [False, True])
def test_tune_sets_what_trains(tmp_path: Path, custom_text: bool) -> None:
    backbone = Backbone.build(write_config(tmp_path, custom_text=custom_text), None)
    text = "text." if custom_text else ""
    backbone.tune("projection")
    assert trainable(backbone) == {f"{text}text_projection", "visual.proj"}
    backbone.tune("full")
    every = {name.removeprefix("clip.") for name, _ in backbone.named_parameters()}
    assert trainable(backbone) == every - {"logit_scale"}
    backbone.tune("text")
    assert trainable(backbone) == {n for n in every if not n.startswith("visual.")} - {"logit_scale"} | {"visual.proj"}
    backbone.tune("full", ["vision"])
    assert trainable(backbone) == {name for name in every if name.startswith("visual.")}
    backbone.tune("frozen")
    assert trainable(backbone) == set()


def test_vit_b_32_sizes_without_building_it() -> None:
    backbone = Backbone.build("ViT-B-32", None, device="meta")
    assert sum(p.numel() for p in backbone.parameters()) == 151_277_313
    ids = torch.zeros(2, 10, dtype=torch.int64, device="meta")
    features = backbone.encode_text(ids, ids == 0)
    assert (features.pooled.shape, features.tokens.shape) == ((2, 512), (2, 10, 512))


def test_saved_weights_load_again(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    first = Backbone.build(path, None, seed=1)
    first.save_weights(tmp_path / "weights.safetensors")
    state = load_file(tmp_path / "weights.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, tmp_path / "w.pt")
    for name in ("weights.safetensors", "w.pt"):
        again = Backbone.build(path, str(tmp_path / name), seed=2)
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in first.state_dict().items())


def test_weights_of_the_plain_layout_load_into_custom_text(tmp_path: Path) -> None:
    plain = Backbone.build(write_config(tmp_path), None, seed=1)
    plain.save_weights(tmp_path / "weights.safetensors")
    custom = Backbone.build(write_config(tmp_path, custom_text=True), str(tmp_path / "weights.safetensors"))
    assert torch.equal(custom.clip.get_parameter("text.text_projection"), plain.clip.get_parameter("text_projection"))


def test_local_open_clip_config_brings_its_pixel_statistics(tmp_path: Path) -> None:
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": small_config(), "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}))
    backbone = Backbone.build(str(path), None)
    images = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    assert torch.equal(backbone.normalise(images, torch.tensor([True])), torch.full((1, 3, 64, 64), 2.0))


def test_saved_weights_bring_their_pixel_statistics(tmp_path: Path) -> None:
    """Else weights adapted from a CLIP with other statistics would see other colours than they were trained on."""
    adapted = Backbone.build(write_config(tmp_path), None)
    adapted.mean.copy_(torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))
    adapted.std.fill_(0.7)
    adapted.save_weights(tmp_path / "weights.safetensors")
    again = Backbone.build(write_config(tmp_path), str(tmp_path / "weights.safetensors"))
    assert torch.equal(again.mean, adapted.mean)
    assert torch.equal(again.std, adapted.std)
    save_file(load_file(tmp_path / "weights.safetensors"), tmp_path / "foreign.safetensors")
    foreign = Backbone.build(write_config(tmp_path), str(tmp_path / "foreign.safetensors"))
    assert torch.equal(foreign.mean, Backbone.build(write_config(tmp_path), None).mean)
    save_file(adapted.clip.state_dict(), tmp_path / "odd.safetensors", metadata={"preprocess_cfg": "[1]"})
    with pytest.raises(UserError, match=r"odd\.safetensors: its preprocess_cfg must be an object, not list"):
        Backbone.build(write_config(tmp_path), str(tmp_path / "odd.safetensors"))


@pytest.mark.parametrize("kind", SMALL_BACKBONES)
def test_saved_weights_of_every_kind_are_read_again(kind: str, tmp_path: Path) -> None:
    """Also of one tower alone, which a bundle has."""
    architecture = SMALL_BACKBONES[kind](tmp_path)
    made = Backbone.build(architecture, None, seed=3)
    made.save_weights(tmp_path / "saved.safetensors")
    again = Backbone.build(architecture, str(tmp_path / "saved.safetensors"), seed=4)
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in again.state_dict().items())
    assert again.state_dict().keys() == made.state_dict().keys()
