"""Agreement of cheaper searches with the exact one."""

import pytest

import dsmip
from dsmip.exporting import agreement
from dsmip.exporting.agreement import measured_agreement
from dsmip.runs.run import Run


def test_candidates_find_more_the_more_they_are(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "CANDIDATES", (2, 5, 10, 99))
    monkeypatch.setattr(agreement, "TOP", 2)
    linker = dsmip.load(run.folder, model="multimodal")
    found = measured_agreement(linker, run.dataset, linker.search.index)
    assert [each.search for each in found] == ["the index as stored", *(f"candidates={k}" for k in (2, 5, 10))]
    assert (found[0].same_best, found[0].recall) == (1, 1)  # it is the same index
    recalls = [each.recall for each in found[1:]]
    assert recalls == sorted(recalls)
    assert all(0 <= each.same_best <= 1 for each in found)
