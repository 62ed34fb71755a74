"""Every kind of tower: its pooled features are the library's own, and prompts change what they should and no more."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmip.encoders.clip import Backbone
from dsmip.encoders.towers.prompts import InteractivePrompts
from dsmip.errors import UserError
from dsmip.training.validation.kept_trunks import KeptBatch
from tests.support.encoders.tower_kinds import tower_kinds

KINDS = tower_kinds()
TRANSFORMERS_ALONE = {"resnet", "convnext", "efficientnet", "swin"}  # what prompts have no place in
NUM_PROMPTS, LENGTHS = 2, (6, 10, 4)
ALIKE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def backbone(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("kind")
    path = folder / "backbone.json"
    path.write_text(json.dumps(KINDS[kind](folder)))
    return Backbone.build(str(path), None, seed=1)


@pytest.fixture(scope="module")
def texts(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Ids and mask; end of text is the highest id, as CLIP's own pooling expects, and padding is the network's."""
    length = backbone.context_length if backbone.text.reads_padding else max(LENGTHS)
    pad = getattr(getattr(backbone.clip, "text", None), "config", None)
    ids = torch.full((len(LENGTHS), length), pad.pad_token_id if pad else 0)
    words = torch.Generator().manual_seed(0)
    for row, count in enumerate(LENGTHS):
        ids[row, :count] = torch.randint(5, 200, (count,), generator=words)
        ids[row, count - 1] = 299 if pad else 49407
    return ids, torch.arange(length) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture(scope="module")
def pixels(backbone: Backbone) -> Tensor:
    side = backbone.image_size
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_pooled_features_are_the_librarys_own(backbone: Backbone, texts: tuple[Tensor, Tensor], pixels: Tensor) -> None:
    ids, mask = texts
    text, image = backbone.encode_text(ids, mask), backbone.encode_image(pixels)
    whole = ids
    if not backbone.text.reads_padding and not hasattr(getattr(backbone.clip, "text", None), "config"):
        whole = torch.nn.functional.pad(ids, (0, backbone.context_length - ids.shape[1]))
    torch.testing.assert_close(text.pooled, backbone.clip.encode_text(whole, normalize=False), **ALIKE)
    torch.testing.assert_close(image.pooled, backbone.clip.encode_image(pixels, normalize=False), **ALIKE)
    for features, width in ((text, backbone.text_width), (image, backbone.vision_width)):
        assert features.pooled.shape[1] == backbone.embed_width == 24
        assert features.tokens.shape == (*features.mask.shape, width)
    assert torch.equal(text.mask, mask)
    assert image.mask.all()
    assert image.tokens.std(dim=1).max() > 1e-3 * image.tokens.abs().max()  # places differ


@torch.no_grad()
def test_kept_trunks_give_the_very_features(backbone: Backbone, texts: tuple[Tensor, Tensor], pixels: Tensor) -> None:
    """Noted, said again with other texts and pictures, and without a keeper."""
    noting = KeptBatch(torch.device("cpu"))
    others = torch.full_like(texts[0], 7), texts[1]
    try:
        found = []
        for keeper, given, seen in ((None, texts, pixels), (noting, texts, pixels), (None, others, 0 * pixels)):
            backbone.keeper = keeper or (KeptBatch(torch.device("cpu"), noting.noted) if found else None)
            found.append((backbone.encode_text(*given), backbone.encode_image(seen)))
    finally:
        backbone.keeper = None
    for again in found[1:]:
        for one, other in zip(found[0], again, strict=True):
            for name in ("pooled", "tokens", "mask"):
                assert torch.equal(getattr(one, name), getattr(other, name))


@torch.no_grad()
def test_every_place_of_a_text_has_features_and_padding_that_is_read_stays(
    backbone: Backbone, texts: tuple[Tensor, Tensor]
) -> None:
    ids, mask = texts
    padded = backbone.encode_padded_text(ids, mask, backbone.context_length)
    assert padded.tokens.shape[1] == padded.mask.shape[1] == backbone.context_length
    torch.testing.assert_close(padded.pooled, backbone.encode_text(ids, mask).pooled, **ALIKE)


