"""Stage two beside the paper's form: held-out golds, a normalised gate, a calibrated mixture, frozen units."""

from pathlib import Path

import pytest
import torch

from dsmip.config import ExperimentConfig, TrainConfig
from dsmip.data.collate import Collator
from dsmip.data.dataset import Dataset
from dsmip.data.table import Table
from dsmip.errors import UserError
from dsmip.runs.load_config import parse_config
from dsmip.runs.run import Run
from dsmip.training.batches import StreamSource, is_held_out
from dsmip.training.stages import held_out_rows, stage_two_split
from dsmip.training.trainer import trained_state
from dsmip.units.matcher import BatchGold
from tests.support.scoring.systems import features, whole

NUM_MENTIONS, NUM_ENTITIES = 5, 6
COLUMN_M = torch.tensor([0, 3, 1, 1, 5])


def gold() -> BatchGold:
    same_ME = torch.zeros(NUM_MENTIONS, NUM_ENTITIES, dtype=torch.bool)
    same_ME[1, 4] = True
    return BatchGold(COLUMN_M, same_ME)


def test_mixture_loss_is_the_likelihood_of_a_mixture(small_config: ExperimentConfig) -> None:
    matcher = whole(small_config, choice="mention", training="mixture", calibration="scale")
    with torch.no_grad():
        matcher.log_scale_B.copy_(torch.tensor([0.05, -0.03, 0.01]))
    mentions, entities = features(small_config, NUM_MENTIONS, 2), features(small_config, NUM_ENTITIES, 3)
    matcher.requires_grad_(False)
    loss = matcher(mentions, entities, gold())
    prepared_M, prepared_E = matcher.prepare_mentions(mentions), matcher.prepare_entities(entities)
    pi_MB = matcher.gate.log_pi(prepared_M.under("gate"), prepared_E.under("gate"))[:, 0].exp()
    expected = 0.0
    for m in range(NUM_MENTIONS):
        likelihood = 0.0
        for b, (name, scale) in enumerate(zip(("text", "visual", "multimodal"), (0.5, -0.3, 0.1), strict=True)):
            expert = matcher.experts[name]
            scores_E = expert.score(prepared_M.under(name), prepared_E.under(name)).total_ME[m].double()
            weights_E = (scores_E * torch.tensor(scale).double().exp()).exp()
            counted = [e for e in range(NUM_ENTITIES) if not (m == 1 and e == 4)]
            likelihood += float(pi_MB[m, b]) * float(weights_E[COLUMN_M[m]] / weights_E[counted].sum())
        expected -= float(torch.tensor(likelihood).log())
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_calibration_scales_scores_and_keeps_each_experts_ranking(small_config: ExperimentConfig) -> None:
    matcher = whole(small_config, choice="mention", calibration="scale")
    mentions = matcher.prepare_mentions(features(small_config, NUM_MENTIONS, 2))
    entities = matcher.prepare_entities(features(small_config, NUM_ENTITIES, 3))
    before = matcher.score(mentions, entities)
    with torch.no_grad():
        matcher.log_scale_B.fill_(float(torch.tensor(3.0).log()) / 10)
    after = matcher.score(mentions, entities)
    torch.testing.assert_close(after.total_ME, 3 * before.total_ME)
    assert torch.equal(after.total_ME.argsort(dim=1), before.total_ME.argsort(dim=1))


def test_frozen_units_do_not_train(small_config: ExperimentConfig) -> None:
    frozen, tuned = whole(small_config, units="frozen"), whole(small_config)
    assert not any(name.startswith("experts.") for name in trained_state(frozen))
    assert any(name.startswith("experts.") for name in trained_state(tuned))


def test_projections_of_pictures_may_be_left_to_stage_one(small_config: ExperimentConfig) -> None:
    """As if they were of the encoders; all else of the units trains."""
    tuned, kept = (set(trained_state(whole(small_config, units=units))) for units in ("tuned", "projections_frozen"))
    assert kept < tuned
    left_out = {name.removeprefix("experts.").rpartition(".")[0] for name in tuned - kept}
    maps = ("image_cls_fc", "image_tokens_fc")
    assert left_out == {f"{part}.scorer.picture_norm.{name}" for part in ("visual", "multimodal") for name in maps}


def test_a_normalised_gate_sees_small_differences(small_config: ExperimentConfig) -> None:
    """Inputs that differ by a hundred-thousandth of their common value reach the logits, row by row in eval mode."""
    matcher = whole(small_config, choice="mention", inputs="normalised")
    table = features(small_config, 64, 5)
    tiny = {name: 7 + 1e-4 * table.dense(name) for name in ("gate.text", "gate.picture")}
    inputs = Table(tiny).under("gate")
    matcher.requires_grad_(False)
    gate = matcher.gate.train()
    for start in range(0, 64, 16):  # one short epoch is enough
        gate.prepare_mentions(inputs.rows(slice(start, start + 16)))
    normalised = gate.eval().mention_mlp[0](torch.cat([inputs.dense("text"), inputs.dense("picture")], dim=1))
    assert 0.7 < float(normalised.std(dim=0).min()) <= float(normalised.std(dim=0).max()) < 1.5
    logits_MB = gate.prepare_mentions(inputs).dense("logits")
    raw = whole(small_config, choice="mention").gate.prepare_mentions(inputs).dense("logits").detach()
    assert float(logits_MB.std(dim=0).min()) > 100 * float(raw.std(dim=0).max())
    torch.testing.assert_close(gate.prepare_mentions(inputs.rows(slice(3, 5))).dense("logits"), logits_MB[3:5])
    assert any("running_mean" in name for name in trained_state(matcher))  # else a checkpoint would lose it


def test_a_mixture_needs_the_choice_per_mention(small_config: ExperimentConfig) -> None:
    tree = small_config.model_dump(mode="json")
    tree["system"]["gate"] |= {"training": "mixture", "choice": "pair"}
    with pytest.raises(UserError, match="choice: mention"):
        parse_config(tree)


def test_held_out_golds_are_a_fixed_share() -> None:
    held = [is_held_out(f"Q{number}", 0.2) for number in range(5000)]
    assert 0.17 < sum(held) / len(held) < 0.23
    assert held == [is_held_out(f"Q{number}", 0.2) for number in range(5000)]
    assert not any(is_held_out(f"Q{number}", 0.0) for number in range(5000))


def test_the_stages_see_different_mentions(small_data: Dataset, small_config: ExperimentConfig, tmp_path: Path) -> None:
    config = small_config.model_copy(update={"held_out": 0.4})
    run = Run(tmp_path, config, small_data)
    collator: Collator = run.collator("text")
    source = StreamSource(small_data, "train", collator, TrainConfig(batch_size=8), 0, config.held_out)
    stage_one = [row for step in source.steps(0) for row in step.gold_row_M.tolist()]
    mentions = list(small_data.mentions("train"))
    table = Table({"number": torch.arange(len(mentions))})
    stage_two = stage_two_split(run, table)
    assert 0 < len(stage_two.gold_row_M) < len(mentions)
    assert set(stage_one).isdisjoint(stage_two.gold_row_M.tolist())
    assert len(stage_one) + len(stage_two.gold_row_M) == len(mentions)
    assert held_out_rows(small_data, 0.4).nonzero()[:, 0].tolist() == stage_two.mentions.dense("number").tolist()
    assert [mentions[n].entity_row for n in stage_two.mentions.dense("number")] == stage_two.gold_row_M.tolist()
