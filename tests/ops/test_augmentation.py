"""Random changes of pictures and tokens: what stays, what may change, and how far."""

import colorsys
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmip.ops.augmentation import Draws, ImageAugmentation, augment_images, drop_tokens, hide_tokens
from tests.support.tokens import mask_to_end

START, END = 49406, 49407
STRONG = ImageAugmentation(
    scale=(0.7, 1.3),
    shift=0.2,
    rotation=25,
    flip=0.5,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grayscale=0.2,
    erase=0.5,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(num: int = 6, side: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (num, 3, side, side), generator=seeded(1)).to(torch.uint8)


def augment(images: torch.Tensor, seed: int = 0, **strengths: Any) -> torch.Tensor:
    present = torch.ones(len(images), dtype=torch.bool)
    return augment_images(images, present, ImageAugmentation(**strengths), Draws(seeded(seed), len(images)))


@pytest.mark.parametrize("padding", ["border", "white"])
def test_no_strength_changes_nothing(padding: str) -> None:
    assert torch.equal(augment(some_images(), padding=padding), some_images())


def test_same_generator_same_pictures_and_each_picture_its_own_change() -> None:
    images = some_images(1).expand(6, -1, -1, -1)
    present = torch.ones(6, dtype=torch.bool)
    one, same, other = (augment_images(images, present, STRONG, Draws(seeded(seed), 6)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.dtype == torch.uint8
    assert one.shape == images.shape
    assert len({tuple(image.flatten().tolist()) for image in one}) == 6


def test_missing_pictures_stay_zero() -> None:
    has_image = torch.tensor([True, False, True, False, True, False])
    images = some_images() * has_image[:, None, None, None]
    augmented = augment_images(images, has_image, STRONG, Draws(seeded(), 6))
    assert not augmented[~has_image].any()
    assert augmented[has_image].any()
    assert augment_images(images[:0], has_image[:0], STRONG, Draws(seeded(), 0)).shape == (0, 3, 16, 16)


def test_certain_flip_mirrors() -> None:
    assert torch.equal(augment(some_images(), flip=1.0), some_images().flip(-1))


def one_dot(row: int, column: int, side: int = 33) -> torch.Tensor:
    image = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    image[:, :, row, column] = 255
    return image


def test_moves_stay_within_their_limits() -> None:
    for seed in range(20):
        shifted = augment(one_dot(16, 16), seed, shift=0.2)[0, 0].nonzero() - 16
        assert len(shifted)
        assert shifted.abs().max() <= math.ceil(0.2 * 33)
        turned = augment(one_dot(16, 28), seed, rotation=30.0)[0, 0].nonzero().float() - 16
        assert turned[:, 0].abs().max() <= 12 * math.sin(math.radians(30)) + 1
        assert torch.linalg.vector_norm(turned, dim=1).sub(12).abs().max() <= 1.5
        mirrored = augment(one_dot(16, 28), seed, rotation=30.0, flip=1.0)[0, 0].nonzero().float() - 16
        assert mirrored[:, 1].max() < 0
        assert torch.linalg.vector_norm(mirrored, dim=1).sub(12).abs().max() <= 1.5
        larger = augment(one_dot(16, 22), seed, scale=(2.0, 2.0))[0, 0].nonzero() - 16
        assert (larger[:, 1] - 12).abs().max() <= 2


def test_padding_is_what_comes_in_from_outside() -> None:
    black = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    smaller = augment(black, scale=(0.5, 0.5), padding="white")[0, 0]
    assert smaller[0, 0] == 255
    assert smaller[8, 8] == 0
    assert (smaller < 128).sum() == 64
    assert not augment(black, scale=(0.5, 0.5), padding="border").any()


def test_brightness_and_contrast_on_plain_pictures() -> None:
    gray = torch.full((50, 3, 4, 4), 100, dtype=torch.uint8)
    bright = augment(gray, brightness=0.3)[:, 0, 0, 0]
    assert bright.min() >= 70
    assert bright.max() <= 130
    assert bright.float().std() > 5
    # Contrast moves pixels about the picture's mean: a plain picture has nothing to move.
    assert torch.equal(augment(gray, contrast=0.9), gray)
    halves = gray.clone()
    halves[..., :2] = 50
    contrasted = augment(halves, contrast=0.5).float()
    assert (contrasted.mean(dim=(1, 2, 3)) - 75).abs().max() <= 0.5
    spread = contrasted[:, 0, 0, 3] - contrasted[:, 0, 0, 0]
    assert spread.min() >= 24
    assert spread.max() <= 76
    assert spread.std() > 5


def test_grayscale_saturation_and_hue() -> None:
    images = some_images()
    gray = augment(images, grayscale=1.0).int()
    luma = (torch.tensor([0.299, 0.587, 0.114])[:, None, None] * images).sum(dim=1)
    assert (gray - luma[:, None]).abs().max() <= 0.51
    plain_gray = torch.full((8, 3, 4, 4), 90, dtype=torch.uint8)
    assert torch.equal(augment(plain_gray, hue=0.5, saturation=0.9), plain_gray)
    muted = torch.tensor([150, 100, 110], dtype=torch.uint8)[None, :, None, None].expand(30, 3, 2, 2)
    turned = augment(muted, hue=0.1)[:, :, 0, 0].float() / 255
    hues = [colorsys.rgb_to_hsv(*colour)[0] for colour in turned.tolist()]
    start = colorsys.rgb_to_hsv(150 / 255, 100 / 255, 110 / 255)[0]
    moved = [(hue - start + 0.5) % 1 - 0.5 for hue in hues]
    assert max(map(abs, moved)) <= 0.12
    assert max(moved) > 0.05
    assert min(moved) < -0.05


def test_erased_box_has_one_colour_and_the_stated_area() -> None:
    images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    changed = augment(images, erase=1.0, erase_area=(0.1, 0.3))
    for image in changed:
        box = image.amax(dim=0) > 0
        assert 0.07 <= box.float().mean() <= 0.34
        assert len(image[:, box].unique(dim=1)[0]) == 1
        rows, columns = box.any(dim=1).sum(), box.any(dim=0).sum()
        assert rows * columns == box.sum()
    assert torch.equal(augment(images, erase=0.0), images)


def token_rows(rows: list[list[int]], width: int) -> torch.Tensor:
    token_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, inner in enumerate(rows):
        row = [START, *inner, END]
        token_ids[index, : len(row)] = torch.tensor(row)
    return token_ids


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, START - 1), max_size=8), min_size=1, max_size=4),
    probability=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_dropped_rows_are_subsequences(rows: list[list[int]], probability: float, seed: int) -> None:
    token_ids, chance = token_rows(rows, 12), torch.rand(len(rows), 12, generator=seeded(seed))
    dropped, mask = drop_tokens(token_ids, mask_to_end(token_ids), probability, chance)
    assert torch.equal(mask, mask_to_end(dropped))
    assert dropped.shape == (len(rows), 12)
    for inner, row in zip(rows, dropped.tolist(), strict=True):
        end = row.index(END)
        assert row[0] == START
        assert not any(row[end + 1 :])
        remaining = iter(inner)
        assert all(token in remaining for token in row[1:end])


