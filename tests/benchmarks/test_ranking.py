"""The benchmark at a size of seconds, and that its yardstick computes what the published code computes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.ranking import memory, published
from benchmarks.ranking.against_published import available_backends, main
from benchmarks.ranking.cases import CASES, build_matcher, feature_blocks
from benchmarks.ranking.contest import TOLERANCE as TOLERANCES
from benchmarks.ranking.contest import checked_difference
from dsmip.data.table import Column, Ragged, Table
from dsmip.encoders.base import FeatureSizes
from dsmip.evaluation.ranks import Cost, Ranking
from dsmip.models.mimic import MimicMatcher
from dsmip.ops.ranking import Counts
from dsmip.planning.probing.measure import measured
from dsmip.units.matcher import Scores
from dsmip.units.unit_scorer import UnitScorer
from tests.support.paths import MIMIC_UNITS

CPU = torch.device("cpu")
TOLERANCE = TOLERANCES["fp32"]


def golden_matcher_and_features() -> tuple[MimicMatcher, Table, Table, Tensor]:
    golden = {name: torch.from_numpy(value) for name, value in np.load(MIMIC_UNITS).items()}
    matcher = MimicMatcher(UnitScorer(("text", "image"), FeatureSizes(64, 96, 64), 24, mask_padding=False))
    matcher.load_published_state_dict(
        {name.removeprefix("weights/"): t for name, t in golden.items() if name.startswith("weights/")}
    )

    def stored(side: str) -> Table:
        features: dict[str, Column] = {
            "text_global": golden[f"inputs/{side}_text_cls"],
            "text_tokens": Ragged.from_padded(golden[f"inputs/{side}_text_tokens"]),
            "image_global": golden[f"inputs/{side}_image_cls"],
            "image_tokens": Ragged.from_padded(golden[f"inputs/{side}_image_tokens"]),
        }
        return published.stored_features(matcher, Table(features))

    return matcher, stored("mention"), stored("entity"), golden["scores/mean"]


def test_the_published_logic_gives_the_published_scores_and_ranks_for_any_batches() -> None:
    matcher, mentions, entities, scores_ME = golden_matcher_and_features()
    gold_M = torch.tensor([3, 0, 10, 7, 2])
    rank_M = 1 + (scores_ME > scores_ME.gather(1, gold_M[:, None])).sum(dim=1)
    for sizes in ({}, {"mention_batch": 2, "entity_chunk": 4}):
        ranked = published.rank(matcher, mentions, entities, gold_M, CPU, **sizes)
        torch.testing.assert_close(ranked.scores.total_ME, scores_ME, atol=1e-4, rtol=1e-5)
        assert torch.equal(ranked.rank_M, rank_M)


def test_the_published_logic_chooses_experts_as_the_gate_does() -> None:
    case = CASES["dsmip-padded"]
    matcher = build_matcher(case, CPU)
    (mentions, _), (entities, _) = (
        next(feature_blocks(case, "mentions", 4, CPU)),
        next(feature_blocks(case, "entities", 7, CPU)),
    )
    stored = [published.stored_features(matcher, side) for side in (mentions, entities)]
    with torch.no_grad():
        ours = matcher.score(matcher.prepare_mentions(mentions), matcher.prepare_entities(entities))
    theirs = published.score(matcher, *stored)
    assert theirs.chosen_ME is not None
    assert ours.chosen_ME is not None
    assert torch.equal(theirs.chosen_ME, ours.chosen_ME)
    assert len(theirs.chosen_ME.unique()) == 3
    torch.testing.assert_close(theirs.total_ME, ours.total_ME, atol=TOLERANCE, rtol=0)


def test_texts_of_their_own_lengths_share_the_padded_ones_features() -> None:
    full, own = next(feature_blocks(CASES["dsmip-ragged"], "entities", 300, CPU))
    for name in ("text.text_tokens", "multimodal.text_tokens"):
        lengths_N = own.ragged(name).lengths
        assert 4 <= int(lengths_N.min()) < int(lengths_N.max()) <= 77
        assert 19 < float(lengths_N.double().mean()) < 25
        assert set(full.ragged(name).lengths.tolist()) == {77}
        assert own.ragged(name).values is full.ragged(name).values


def test_scores_that_differ_are_refused() -> None:
    scores_ME = torch.linspace(-30, 30, 24).view(4, 6)
    assert checked_difference("x", Scores(scores_ME), Scores(scores_ME + TOLERANCE / 4), TOLERANCE) == pytest.approx(
        TOLERANCE / 4, rel=0.1
    )
    for wrong in (scores_ME + 4 * TOLERANCE, scores_ME * torch.nan):
        with pytest.raises(RuntimeError, match="mimic-40, torch: scores differ by"):
            checked_difference("mimic-40, torch", Scores(scores_ME), Scores(wrong), TOLERANCE)


def test_pairs_of_another_expert_are_left_out_unless_they_are_many() -> None:
    scores_ME, chosen_ME = torch.zeros(40, 50), torch.zeros(40, 50, dtype=torch.int64)
    other_ME, other_chosen_ME = scores_ME.clone(), chosen_ME.clone()
    other_ME[3, 4], other_chosen_ME[3, 4] = 7.0, 1
    theirs = Scores(scores_ME, chosen_ME)
    assert checked_difference("x", theirs, Scores(other_ME, other_chosen_ME), TOLERANCE) == 0
    other_chosen_ME[5] = 2
    with pytest.raises(RuntimeError, match="of the pairs go to another expert"):
        checked_difference("x", theirs, Scores(other_ME, other_chosen_ME), TOLERANCE)


def test_the_work_of_text_units_is_counted_by_computed_pairs_and_tokens() -> None:
    mentions = Table(
        {"x.key": Ragged.from_padded(torch.zeros(2, 3, 8)), "y.key": Ragged.from_padded(torch.zeros(2, 5, 8))}
    )
    entities = Table({f"{name}.query": Ragged.from_padded(torch.zeros(7, 6, 8)) for name in "xy"})
    everything = Ranking(Counts(torch.zeros(2), torch.zeros(2)), torch.zeros(2, 0), torch.zeros(2, 0))
    assert roofline.work(mentions, entities, everything) == roofline.Rates(28 * 2 * 8 * 4 * 7, 28 * 4 * 6)
    half = replace(everything, cost=Cost(torch.tensor([[7, 14], [3, 14]])))
    assert roofline.work(mentions, entities, half).exponentials == 10 * 4 * 6


def test_memory_is_that_of_the_work_alone() -> None:
    for _ in range(2):  # the second time freed memory could be used again
        kept, cost = measured(lambda: torch.ones(2**23).sum(), CPU)
        if cost.peak_bytes is None:
            pytest.skip("this system does not tell the peak")
        assert float(kept) == 2**23
        assert 30 <= cost.peak_bytes / 2**20 < 60  # 32; the kernel counts pages roughly


@pytest.mark.soak
def test_memory_is_measured_for_every_case_and_size(capsys: pytest.CaptureFixture[str]) -> None:
    memory.main(["--entities", "50", "700", "--mentions", "3"])
    said = capsys.readouterr().out
    assert [said.count(name) for name in ("mimic", "dsmip", "50", "700")] == [2, 2, 2, 2]


@pytest.mark.slow
def test_a_small_run_writes_a_row_for_every_case_and_backend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    main([*["--mentions", "2", "--entities", "200", "--published-entities", "5", "--rounds", "2", "--json"], str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["case"], row["backend"]) for row in rows] == [
        (case, name) for case in CASES for name in available_backends(CPU)
    ]
    for row in rows:
        assert row["ranks_equal"] is True
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["pairs_per_s"] > 0
        assert row["same_function"] == (row["case"] != "dsmip-ragged")
        assert "peak_mib" in row
    shown = capsys.readouterr().out
    assert all(case in shown for case in CASES)
    assert "ours: 2 mentions x 200 entities; published: 2 x 5" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--case mimic-41", "mimic-40"),
        ("--entities 0", "0 is less than 1"),
        ("--device tpu", "--device tpu is unknown; known: cpu, cuda"),
    ],
)
def test_wrong_options_are_named(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