@torch.no_grad()
def test_a_text_does_not_depend_on_the_others(backbone: Backbone, texts: tuple[Tensor, Tensor]) -> None:
    ids, mask = texts
    together = backbone.encode_text(ids, mask)
    for row, count in enumerate(LENGTHS):
        length = ids.shape[1] if backbone.text.reads_padding else count
        alone = backbone.encode_text(ids[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(alone.pooled[0], together.pooled[row], **ALIKE)
        torch.testing.assert_close(alone.tokens[0, :count], together.tokens[row, :count], **ALIKE)


def test_of_many_texts_those_of_like_length_run_together(backbone: Backbone, texts: tuple[Tensor, Tensor]) -> None:
    """With prompts too; the tower sees little padding, and gives what it gives of three."""
    rows = torch.arange(60)[torch.randperm(60, generator=torch.Generator().manual_seed(3))] % len(LENGTHS)
    for prompts in (None, prompts_of(backbone, 2)):
        room = -NUM_PROMPTS if prompts is not None and backbone.text.reads_padding else None
        ids, mask = texts[0][:, :room], texts[1][:, :room]
        few, seen = backbone.encode_text(ids, mask, prompts), list[int]()
        handle = backbone.text.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append((*args, *kwargs.values())[0].shape[:2].numel()),
            with_kwargs=True,
        )
        many = backbone.encode_text(ids[rows], mask[rows], prompts)
        handle.remove()
        torch.testing.assert_close(many.pooled, few.pooled[rows], **ALIKE)
        assert torch.equal(many.mask, few.mask[rows])
        torch.testing.assert_close(many.tokens[many.mask], few.tokens[rows][many.mask], **ALIKE)
        if backbone.text.reads_padding:
            assert sum(seen) >= many.mask.numel()
        else:  # all texts of a length in one group: were equal ones rounded apart, equal entities would not tie
            assert len(seen) == len(LENGTHS)
            assert sum(seen) == many.mask.sum()
        if prompts is not None:
            of_few, of_many = (
                torch.autograd.grad(each.pooled.square().mean(), prompts.tables_Jrt)[0] for each in (few, many)
            )
            torch.testing.assert_close(of_many, of_few, **ALIKE)


def test_a_worker_may_have_no_item(backbone: Backbone, texts: tuple[Tensor, Tensor], pixels: Tensor) -> None:
    backbone.tune("full")
    ids, mask = texts
    features = backbone.encode_text(ids[:0], mask[:0]), backbone.encode_image(pixels[:0])
    backbone.tune("frozen")
    for each in features:
        assert each.pooled.shape == (0, 24)
        each.pooled.sum().backward()


def prompts_of(backbone: Backbone, depth: int) -> InteractivePrompts:
    generator = torch.Generator().manual_seed(4)
    prompts = InteractivePrompts(NUM_PROMPTS, depth, backbone.text_width, backbone.vision_width, generator=generator)
    with torch.no_grad():
        prompts.tables_Jrt.mul_(50)
    return prompts


def test_prompts_of_every_layer_reach_the_pooled_features(
    kind: str, backbone: Backbone, texts: tuple[Tensor, Tensor], pixels: Tensor
) -> None:
    ids, mask = texts
    if backbone.text.reads_padding:
        ids, mask = ids[:, :-NUM_PROMPTS], mask[:, :-NUM_PROMPTS]
    prompts = prompts_of(backbone, 2)
    text = backbone.encode_text(ids, mask, prompts)
    assert text.tokens.shape[1] == ids.shape[1] + NUM_PROMPTS
    assert torch.equal(text.mask.sum(dim=1), mask.sum(dim=1) + NUM_PROMPTS)
    (of_text,) = torch.autograd.grad(text.pooled.square().sum(), prompts.tables_Jrt)
    assert (of_text.abs().amax(dim=(1, 2)) > 0).all()
    if kind in TRANSFORMERS_ALONE:
        with pytest.raises(UserError, match="prompts have no place in the vision tower: "):
            backbone.encode_image(pixels, prompts)
        return
    image = backbone.encode_image(pixels, prompts)
    assert image.tokens.shape[1] == backbone.encode_image(pixels).tokens.shape[1] + NUM_PROMPTS
    (of_image,) = torch.autograd.grad(image.pooled.square().sum(), prompts.tables_Jrt)
    assert (of_image.abs().amax(dim=(1, 2)) > 0).all()


@torch.no_grad()
def test_nothing_of_the_prompts_stays_behind(backbone: Backbone, texts: tuple[Tensor, Tensor], pixels: Tensor) -> None:
    before = backbone.encode_text(*texts).pooled, backbone.encode_image(pixels).pooled
    ids, mask = texts
    cut = (ids[:, :-NUM_PROMPTS], mask[:, :-NUM_PROMPTS]) if backbone.text.reads_padding else texts
    backbone.encode_text(*cut, prompts_of(backbone, 2))
    if not backbone.vision.no_prompts:
        backbone.encode_image(pixels, prompts_of(backbone, 2))
    assert torch.equal(backbone.encode_text(*texts).pooled, before[0])
    assert torch.equal(backbone.encode_image(pixels).pooled, before[1])


def test_too_long_too_short_and_too_deep_are_refused(backbone: Backbone, texts: tuple[Tensor, Tensor]) -> None:
    long = torch.ones(1, backbone.context_length, dtype=torch.int64)
    with pytest.raises(ValueError, match="tokenize with reserve=2"):
        backbone.encode_text(long, long > 0, prompts_of(backbone, 1))
    if backbone.text.reads_padding:
        with pytest.raises(ValueError, match="which this tower reads whole"):
            backbone.encode_text(long[:, :5], long[:, :5] > 0)
    with pytest.raises(UserError, match=f"prompt depth 9 exceeds the {len(backbone.text.layers)} layers of the text"):
        backbone.encode_text(*texts, prompts_of(backbone, 9))


def test_tune_names_what_trains(backbone: Backbone) -> None:
    sizes = []
    for mode in ("projection", "full"):
        backbone.tune(mode, ["vision"])  # type: ignore[arg-type]
        names = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
        assert names
        assert all(name.startswith("clip.visual.") for name in names)
        sizes.append(len(names))
    assert sizes[0] < sizes[1]
    backbone.tune("full", ["text"])
    assert not any(p.requires_grad for n, p in backbone.named_parameters() if n.startswith("clip.visual."))
    backbone.tune("frozen")


def test_saved_weights_give_the_same_features(
    kind: str, backbone: Backbone, texts: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    backbone.save_weights(tmp_path / "weights.safetensors")
    (tmp_path / "backbone.json").write_text(json.dumps(KINDS[kind](tmp_path)))
    again = Backbone.build(str(tmp_path / "backbone.json"), str(tmp_path / "weights.safetensors"), seed=9)
    assert torch.equal(again.encode_text(*texts).pooled, backbone.encode_text(*texts).pooled)
