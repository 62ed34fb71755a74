"""Where the prompts stand in the towers, layer by layer (DSMIP eqs. 6-8)."""

import json

import pytest
import torch

from dsmip.encoders.clip import Backbone
from dsmip.encoders.towers.prompts import InteractivePrompts
from dsmip.errors import UserError
from tests.support.tokens import mask_to_end

START, END = 49406, 49407
NUM_PROMPTS = 2


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """Three text layers, four vision layers, 64 patches."""
    path = tmp_path_factory.mktemp("backbone") / "deep.json"
    vision = {"image_size": 64, "layers": 4, "width": 160, "head_width": 32, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3}
    path.write_text(json.dumps({"embed_dim": 128, "vision_cfg": vision, "text_cfg": text}))
    return Backbone.build(str(path), None, seed=3)


@pytest.fixture(scope="module")
def token_ids() -> torch.Tensor:
    return torch.tensor([[START, 11, 12, 13, 14, END], [START, 21, END, 0, 0, 0]])


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def make_prompts(backbone: Backbone, depth: int) -> InteractivePrompts:
    generator = torch.Generator().manual_seed(depth)
    return InteractivePrompts(NUM_PROMPTS, depth, backbone.text_width, backbone.vision_width, generator=generator)


@torch.no_grad()
def layer_inputs(
    backbone: Backbone, prompts: InteractivePrompts | None, token_ids: torch.Tensor, pixels: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What every text block and every vision block is called with."""
    seen: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    towers = (backbone.clip.transformer, backbone.clip.visual.transformer)
    hooks = [
        block.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0]))
        for tower, into in zip(towers, seen, strict=True)
        for block in tower.resblocks
    ]
    backbone.encode_text(token_ids, mask_to_end(token_ids), prompts)
    backbone.encode_image(pixels, prompts)
    for hook in hooks:
        hook.remove()
    return seen


def test_prompts_occupy_their_slots_at_every_layer(
    backbone: Backbone, token_ids: torch.Tensor, pixels: torch.Tensor
) -> None:
    prompts = make_prompts(backbone, depth=2)
    texts, images = layer_inputs(backbone, prompts, token_ids, pixels)
    plain_texts, plain_images = layer_inputs(backbone, None, token_ids, pixels)
    position = backbone.clip.positional_embedding

    # First layer: after start-of-text, with the positional embeddings of the places they stand in.
    for row in texts[0]:
        assert torch.equal(row[1:3], prompts.text_prompts(0) + position[1:3])
    words = backbone.clip.token_embedding(token_ids)
    assert torch.equal(texts[0][:, 3:], words[:, 1:] + position[3:8])
    assert torch.equal(texts[0][:, 0], plain_texts[0][:, 0])
    # Visual prompts: behind all patches, no positional embedding, before the input norm.
    normed = backbone.clip.visual.ln_pre(prompts.image_prompts(0))
    for row in images[0]:
        torch.testing.assert_close(row[-2:], normed)
    torch.testing.assert_close(images[0][:, :-2], plain_images[0])

    # Second layer: overwritten by its own prompts, as they are.
    for row in texts[1]:
        assert torch.equal(row[1:3], prompts.text_prompts(1))
    for row in images[1]:
        assert torch.equal(row[-2:], prompts.image_prompts(1))
    # After the last prompted layer the slots carry what the blocks made of them.
    assert not torch.allclose(texts[2][0, 1:3], prompts.text_prompts(1))
    assert not torch.allclose(images[2][0, -2:], prompts.image_prompts(1))


def test_prompts_of_one_layer_change_nothing_before_it(
    backbone: Backbone, token_ids: torch.Tensor, pixels: torch.Tensor
) -> None:
    prompts = make_prompts(backbone, depth=3)
    before = layer_inputs(backbone, prompts, token_ids, pixels)
    with torch.no_grad():
        prompts.tables_Jrt[1] += 1
    after = layer_inputs(backbone, prompts, token_ids, pixels)
    for tower_before, tower_after in zip(before, after, strict=True):
        changed = [not torch.equal(one, other) for one, other in zip(tower_before, tower_after, strict=True)]
        assert changed == [layer >= 1 for layer in range(len(changed))]


def test_pooling_and_mask_follow_the_shift(backbone: Backbone, token_ids: torch.Tensor, pixels: torch.Tensor) -> None:
    prompts = make_prompts(backbone, depth=2)
    texts = backbone.encode_text(token_ids, mask_to_end(token_ids), prompts)
    assert texts.mask.tolist() == [[True] * 8, [True] * 5 + [False] * 3]
    end = texts.tokens[torch.arange(2), torch.tensor([7, 4])]
    torch.testing.assert_close(end @ backbone.clip.text_projection, texts.pooled)
    images = backbone.encode_image(pixels, prompts)
    assert images.tokens.shape == (2, 1 + 64 + NUM_PROMPTS, 160)
    assert images.mask.shape == (2, 67)


def test_start_of_text_does_not_see_the_prompts(backbone: Backbone, token_ids: torch.Tensor) -> None:
    with_prompts = backbone.encode_text(token_ids, mask_to_end(token_ids), make_prompts(backbone, depth=3)).tokens
    torch.testing.assert_close(with_prompts[:, 0], backbone.encode_text(token_ids, mask_to_end(token_ids)).tokens[:, 0])


def test_padding_does_not_change_prompted_texts(backbone: Backbone, token_ids: torch.Tensor) -> None:
    prompts = make_prompts(backbone, depth=2)
    padded = torch.cat([token_ids, token_ids.new_zeros(2, 5)], dim=1)
    short, long = (
        backbone.encode_text(token_ids, mask_to_end(token_ids), prompts),
        backbone.encode_text(padded, mask_to_end(padded), prompts),
    )
    torch.testing.assert_close(short.pooled, long.pooled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(short.tokens, long.tokens[:, :8], rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_prompt_and_no_tower(
    backbone: Backbone, token_ids: torch.Tensor, pixels: torch.Tensor
) -> None:
    prompts = make_prompts(backbone, depth=3)
    texts, images = (
        backbone.encode_text(token_ids, mask_to_end(token_ids), prompts),
        backbone.encode_image(pixels, prompts),
    )
    (texts.pooled.square().sum() + images.pooled.square().sum()).backward()
    assert prompts.tables_Jrt.grad is not None
    assert (prompts.tables_Jrt.grad.abs().amax(dim=(1, 2)) > 0).all()
    for coupling in prompts.couplings:
        assert coupling.weight.grad.abs().max() > 0
        assert coupling.bias.grad.abs().max() > 0
    assert all(p.grad is None for p in backbone.parameters())


def test_pictures_reach_the_text_prompts_through_the_coupling(backbone: Backbone, pixels: torch.Tensor) -> None:
    prompts = make_prompts(backbone, depth=1)
    backbone.encode_image(pixels, prompts).pooled.square().sum().backward()
    assert prompts.tables_Jrt.grad is not None
    assert prompts.tables_Jrt.grad.abs().max() > 0


def test_paper_setting_trains_the_papers_number_of_prompt_parameters() -> None:
    with torch.device("meta"):
        sides = [InteractivePrompts(2, 9, 512, 768) for _ in range(2)]
    count = sum(p.numel() for side in sides for p in side.parameters() if p.requires_grad)
    assert count == 18 * (2 * 512 + 512 * 768 + 768) == 7_110_144


def test_first_values_come_from_the_generator() -> None:
    one, same = (InteractivePrompts(4, 3, 64, 96, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert 0.018 < one.tables_Jrt.std().item() < 0.022
    assert one.couplings[0].weight.abs().max().item() <= 64**-0.5


def test_too_long_and_too_deep_are_refused(backbone: Backbone, token_ids: torch.Tensor, pixels: torch.Tensor) -> None:
    long = torch.full((1, 76), 5)
    long[0, -1] = END
    with pytest.raises(ValueError, match="tokenize with reserve=2"):
        backbone.encode_text(long, mask_to_end(long), make_prompts(backbone, depth=1))
    deep = make_prompts(backbone, depth=4)
    assert backbone.encode_image(pixels, deep).tokens.shape[1] == 67
    with pytest.raises(UserError, match="prompt depth 4 exceeds the 3 layers of the text tower"):
        backbone.encode_text(token_ids, mask_to_end(token_ids), deep)
    with pytest.raises(ValueError, match="negative"):
        InteractivePrompts(-1, 2, 8, 8)