def test_drop_tokens_frequency_and_limits() -> None:
    token_ids = token_rows([list(range(1, 71))] * 200, 77)
    mask, chance = mask_to_end(token_ids), torch.rand(200, 80, generator=seeded())
    assert torch.equal(drop_tokens(token_ids, mask, 0.0, chance)[0], token_ids)
    everything, _ = drop_tokens(token_ids, mask, 1.0, chance)
    assert torch.equal(everything[:, :3], torch.tensor([START, END, 0]).expand(200, 3))
    kept = drop_tokens(token_ids, mask, 0.25, chance)[1].sum(dim=1).float() - 2
    assert abs(kept.mean().item() / 70 - 0.75) < 0.02
    with pytest.raises(ValueError, match="probability"):
        drop_tokens(token_ids, mask, 1.5, chance)


def test_an_item_is_changed_alike_whoever_holds_it() -> None:
    """Workers draw for the whole batch and keep their own items' numbers."""
    images, present = some_images(6), torch.ones(6, dtype=torch.bool)
    whole = augment_images(images, present, STRONG, Draws(seeded(), 6))
    for own in (torch.tensor([0, 1]), torch.tensor([2, 4, 5]), torch.tensor([], dtype=torch.int64)):
        share = augment_images(images[own], present[own], STRONG, Draws(seeded(), 6, own))
        assert (share.int() - whole[own].int()).abs().sum() <= 3  # rounding of a few values
    assert not torch.equal(whole, augment_images(images, present, STRONG, Draws(seeded(1), 6)))


def test_hidden_tokens_are_hidden_as_in_bert() -> None:
    ids = torch.randint(10, 1000, (400, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(20) < torch.randint(2, 21, (400, 1), generator=torch.Generator().manual_seed(2))
    changed, hidden = hide_tokens(ids, mask, 0.3, 7, 1000, torch.Generator().manual_seed(3))
    inner = mask & mask.roll(-1, dims=1) & (torch.arange(20) > 0)
    inner[:, -1] = False
    assert not (hidden & ~inner).any()
    assert torch.equal(changed[~hidden], ids[~hidden])
    assert float(hidden.sum() / inner.sum()) == pytest.approx(0.3, abs=0.03)
    masked, same = (changed == 7)[hidden].float().mean(), (changed == ids)[hidden].float().mean()
    assert float(masked) == pytest.approx(0.8, abs=0.05)
    assert float(same) == pytest.approx(0.1, abs=0.04)
