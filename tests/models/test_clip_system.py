"""CLIP as a linker: what an item's vector is, and that its product with another is the score."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dsmip.config import ExperimentConfig
from dsmip.data.collate import ItemBatch
from dsmip.models.clip import Clip, ClipMatcher
from dsmip.runs.load_config import load_config, parse_config
from tests.support.scoring.contract import BACKBONE, ENTITIES, MENTIONS


def config(tmp_path: Path, **system: object) -> ExperimentConfig:
    path = tmp_path / "narrow.json"
    path.write_text(json.dumps(BACKBONE))
    return parse_config({"model": "clip", "backbone": {"architecture": str(path)}, "system": system})


def matcher(tmp_path: Path, **system: object) -> ClipMatcher:
    built = Clip.build_part("clip", config(tmp_path, **system), with_encoder=True)
    assert isinstance(built, ClipMatcher)
    return built


@torch.no_grad()
def test_a_vector_is_the_mean_of_text_and_picture_and_the_text_alone_without_one(tmp_path: Path) -> None:
    clip = matcher(tmp_path, image_weight=0.25)
    assert clip.encoder is not None
    towers = clip.encoder.backbone
    text = F.normalize(towers.encode_text(MENTIONS.token_ids, MENTIONS.token_mask).pooled, dim=-1)
    image = F.normalize(towers.encode_image(towers.normalise(MENTIONS.images, MENTIONS.has_image)).pooled, dim=-1)
    vectors = clip.encode_mentions(MENTIONS).dense("vector")
    for row, shown in enumerate(MENTIONS.has_image.tolist()):
        expected = 0.75 * text[row] + 0.25 * image[row] if shown else text[row]
        torch.testing.assert_close(vectors[row], expected / expected.norm())


@torch.no_grad()
def test_the_product_of_the_vectors_for_a_search_is_the_score(tmp_path: Path) -> None:
    clip = matcher(tmp_path)
    mentions = clip.prepare_mentions(clip.encode_mentions(MENTIONS))
    entities = clip.prepare_entities(clip.encode_entities(ENTITIES))
    scores = clip.score(mentions, entities).total_ME
    product = clip.global_vectors(mentions, "mentions") @ clip.global_vectors(entities, "entities").T
    assert torch.equal(scores, product)
    cosines = clip.encode_mentions(MENTIONS).dense("vector") @ clip.encode_entities(ENTITIES).dense("vector").T
    torch.testing.assert_close(scores, cosines / 0.07, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("weight", "ignored"), [(0.0, "images"), (1.0, "texts")])
def test_one_modality_may_be_all(tmp_path: Path, weight: float, ignored: str) -> None:
    clip, shown = matcher(tmp_path, image_weight=weight), MENTIONS.has_image
    other = ItemBatch(MENTIONS.token_ids, MENTIONS.token_mask, MENTIONS.images.flip(0), shown)
    if ignored == "texts":
        other = ItemBatch(MENTIONS.token_ids.flip(0), MENTIONS.token_mask.flip(0), MENTIONS.images, shown)
    one, two = (clip.encode_mentions(batch).dense("vector")[shown] for batch in (MENTIONS, other))
    torch.testing.assert_close(one, two)


def test_features_of_another_weight_are_others(tmp_path: Path) -> None:
    """The weight is no tensor of a tower, and yet features depend on it: the cache's key must."""
    one, two = (matcher(tmp_path, image_weight=weight).encoder_state() for weight in (0.25, 0.5))
    assert any(not torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", ["clip_wikimel", "clip_richpediamel", "clip_wikidiverse"])
def test_shipped_configurations(name: str) -> None:
    loaded = load_config(name)
    assert loaded.train_of("clip").validate_every == 2
    assert loaded.system.tune == "full"
