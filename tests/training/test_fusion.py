"""Stage two of fused experts: scales and gate, and what a sweep's winner is held against."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dsmip.config import ExperimentConfig, TrainConfig
from dsmip.data.table import Table
from dsmip.errors import UserError
from dsmip.evaluation.experts.survey import KeptScores, informed, survey
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.preparation import HAS_IMAGE, prepare_entities
from dsmip.evaluation.ranking import rank_unrefined
from dsmip.models.dsmip import Dsmip, DsmipMatcher
from dsmip.ops.experts.fusion import fit_scale
from dsmip.runs.load_config import changed, parse_config
from dsmip.training.fusion.figures import validation_figures
from dsmip.training.fusion.fit import LOG_LIKELIHOOD, PRODUCT_LOG_LIKELIHOOD, fit_gate, prepared_split
from dsmip.training.local_context import LocalContext
from dsmip.training.validation.validation import SplitFeatures
from dsmip.units.fusion.matcher import FusedMatcher
from dsmip.units.gate import PRESETS
from tests.support.scoring.matchers import CPU
from tests.support.scoring.systems import features, seeded, with_system

NUM_MENTIONS, NUM_ENTITIES = 40, 23
ALL = torch.arange(NUM_ENTITIES)
SETTINGS = TrainConfig(epochs=6, batch_size=8, learning_rate=0.01)


def built(config: ExperimentConfig, **gate: Any) -> FusedMatcher:
    settings = with_system(config, gate={**PRESETS["confidence"], "width": 8, **gate})
    matcher = seeded(1, lambda: Dsmip.build_whole(settings))
    assert isinstance(matcher, FusedMatcher)
    return matcher.eval()


def kb(config: ExperimentConfig) -> Table:
    return features(config, NUM_ENTITIES, 3).merged(Table({HAS_IMAGE: torch.ones(NUM_ENTITIES, dtype=torch.bool)}))


def split(config: ExperimentConfig, matcher: FusedMatcher, seed: int) -> SplitFeatures:
    """The text expert knows the golds of the first half of mentions, the visual expert those of the second."""
    mentions = features(config, NUM_MENTIONS, seed)
    with torch.no_grad():
        prepared, entities = (
            matcher.prepare_mentions(mentions),
            matcher.prepare_entities(features(config, NUM_ENTITIES, 3)),
        )
        best = [
            matcher.experts[name].score(prepared.under(name), entities.under(name)).total_ME.argmax(dim=1)  # type: ignore[operator]
            for name in ("text", "visual")
        ]
    return SplitFeatures(mentions, torch.where(torch.arange(NUM_MENTIONS) % 3 == 0, best[0], best[1]))


@pytest.mark.parametrize("inputs", ["confidence", "both", "normalised", "raw"])
def test_a_gate_learns_the_likelihood_of_the_mixture_and_is_ranked_with(
    small_config: ExperimentConfig, tmp_path: Path, inputs: str
) -> None:
    matcher = built(small_config, inputs=inputs, dropout=0.0)
    training, validation = (split(small_config, matcher, seed) for seed in (2, 5))
    units = {name: tensor.clone() for name, tensor in matcher.experts.state_dict().items()}
    result = fit_gate(matcher, training, validation, kb(small_config), SETTINGS, LocalContext(tmp_path), seed=0)
    losses = [each["loss"] for each in result.history]
    assert losses[-1] < losses[0]
    assert result.best[LOG_LIKELIHOOD] == max(each[LOG_LIKELIHOOD] for each in result.history)
    assert 0 < result.best["mrr"] <= 1
    assert all(torch.equal(tensor, units[name]) for name, tensor in matcher.experts.state_dict().items())
    assert bool((matcher.scale_B != 1).all())
    again = built(small_config, inputs=inputs, dropout=0.0)
    repeated = fit_gate(
        again, training, validation, kb(small_config), SETTINGS, LocalContext(tmp_path / "again"), seed=0
    )
    assert repeated.history == result.history


def test_the_gate_of_a_product_learns_the_likelihood_of_the_product(
    small_config: ExperimentConfig, tmp_path: Path
) -> None:
    """Over all entities, by the full matrices; its powers are what the golds are ranked by."""
    matcher = built(small_config, scoring="product", dropout=0.0)
    assert matcher.gate is not None
    training, validation = (split(small_config, matcher, seed) for seed in (2, 5))
    result = fit_gate(matcher, training, validation, kb(small_config), SETTINGS, LocalContext(tmp_path), seed=0)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    index = EntityIndex([prepare_entities(matcher, kb(small_config), range(NUM_ENTITIES), CPU)])
    model = prepared_split(matcher, validation, index, CPU)
    found = survey(model, CPU)
    with torch.no_grad():
        power_MB = matcher.gate.logits(matcher.gate.inputs(Table({}), found)).exp()
        log_p = [
            torch.log_softmax(expert.score(model.mentions.under(name), index.under(name).take(ALL)).total_ME * scale, 1)
            for name, (expert, scale) in matcher.surveyed().items()
        ]
    total_ME = (torch.stack(log_p, dim=2) * power_MB[:, None]).sum(dim=2)
    expected = -torch.nn.functional.cross_entropy(total_ME, validation.gold_row_M)
    assert result.best[PRODUCT_LOG_LIKELIHOOD] == pytest.approx(float(expected), abs=1e-4)
    ranked = rank_unrefined(informed(model, found), CPU).metrics()
    assert ranked["hits@1"] == pytest.approx(hits(total_ME, validation))


def test_a_gate_of_five_experts_learns(small_config: ExperimentConfig, tmp_path: Path) -> None:
    """Three numbers of each expert, and three of each of ten pairs."""
    five = ["text", "visual", "multimodal", "text_image", "image_text"]
    config = with_system(small_config, experts={"text_image": {}, "image_text": {}}, use=five)
    matcher = built(config, dropout=0.0)
    assert matcher.gate is not None
    assert matcher.gate.mean_F.shape == (45,)
    training, validation = (split(config, matcher, seed) for seed in (2, 5))
    result = fit_gate(matcher, training, validation, kb(config), SETTINGS, LocalContext(tmp_path), seed=0)
    losses = [each["loss"] for each in result.history]
    assert losses[-1] < losses[0]
    assert tuple(matcher.surveyed()) == tuple(five)


def test_gates_of_the_same_experts_share_their_scores(small_config: ExperimentConfig, tmp_path: Path) -> None:
    matcher = built(small_config)
    training, validation = (split(small_config, matcher, seed) for seed in (2, 5))
    data, kept = (training, validation, kb(small_config), SETTINGS), (KeptScores(), KeptScores())
    whole = fit_gate(matcher, *data, LocalContext(tmp_path / "whole"), seed=0)
    for name in ("first", "second"):
        again = fit_gate(built(small_config), *data, LocalContext(tmp_path / name), seed=0, kept=kept)
        assert again.history == whole.history


def test_a_paused_training_goes_on_as_if_it_had_not_been(small_config: ExperimentConfig, tmp_path: Path) -> None:
    matcher = built(small_config)
    training, validation = (split(small_config, matcher, seed) for seed in (2, 5))
    data = training, validation, kb(small_config), SETTINGS
    whole = fit_gate(matcher, *data, LocalContext(tmp_path / "whole"), seed=0)
    paused = built(small_config)
    fit_gate(paused, *data, LocalContext(tmp_path / "paused"), seed=0, stop_epoch=2)
    result = fit_gate(built(small_config), *data, LocalContext(tmp_path / "paused"), seed=0)
    assert [each["loss"] for each in result.history] == [each["loss"] for each in whole.history]
    assert result.best["mrr"] == whole.best["mrr"]


def test_figures_beside_a_gate_are_those_of_the_full_matrices(small_config: ExperimentConfig) -> None:
    matcher = seeded(1, lambda: Dsmip.build_fusion("mean", small_config)).eval()
    training, validation = (split(small_config, matcher, seed) for seed in (2, 5))
    figures = validation_figures(matcher, training, validation, kb(small_config), CPU)
    with torch.no_grad():
        entities = matcher.prepare_entities(features(small_config, NUM_ENTITIES, 3))

        def scores(of: SplitFeatures, name: str) -> torch.Tensor:
            mentions = matcher.prepare_mentions(of.mentions).under(name)
            total_ME: torch.Tensor = matcher.experts[name].score(mentions, entities.under(name)).total_ME
            return total_ME

        log_p = []
        for b, name in enumerate(("text", "visual", "multimodal")):
            scale = fit_scale(scores(training, name), training.gold_row_M)
            assert float(matcher.scale_B[b]) == pytest.approx(scale, rel=1e-3)
            log_p.append(torch.log_softmax(scores(validation, name).double() * scale, dim=1))
            assert figures[name]["hits@1"] == hits(log_p[-1], validation)
    assert figures["mean"]["hits@1"] == hits(torch.stack(log_p).logsumexp(0), validation)
    assert figures["product"]["hits@1"] == hits(torch.stack(log_p).sum(0), validation)


def hits(total_ME: torch.Tensor, of: SplitFeatures) -> float:
    return float((total_ME.argmax(dim=1) == of.gold_row_M).double().mean())


def test_presets_are_forms_of_the_gate(small_config: ExperimentConfig) -> None:
    """A preset says what the gate is, whatever was said before, and is written out in full."""
    confident = changed(small_config, {"system": {"gate": {"preset": "confidence"}}})
    assert isinstance(Dsmip.build_whole(confident), FusedMatcher)
    gate = confident.system.gate.model_dump()
    assert (gate["inputs"], gate["scoring"], gate["width"], gate["picture"]) == ("confidence", "mixture", 32, "clip")
    assert "preset" not in gate
    assert Dsmip.feature_parts(confident.system) == ("text", "visual", "multimodal")
    paper = changed(confident, {"system": {"gate": {"preset": "paper"}}})
    assert isinstance(Dsmip.build_whole(paper), DsmipMatcher)
    form = paper.system.gate
    assert (form.inputs, form.choice, form.training, form.calibration) == ("raw", "pair", "sampled", "none")
    assert (form.units, form.final_activation, form.scoring) == ("tuned", "relu", "choice")


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ({"preset": "papre"}, "preset: there are paper, confidence, not 'papre'"),
        ({"scoring": "mixture"}, "needs choice: mention, training: mixture, units: frozen"),
        ({**PRESETS["confidence"], "units": "tuned"}, "needs units: frozen; preset: confidence"),
        ({**PRESETS["confidence"], "calibration": "scale"}, r"calibration: fitted \(or none\)"),
    ],
)
def test_a_form_that_cannot_be_is_said(small_config: ExperimentConfig, gate: dict[str, Any], said: str) -> None:
    tree = small_config.model_dump(mode="json")
    tree["system"]["gate"] |= gate
    with pytest.raises(UserError, match=said):
        parse_config(tree)
