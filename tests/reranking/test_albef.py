"""ALBEF from end to end: towers and fusion encoder trained together, then that encoder over the towers' best."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dsmip
from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip.config import ExperimentConfig, TrainConfig
from dsmip.data.collate import ItemBatch
from dsmip.data.dataset import Dataset
from dsmip.encoders.clip import Backbone
from dsmip.errors import UserError
from dsmip.models.cross_encoders.albef import FUSION, TOWERS, Albef
from dsmip.reranking.training import train_any_part
from dsmip.runs.load_config import changed, load_config, parse_config
from dsmip.runs.run import Run
from dsmip.training.batches import StreamSource
from dsmip.training.gradients import batch_backward
from dsmip.training.local_context import LocalContext
from dsmip.training.stages import CPU
from dsmip.units.matcher import Matcher
from tests.support.encoders.backbones import NARROW_BACKBONE
from tests.support.encoders.small_bert import write_small_bert
from tests.support.small_release import image_bytes, write_release

SYSTEM: dict[str, Any] = {"layers": 1, "heads": 2, "candidates": 4, "num_tokens": 12, "masked_weight": 0.5}
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "grey", "pink")


def albef(folder: Path, dataset: Dataset, **train: Any) -> ExperimentConfig:
    """With a small BERT and a narrow vision transformer."""
    texts = [f"{entity.name} {entity.attributes} :" for entity in dataset.entities()]
    texts += [mention.sentence for mention in dataset.mentions("train")]
    words = sorted({word for text in texts for word in text.replace(",", " , ").split()})
    bert = str(write_small_bert(folder / "bert", words))
    text = {"hf_model_name": bert, "hf_tokenizer_name": bert, "hf_pooler_type": "mean_pooler", "context_length": 24}
    network = {**NARROW_BACKBONE, "text_cfg": {**text, "hf_proj_type": "linear"}}
    (folder / "backbone.json").write_text(json.dumps(network))
    backbone = {"architecture": str(folder / "backbone.json")}
    return parse_config({"model": "albef", "backbone": backbone, "system": SYSTEM, "train": {"batch_size": 8, **train}})


@pytest.fixture(scope="module")
def trained(small_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """For one epoch each: what it knows does not matter."""
    folder = tmp_path_factory.mktemp("albef")
    run = Run.create(folder / "run", albef(folder, small_data, epochs=1, learning_rate=2e-3), small_data)
    for part in run.part_names:
        train_any_part(run, part, LocalContext(folder / part))
    return run


@pytest.fixture(scope="module")
def items(trained: Run) -> tuple[ItemBatch, ItemBatch]:
    """The mentions of the test split and the kb."""
    collator = trained.collator(FUSION)
    mentions = collator.mentions(list(trained.dataset.mentions("test")))
    return mentions, collator.entities(list(trained.dataset.entities()))


def coloured_things(folder: Path) -> Dataset:
    """Things whose colour the sentence says and the picture shows, 120 of training: the colour is the answer."""
    kb = [
        {"qid": f"Q{n}", "entity_name": c, "attr": "a colour", "image_list": [f"{c}.jpg"]}
        for n, c in enumerate(COLOURS)
    ]
    files = {f"{place}/{c}.jpg": image_bytes((16, 16), c) for c in COLOURS for place in ("kb_image", "mention_image")}
    records: dict[str, list[Any]] = {"kb": kb, "train": [], "dev": [], "test": []}
    for number in range(144):
        row = number * 5 % len(COLOURS)
        mention = {
            "id": f"m{number}",
            "sentence": f"a {COLOURS[row]} thing, number {number % 7}",
            "mentions": COLOURS[row],
            "answer": f"Q{row}",
            "imgPath": f"{COLOURS[row]}.jpg" if number % 3 else "",
        }
        records["train" if number < 120 else "dev" if number < 132 else "test"].append(mention)
    prepare(MimicRelease(write_release(folder / "release", records, files)), folder / "data", DatasetOptions(name="c"))
    return Dataset.open(folder / "data")


@pytest.mark.slow
def test_the_fusion_encoder_learns_what_the_towers_have_not(tmp_path: Path) -> None:
    """They have seen the data once, at a low rate. By chance the gold is one of eight, and one of six candidates."""
    data = coloured_things(tmp_path)
    config = albef(tmp_path, data, epochs=9, learning_rate=4e-3)
    parts = {TOWERS: {"train": {"epochs": 1, "learning_rate": 1e-4}}, FUSION: {"train": {"batch_size": 4}}}
    run = Run.create(tmp_path / "run", changed(config, {"parts": parts, "system": {"candidates": 6}}), data)
    for part in run.part_names:
        train_any_part(run, part, LocalContext(tmp_path / part))
    first, second = (run.part_report(part) for part in (TOWERS, FUSION))
    assert second["best"]["hits@1"] > max(first["best"]["hits@1"], 0.8)


def test_ranks_are_over_the_whole_kb_and_the_towers_are_beside(trained: Run) -> None:
    found = dsmip.evaluate(trained.folder, "test").metrics
    assert found["model"] == "albef"
    assert (found["first_stage"]["model"], found["first_stage"]["candidates"]) == (TOWERS, 4)
    assert found["overall"]["hits@1"] <= found["first_stage"]["gold_recall"]


@torch.no_grad()
def test_the_fusion_encoder_goes_on_from_the_towers_training(trained: Run) -> None:
    first = trained.load_part(TOWERS, with_encoder=True)
    reranker = Albef.build_reranker(FUSION, trained.config)
    reranker.start_from(first)
    learned = first.state_dict()
    assert all(torch.equal(tensor, learned[name]) for name, tensor in reranker.state_dict().items())
    finished = trained.load_reranker(FUSION).state_dict()
    assert not all(torch.equal(tensor, learned[name]) for name, tensor in finished.items())


@torch.no_grad()
def test_a_pairs_score_depends_on_the_pair_alone(trained: Run, items: tuple[ItemBatch, ItemBatch]) -> None:
    reranker, (mentions, entities) = trained.load_reranker(FUSION).eval(), items
    mention_P, entity_P = torch.tensor([0, 0, 5, 2]), torch.tensor([3, 0, 3, 10])
    together = reranker.score_pairs(mentions, entities, mention_P, entity_P)
    first = torch.tensor([0])
    alone = [
        reranker.score_pairs(mentions.rows(m, m + 1), entities.rows(e, e + 1), first, first)
        for m, e in zip(mention_P.tolist(), entity_P.tolist(), strict=True)
    ]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-5, rtol=1e-5)
    assert together.unique().numel() == 4
    assert reranker.score_pairs(mentions, entities, mention_P[:0], entity_P[:0]).shape == (0,)


@torch.no_grad()
def test_it_sees_texts_and_pictures_of_both_sides(trained: Run, items: tuple[ItemBatch, ItemBatch]) -> None:
    reranker, (mentions, entities) = trained.load_reranker(FUSION).eval(), items
    shown_P = torch.arange(len(mentions))
    assert 0 < int(mentions.has_image.sum()) < len(mentions)

    def scores(own: ItemBatch, others: ItemBatch) -> Tensor:
        return reranker.score_pairs(own, others, shown_P, shown_P)

    def changes(own: ItemBatch, others: ItemBatch) -> list[bool]:
        return (~torch.isclose(scores(own, others), scores(mentions, entities), atol=1e-7)).tolist()

    repainted = replace(mentions, images=255 - mentions.images)
    assert changes(repainted, entities) == mentions.has_image.tolist()
    repainted = replace(entities, images=255 - entities.images)
    assert changes(mentions, repainted) == entities.has_image[: len(mentions)].tolist()
    for side in (0, 1):
        both = [mentions, entities]
        ids = both[side].token_ids
        both[side] = replace(both[side], token_ids=torch.where(ids > 3, (ids + 1).clamp(max=40), ids))
        assert any(changes(*both))


def gradients(trained: Run, change: Callable[[Matcher], None], micro_batch_size: int | None) -> dict[str, Tensor]:
    matcher = Albef.build_part(TOWERS, trained.config, with_encoder=True)
    change(matcher)
    config = TrainConfig(batch_size=12, micro_batch_size=micro_batch_size)
    source = StreamSource(trained.dataset, "train", trained.collator(TOWERS), config, 0)
    torch.manual_seed(1)
    loss = batch_backward(matcher, next(source.steps(0)), config, CPU)
    found = {name: p.grad for name, p in matcher.named_parameters() if p.grad is not None}
    return {**found, "loss": torch.tensor(loss.mean)}


def test_micro_batches_train_the_fusion_encoder_as_one_batch(trained: Run) -> None:
    """Without dropout, whose draws depend on what is encoded together."""
    state = trained.load_part(TOWERS, with_encoder=True).state_dict()

    def finished(matcher: Matcher) -> None:
        matcher.load_state_dict(state)
        matcher.eval()

    whole, few = (gradients(trained, finished, size) for size in (None, 5))
    assert whole.keys() == few.keys()
    assert {"fusion.match.weight", "word.0.weight", "log_scale"} <= whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(few[name], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ({"masked_weight": 1.0}, "system.masked_weight: the vocabulary of .* has no token that hides another: set it"),
        ({"masked_weight": 0, "heads": 3}, "system.heads: 3 do not divide the 16 channels of text tokens"),
    ],
)
def test_what_a_backbone_cannot_hold_is_refused(system: dict[str, Any], message: str, narrow_backbone: Path) -> None:
    tree = {"model": "albef", "backbone": {"architecture": str(narrow_backbone)}, "system": {**SYSTEM, **system}}
    with pytest.raises(UserError, match=message):
        Albef.check(parse_config(tree), Backbone.build(str(narrow_backbone), None, device="meta"))


@pytest.mark.parametrize("data", ["wikimel", "richpediamel", "wikidiverse"])
def test_shipped_configurations(data: str) -> None:
    config = load_config(f"albef_{data}")
    assert config.model == "albef"
    assert set(config.parts) == {TOWERS, FUSION}
