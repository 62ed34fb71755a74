"""Every system with every kind of encoder: it trains on what its collator makes, or its configuration is refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmip.config import ExperimentConfig, TrainConfig
from dsmip.data.collate import Collator, ItemBatch
from dsmip.data.dataset import Dataset
from dsmip.data.table import Table
from dsmip.encoders.architecture import build_tokenizer, resolve_architecture
from dsmip.errors import UserError
from dsmip.models import find_system, systems
from dsmip.models.base import System
from dsmip.runs.load_config import parse_config
from dsmip.training.batches import Items, Step
from dsmip.training.gradients import batch_backward
from dsmip.units.matcher import Matcher, Part, Reranker
from tests.support.encoders.small_backbones import SMALL_BACKBONES
from tests.support.scoring.contract import CPU, on_meta, seeded
from tests.support.scoring.small_systems import SMALL_FORMS, refusal

tokenizer = cache(build_tokenizer)  # CLIP's takes half a second


def collator(system: type[System], part: str, config: ExperimentConfig) -> Collator:
    network, form = resolve_architecture(config.backbone.architecture), system.item_format(config.system, part)
    form = form if form.pixels is not None else replace(form, pixels=network.pixels)
    return Collator(tokenizer(network.name, form.markers), form, network.image_size)


def trains(part: Part) -> None:
    gradients = {name: p.grad for name, p in part.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(bool(gradient.any()) for gradient in gradients.values())


def check_matcher(matcher: Matcher, mentions: ItemBatch, entities: ItemBatch) -> None:
    """It reads what its collator makes and trains on it; scores and what is stored are the contract's."""
    rows = torch.arange(len(mentions))
    matcher.eval()
    features = matcher.encode_mentions(mentions), matcher.encode_entities(entities)
    for table, batch in zip(features, (mentions, entities), strict=True):
        check_features(table, batch)
    if any(parameter.requires_grad for parameter in matcher.parameters()):
        reads: tuple[Items, Items] = features
        if matcher.reads_items or matcher.encoder_trains():
            reads = mentions, entities
        step = Step(*reads, rows, torch.arange(len(entities)))
        matcher.train()
        with torch.enable_grad():
            batch_backward(matcher, step, TrainConfig(), CPU)
        trains(matcher)


def check_features(table: Table, batch: ItemBatch) -> None:
    assert len(table) == len(batch)
    values = [c if isinstance(c, Tensor) else c.values for c in table.columns.values()]
    assert all(each.dtype == torch.float32 and each.isfinite().all() for each in values)


def check_reranker(reranker: Reranker, mentions: ItemBatch, entities: ItemBatch) -> None:
    """The two mentions that it is trained on have three and two entities."""
    reranker.train()
    with torch.enable_grad():
        reranker(mentions.rows(0, 2), entities, torch.tensor([[0, 1, 2], [1, 3, -1]])).backward()
    trains(reranker)


QUICK = ("dsmip", "bert")
"""One system of tokens and pictures and one of texts; the others are slow tests."""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if name in QUICK else pytest.mark.slow)
        for name in systems()
        for kind in SMALL_BACKBONES
    ],
)
def test_a_system_works_with_an_encoder_or_says_why_not(
    name: str, kind: str, architecture_of: Callable[[str], str], small_data: Dataset
) -> None:
    system, backbone = find_system(name), {"architecture": architecture_of(kind)}
    config = parse_config({"model": name, "backbone": backbone, "system": SMALL_FORMS.get(name, {})})
    if (reason := refusal(name, kind)) is not None:
        with pytest.raises(UserError, match=reason):
            system.check(config, on_meta(architecture_of(kind)))
        return
    system.check(config, on_meta(architecture_of(kind)))
    mentions, entities = list(small_data.mentions("test"))[:3], list(small_data.entities())[:5]
    rerankers, parts = system.rerankers(config.system), system.part_names(config.system)
    with seeded(1), torch.no_grad():
        for part in dict.fromkeys((*parts, *system.feature_parts(config.system))):
            make = collator(system, part, config)
            items = make.mentions(mentions), make.entities(entities)
            if part in rerankers:
                check_reranker(system.build_reranker(part, config), *items)
            elif part in parts:
                check_matcher(system.build_part(part, config, with_encoder=True), *items)
            else:  # what a gate reads
                check_features(system.build_encoder(part, config).encode_entities(items[1]), items[1])


@pytest.mark.parametrize("kind", ["ResNet", "separate towers"])
def test_prompts_go_into_the_text_tower_alone_beside_a_convolutional_one(
    kind: str, architecture_of: Callable[[str], str], small_data: Dataset
) -> None:
    system = find_system("dsmip")

    def configured(**prompts: Any) -> ExperimentConfig:
        form = {**SMALL_FORMS["dsmip"], "experts": {"text": {}, "multimodal": prompts}, "use": ["text", "multimodal"]}
        return parse_config({"model": "dsmip", "backbone": {"architecture": architecture_of(kind)}, "system": form})

    config, plain = configured(prompt_length=2, prompt_depth=2, prompts_in="text"), configured()
    system.check(config, on_meta(architecture_of(kind)))
    make = collator(system, "multimodal", config)
    mentions, entities = (
        make.mentions(list(small_data.mentions("test"))[:3]),
        make.entities(list(small_data.entities())),
    )
    with seeded(1), torch.no_grad():
        expert = system.build_part("multimodal", config, with_encoder=True)
        prompted, without = (
            each.eval().encode_mentions(mentions)
            for each in (expert, system.build_part("multimodal", plain, with_encoder=True))
        )
        check_matcher(expert, mentions, entities)
    assert torch.equal(prompted.ragged("image_tokens").values, without.ragged("image_tokens").values)
    assert torch.equal(prompted.ragged("text_tokens").lengths, without.ragged("text_tokens").lengths + 2)
    trained = {name for name, p in expert.named_parameters() if p.grad is not None and "encoder" in name}
    assert trained == {"encoder.mention_prompts.tables_Jrt", "encoder.entity_prompts.tables_Jrt"}
