"""Hard negatives against the full matrix, in one process and over slices of the kb."""

from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip import distributed
from dsmip.data.dataset import Dataset
from dsmip.evaluation.index import EntityIndex
from dsmip.training.validation.hard_negatives import alike_groups, best_entities
from tests.support.scoring.matchers import CPU, TableMatcher, numbered
from tests.support.small_release import write_release
from tests.support.training.workers import run_workers


def twin(scores_ME: Tensor, gold_row_M: Tensor, group_E: Tensor, k: int) -> list[list[int]]:
    """Sorted by hand: the best first, equal scores by row, nothing of the gold's group; -1 fills up."""
    found = []
    for scores_E, gold in zip(scores_ME.tolist(), gold_row_M.tolist(), strict=True):
        rows = [row for row in range(len(scores_E)) if group_E[row] != group_E[gold]]
        best = sorted(rows, key=lambda row: (-scores_E[row], row))[:k]
        found.append(best + [-1] * (k - len(best)))
    return found


def case(seed: int, num_entities: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores_ME = torch.randint(-3, 4, (5, num_entities), generator=generator).float()  # with ties
    gold_row_M = torch.randint(num_entities, (5,), generator=generator)
    return scores_ME, gold_row_M, torch.randint(max(num_entities // 2, 1), (num_entities,), generator=generator)


@given(seed=st.integers(0, 10_000), num_entities=st.integers(1, 12), k=st.integers(1, 6), cut=st.integers(0, 12))
def test_they_are_the_best_of_the_others(seed: int, num_entities: int, k: int, cut: int) -> None:
    scores_ME, gold_row_M, group_E = case(seed, num_entities)
    tables = [t for t in (numbered(min(cut, num_entities)), numbered(max(num_entities - cut, 0), cut)) if len(t)]
    matcher, index = TableMatcher(scores_ME), EntityIndex(tables)
    found = best_entities(matcher, numbered(5), index, group_E[gold_row_M], group_E, k, CPU).rows_MK
    assert found.tolist() == twin(scores_ME, gold_row_M, group_E, k)


def of_slice(num_entities: int) -> Tensor:
    scores_ME, gold_row_M, group_E = case(3, num_entities)
    first, stop = (num_entities * (distributed.rank() + n) // distributed.world_size() for n in (0, 1))
    index = EntityIndex([numbered(stop - first, first)], first)
    return best_entities(TableMatcher(scores_ME), numbered(5), index, group_E[gold_row_M], group_E, 4, CPU).rows_MK


def test_workers_find_the_same_over_their_slices(tmp_path: Path) -> None:
    found = run_workers(of_slice, 2, tmp_path, 9)
    assert found[0].tolist() == found[1].tolist() == twin(*case(3, 9), 4)


def test_what_reads_alike_shares_a_number(small_data: Dataset) -> None:
    groups = alike_groups(small_data)
    assert groups.tolist() == list(range(small_data.num_entities))  # all names differ there


def test_entities_of_the_same_text_share_a_number(tmp_path: Path) -> None:
    texts = [("Ash", "tree"), ("Ash", "town"), ("Ash", "tree"), ("Birch", "tree")]
    kb = [{"qid": f"Q{row}", "entity_name": name, "attr": attr} for row, (name, attr) in enumerate(texts)]
    mentions = [{"id": "m", "sentence": "an ash", "mentions": "ash", "answer": "Q0", "imgPath": ""}]
    records: dict[str, list[Any]] = {"kb": kb, **dict.fromkeys(("train", "dev", "test"), mentions)}
    release = MimicRelease(write_release(tmp_path / "release", records, {}))
    prepare(release, tmp_path / "data", DatasetOptions(name="alike"))
    groups = alike_groups(Dataset.open(tmp_path / "data")).tolist()
    assert groups[0] == groups[2]
    assert len(set(groups)) == 3
