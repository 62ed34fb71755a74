"""Published weights through the paths that users take; skipped without the development group `weights`."""

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from dsmip.encoders.architecture import build_tokenizer
from dsmip.encoders.clip import Backbone
from tests.support.encoders.real_weights import (
    EFFICIENTNET,
    efficientnet_features,
    minilm_folder,
    published_efficientnet,
    write_efficientnet,
)

TEXTS = ["a cat on a sofa", "a kitten that sleeps on the couch", "the engine of a lorry"]


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = write_efficientnet(tmp_path_factory.mktemp("weights") / "lite0.safetensors")
    return f"hf:{minilm_folder()} + timm:{EFFICIENTNET}@{file} + 384"


@pytest.fixture(scope="module")
def backbone(architecture: str) -> Backbone:
    return Backbone.build(architecture, None)


@torch.no_grad()
def test_minilm_gives_its_own_sentences(architecture: str, backbone: Backbone) -> None:
    folder: Any = minilm_folder()
    own: Any = AutoModel.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    states, mask = own.eval()(**tokens).last_hidden_state, tokens.attention_mask[..., None]
    found = backbone.encode_text(*build_tokenizer(architecture)(TEXTS)).pooled
    torch.testing.assert_close(found, (states * mask).sum(dim=1) / mask.sum(dim=1), atol=1e-5, rtol=1e-5)
    unit = normalize(found, dim=-1)
    near, far = float(unit[0] @ unit[1]), float(unit[0] @ unit[2])
    assert near > 0.5 > 0.2 > far
    assert backbone.context_length == 256


@torch.no_grad()
def test_efficientnet_gives_its_publishers_features(backbone: Backbone) -> None:
    side = backbone.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    (projection,) = backbone.vision.projection
    own = efficientnet_features(published_efficientnet(), pixels) @ projection.T
    torch.testing.assert_close(backbone.encode_image(pixels).pooled, own, atol=1e-4, rtol=1e-4)
    assert backbone.encode_image(pixels).tokens.shape == (2, 49, 1280)


def test_they_are_found_before_anything_starts(architecture: str) -> None:
    checked = Backbone.checked(architecture, None)
    assert (checked.text_width, checked.vision_width, checked.embed_width) == (384, 1280, 384)
