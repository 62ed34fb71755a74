"""A vision tower with a convolutional stem: its patches, its weights, and what a wrong stem is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmip.encoders.architecture import SHIPPED
from dsmip.encoders.clip import Backbone
from dsmip.encoders.towers.stem import conv_stem
from dsmip.errors import UserError


def write_config(folder: Path, **vision: Any) -> str:
    config = json.loads((SHIPPED / "small.json").read_text())
    config["vision_cfg"] |= {"image_size": 16, "layers": 1, "patch_size": 4, "conv_stem": [8, 16], **vision}
    path = folder / "stem.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_shipped_small_backbone_has_a_stem() -> None:
    backbone = Backbone.build("small", None)
    assert (backbone.image_size, backbone.vision_width) == (40, 128)
    features = backbone.encode_image(torch.zeros(2, 3, 40, 40))
    assert features.tokens.shape == (2, 26, 128)
    assert features.pooled.shape == (2, 128)


def test_a_patch_sees_what_is_around_it(pixels: torch.Tensor) -> None:
    """Each stage halves the side; with stride and padding no patch is lost."""
    assert conv_stem([8, 16], 24)(pixels).shape == (3, 24, 4, 4)
    assert conv_stem([8, 16, 8], 24)(pixels).shape == (3, 24, 2, 2)


def test_a_picture_does_not_depend_on_its_batch(tmp_path: Path, pixels: torch.Tensor) -> None:
    backbone = Backbone.build(write_config(tmp_path), None)
    alone = backbone.encode_image(pixels[1:2])
    torch.testing.assert_close(backbone.encode_image(pixels).pooled[1:2], alone.pooled)


def test_weights_with_a_stem_are_drawn_from_the_seed_saved_and_loaded(tmp_path: Path, pixels: torch.Tensor) -> None:
    config = write_config(tmp_path)
    first, same, other = (Backbone.build(config, None, seed=seed) for seed in (1, 1, 2))
    expected = first.encode_image(pixels).pooled
    assert torch.equal(same.encode_image(pixels).pooled, expected)
    assert not torch.equal(other.encode_image(pixels).pooled, expected)
    first.save_weights(tmp_path / "weights.safetensors")
    loaded = Backbone.build(config, str(tmp_path / "weights.safetensors"), seed=2)
    assert torch.equal(loaded.encode_image(pixels).pooled, expected)
    with pytest.raises(UserError, match=r"visual\.conv1"):
        Backbone.build(write_config(tmp_path, conv_stem=[8, 24]), str(tmp_path / "weights.safetensors"))


def test_a_stem_trains_with_its_tower(tmp_path: Path) -> None:
    backbone = Backbone.build(write_config(tmp_path), None)
    backbone.tune("full", ["text"])
    stem = [p for name, p in backbone.named_parameters() if "conv1" in name]
    assert len(stem) == 14
    assert not any(p.requires_grad for p in stem)
    backbone.tune("full", ["vision"])
    assert all(p.requires_grad for p in stem)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"conv_stem": []}, "must be a list of positive multiples of 8"),
        ({"conv_stem": [8, 12]}, "must be a list of positive multiples of 8"),
        ({"conv_stem": 8}, "must be a list of positive multiples of 8"),
        ({"conv_stem": [8, 8, 8]}, "of 3 stages needs patch_size 8 .* not 4 and 16"),
        ({"image_size": 18}, "image_size that is a multiple of it, not 4 and 18"),
        ({"conv_steam": [8, 16]}, r"unknown key vision_cfg\.conv_steam; did you mean vision_cfg\.conv_stem"),
    ],
)
def test_wrong_stems(tmp_path: Path, vision: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Backbone.build(write_config(tmp_path, **vision), None)
