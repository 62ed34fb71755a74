"""The older baselines (BERT, JMEL, DZMNED, GHMFC): what each reads and makes of it, and that it learns."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmip.encoders.clip import Backbone
from dsmip.errors import UserError
from dsmip.models import find_system
from dsmip.runs.load_config import load_config, parse_config
from dsmip.units.matcher import BatchGold, Matcher
from tests.support.scoring.contract import ENTITIES, MENTIONS

FORMS: dict[str, dict[str, Any]] = {
    "bert": {"pooling": "tower", "markers": []},
    "jmel": {"width": 16},
    "dzmned": {"width": 16},
    "ghmfc": {"width": 16, "heads": 2, "layers": 1},
}


def built(narrow_backbone: Path, name: str, **settings: Any) -> Matcher:
    tree = {"model": name, "backbone": {"architecture": str(narrow_backbone)}, "system": {**FORMS[name], **settings}}
    matcher = find_system(name).build_part(name, parse_config(tree), with_encoder=True)
    return matcher.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_it_sees_what_it_reads(name: str, narrow_backbone: Path) -> None:
    matcher = built(narrow_backbone, name)
    other_pictures = replace(MENTIONS, images=MENTIONS.images.flip(0))
    other_names = replace(MENTIONS, extras={key: tensor.flip(0) for key, tensor in MENTIONS.extras.items()})

    def vectors(batch: Any) -> torch.Tensor:
        return matcher.prepare_mentions(matcher.encode_mentions(batch)).dense("vector")

    shown, found = MENTIONS.has_image, vectors(MENTIONS)
    assert torch.allclose(vectors(other_pictures)[~shown], found[~shown], atol=1e-6)  # no picture: none is seen
    assert torch.allclose(vectors(other_pictures)[shown], found[shown], atol=1e-6) == (name == "bert")
    assert torch.allclose(vectors(other_names), found, atol=1e-6) == (name != "dzmned")


@torch.no_grad()
def test_ghmfcs_entities_are_their_texts(narrow_backbone: Path) -> None:
    matcher = built(narrow_backbone, "ghmfc")
    features, unseen = (
        matcher.encode_entities(batch) for batch in (ENTITIES, replace(ENTITIES, images=ENTITIES.images.flip(0)))
    )
    assert torch.equal(features.dense("vector"), unseen.dense("vector"))


def test_ghmfc_contrasts_texts_with_pictures_of_other_golds(narrow_backbone: Path) -> None:
    """The contrast is all of the loss where no triplet is violated, and nothing where all have one gold."""
    plain, contrasting = (built(narrow_backbone, "ghmfc", contrast_weight=weight) for weight in (0.0, 1.0))
    contrasting.load_state_dict(plain.state_dict())
    mentions, entities = plain.encode_mentions(MENTIONS.rows(0, 4)), plain.encode_entities(ENTITIES.rows(0, 4))
    for golds, differs in (([0, 1, 2, 3], True), ([5, 5, 5, 5], False)):
        gold = BatchGold.from_rows(torch.tensor(golds), torch.tensor(golds), torch.arange(4))
        one, other = (float(matcher(mentions, entities, gold).detach()) for matcher in (plain, contrasting))
        assert (abs(one - other) > 1e-3) == differs


def test_the_first_token_of_a_causal_tower_is_refused(narrow_backbone: Path) -> None:
    tree = {"model": "bert", "backbone": {"architecture": str(narrow_backbone)}, "system": {"markers": []}}
    backbone = Backbone.build(str(narrow_backbone), None, device="meta")
    with pytest.raises(UserError, match=r"system.pooling: first: the first token of .* sees no other one"):
        find_system("bert").check(parse_config(tree), backbone)


def test_words_that_a_template_lacks_are_not_pooled(narrow_backbone: Path) -> None:
    system = {"pooling": "word", "markers": [], "template": {"mention": "{sentence}"}}
    tree = {"model": "bert", "backbone": {"architecture": str(narrow_backbone)}, "system": system}
    backbone = Backbone.build(str(narrow_backbone), None, device="meta")
    with pytest.raises(UserError, match=r"system.template.mention must have \{word\}"):
        find_system("bert").check(parse_config(tree), backbone)


@torch.no_grad()
def test_bert_pools_the_tokens_of_the_word(narrow_backbone: Path) -> None:
    """And the first token where the word was cut off."""
    matcher, plain = (built(narrow_backbone, "bert", pooling=pooling) for pooling in ("word", "first"))
    places = torch.zeros_like(MENTIONS.token_mask)
    places[0, 1:3] = True
    found, first = (
        each.encode_mentions(replace(MENTIONS, extras={"word_places": places})).dense("text")
        for each in (matcher, plain)
    )
    tokens = matcher.get_submodule("encoder.backbone").encode_text(MENTIONS.token_ids, MENTIONS.token_mask).tokens
    torch.testing.assert_close(found[0], tokens[0, 1:3].mean(dim=0))
    torch.testing.assert_close(found[1:], first[1:])


def test_markers_that_the_vocabulary_lacks_are_refused(narrow_backbone: Path) -> None:
    tree = {"model": "bert", "backbone": {"architecture": str(narrow_backbone)}, "system": {"pooling": "tower"}}
    backbone = Backbone.build(str(narrow_backbone), None, device="meta")
    with pytest.raises(UserError, match=r"has CLIP's vocabulary, without \[SEP\]"):
        find_system("bert").check(parse_config(tree), backbone)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("data", ["wikimel", "richpediamel", "wikidiverse"])
def test_shipped_configurations(name: str, data: str) -> None:
    config = load_config(f"{name}_{data}")
    assert config.model == name
    assert config.train_of(name).validate_every == 2
