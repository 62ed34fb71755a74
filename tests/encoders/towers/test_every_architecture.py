"""Every architecture in open_clip's list, on the device meta: features of the stated shapes, prompts or a reason."""

from typing import Any

import open_clip
import pytest
import torch
from transformers import AutoConfig

from dsmip.encoders.architecture import resolve_architecture
from dsmip.encoders.clip import Backbone
from dsmip.encoders.towers.prompts import InteractivePrompts

META = torch.device("meta")
# Hugging Face encoders of the list, by family: their configurations lie on the hub, and sizes do not matter here
FAMILIES = {"xlm-roberta": "xlm-roberta", "roberta": "roberta", "mt5": "mt5", "nllb": "m2m_100"}
ONE_OF_EACH = (
    "ViT-B-32",
    "RN50",
    "ViT-B-16-SigLIP2",
    "EVA02-B-16",
    "convnext_base",
    "MobileCLIP-S1",
    "coca_ViT-B-32",
    "xlm-roberta-base-ViT-B-32",
    "nllb-clip-base",
    "mt5-base-ViT-B-32",
)


@pytest.fixture(autouse=True)
def without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def configured(name: str, *_: object, **__: object) -> Any:
        family = next(family for part, family in FAMILIES.items() if part in name)
        sizes = {"num_hidden_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 1}
        return AutoConfig.for_model(family, vocab_size=500, **sizes)

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", configured)


@torch.no_grad()
def check(name: str) -> None:
    network = resolve_architecture(name)
    # masks of Hugging Face's encoders ask for values, which meta tensors have not
    device = torch.device("cpu") if network.is_hugging_face else META
    backbone = Backbone.build(name, None, device=device)
    length = backbone.context_length if backbone.text.reads_padding else 12
    ids, mask = torch.full((2, length), 7, device=device), torch.ones(2, length, dtype=torch.bool, device=device)
    pixels = torch.zeros(2, 3, network.image_size, network.image_size, device=device)
    text, image = backbone.encode_text(ids, mask), backbone.encode_image(pixels)
    assert backbone.image_size == network.image_size
    assert text.tokens.shape == (2, length, backbone.text_width)
    assert (image.tokens.ndim, len(image.tokens), image.tokens.shape[2]) == (3, 2, backbone.vision_width)
    assert text.pooled.shape == image.pooled.shape == (2, network.config["embed_dim"])
    assert backbone.token_embedding_mean(ids, mask).shape == (2, backbone.text_width)
    for tower in (backbone.text, backbone.vision):
        assert bool(tower.layers) != bool(tower.no_prompts)
    prompts = InteractivePrompts(2, 2, backbone.text_width, backbone.vision_width).to(device)
    if backbone.text.reads_padding:
        ids, mask = ids[:, :-2], mask[:, :-2]
    assert backbone.encode_text(ids, mask, prompts).tokens.shape[1] == ids.shape[1] + 2
    if not backbone.vision.no_prompts:
        assert backbone.encode_image(pixels, prompts).tokens.shape[1] == image.tokens.shape[1] + 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_one_architecture_of_each_kind(name: str) -> None:
    check(name)


@pytest.mark.soak
@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_architecture(name: str) -> None:
    check(name)
