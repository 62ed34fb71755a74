"""Agreement of cheaper searches with the exact one, and which vectors a bundle finds candidates by."""

from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dsmip
from dsmip.data.dataset import Dataset
from dsmip.distillation.fit import FitOptions, Lesson, fit_projection
from dsmip.distillation.vectors import Projection
from dsmip.exporting import candidate_vectors
from dsmip.exporting.agreement import Probes, candidate_recall
from dsmip.exporting.candidate_vectors import choose_vectors, distil
from dsmip.linking import search
from dsmip.runs.load_config import changed
from dsmip.runs.run import Run
from tests.support.scoring.linked_runs import finished_run, small_system


@pytest.fixture(scope="module")
def linker(run: Run) -> dsmip.Linker:
    return dsmip.load(run.folder, model="multimodal")


@pytest.fixture(scope="module")
def probes(run: Run, linker: dsmip.Linker) -> Probes:
    return Probes.of(linker, list(islice(run.dataset.mentions("validation"), 5)))


def test_candidates_hold_more_the_more_they_are(linker: dsmip.Linker, probes: Probes) -> None:
    agreement = probes.agreement(linker, linker.search.index)
    assert (agreement.search, agreement.same_best, agreement.recall) == ("the index as stored", 1, 1)
    found = probes.recalls(linker.search.candidates, (2, 5, 10, 99))
    assert [each.k for each in found] == [2, 5, 10]
    for one, other in pairwise(found):
        assert one.best <= other.best <= 1
        assert one.gold <= other.gold <= 1


ROWS = st.lists(st.integers(0, 9), min_size=3, max_size=3, unique=True)


@given(st.lists(st.tuples(ROWS, st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5))
def test_a_recall_is_the_share_of_mentions_whose_entity_is_a_candidate(
    mentions: list[tuple[list[int], int, int]],
) -> None:
    rows, best, gold = map(list, zip(*mentions, strict=True))
    found = candidate_recall(torch.tensor(rows), torch.tensor(best), torch.tensor(gold))
    shares = [sum(row in of for of, row in zip(rows, wanted, strict=True)) / len(rows) for wanted in (best, gold)]
    assert found.k == 3
    assert [found.best, found.gold] == pytest.approx(shares)


def test_vectors_are_distilled_where_global_ones_hold_too_little(
    run: Run, linker: dsmip.Linker, probes: Probes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidate_vectors, "AT", 10)
    monkeypatch.setattr(candidate_vectors, "ENOUGH", 0.0)
    held = choose_vectors(linker, run.dataset, probes, "auto", seed=0)
    assert (held.distilled, list(held.recalls)) == (None, ["global"])
    monkeypatch.setattr(candidate_vectors, "ENOUGH", 1.1)
    said: list[str] = []
    chosen = choose_vectors(linker, run.dataset, probes, "auto", seed=0, notice=said.append)
    assert list(chosen.recalls) == ["global", "distilled"]
    assert (chosen.distilled is not None) == (chosen.recalls["distilled"][0].best > chosen.recalls["global"][0].best)
    assert "10 candidates hold" in said[0]
    assert choose_vectors(linker, run.dataset, None, "distilled", seed=0).distilled is not None
    assert choose_vectors(linker, run.dataset, None, "auto", seed=0).distilled is None


def test_a_lesson_is_the_same_whether_experts_scores_are_kept_or_not(
    small_data: Dataset, narrow_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused experts have scored the sampled entities among all of them."""
    config = changed(small_system("dsmip", narrow_backbone), {"system": {"gate": {"preset": "confidence"}}})
    linker = dsmip.load(finished_run(tmp_path / "run", config, small_data).folder)
    lessons = list[Lesson]()

    def fitted(lesson: Lesson, seed: int, options: FitOptions) -> Projection:
        lessons.append(lesson)
        return fit_projection(lesson, seed, options)

    monkeypatch.setattr(candidate_vectors, "fit_projection", fitted)
    monkeypatch.setattr(candidate_vectors, "MOST_ENTITIES", 5)
    for most_kept in (search.MOST_KEPT, 0):
        monkeypatch.setattr(search, "MOST_KEPT", most_kept)
        distil(linker, small_data, seed=0)
    kept, again = lessons
    assert kept.scores_ME.shape[1] == 5 < len(linker)
    torch.testing.assert_close(kept.scores_ME, again.scores_ME)
