"""What a ranking reads is the same whoever makes it, in whatever order, with or without cached features."""

import shutil

import pytest
import torch

from dsmip.data.manifest import KB
from dsmip.encoders import feature_cache
from dsmip.errors import UserError
from dsmip.evaluation import preparation
from dsmip.evaluation.index_builder import OpenedEvaluation, RankingFiles, plan_files
from dsmip.runs.part_features import PartFeatures
from dsmip.runs.run import Run
from dsmip.storage.atomic import sha256_file

CPU = torch.device("cpu")
ROWS = 4


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices start where batches do, as in use."""
    monkeypatch.setattr(feature_cache, "BATCH_SIZE", ROWS)
    monkeypatch.setattr(preparation, "BATCH_SIZE", ROWS)


def nothing_made(run: Run, model: str = "multimodal") -> RankingFiles:
    for folder in ("index", "features"):
        shutil.rmtree(run.folder / folder, ignore_errors=True)
    return plan_files(OpenedEvaluation(run, "test", model), slice_rows=ROWS)


def hashes(files: RankingFiles) -> dict[str, str]:
    files.finish()
    return {path.name: sha256_file(path) for path in files.index.iterdir()}


@pytest.fixture(scope="module")
def expected(run: Run) -> dict[str, str]:
    """What one call makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache, "BATCH_SIZE", ROWS)
        patch.setattr(preparation, "BATCH_SIZE", ROWS)
        files = nothing_made(run)
        files.build(list(files.missing), CPU)
    return hashes(files)


def test_every_item_is_in_one_file(run: Run) -> None:
    files = nothing_made(run)
    assert [list(rows) for rows in files.slices.values()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert list(files.missing.values()) == [8, 4, 4, 3]
    assert files.mentions.name in files.missing
    reported: list[tuple[str, int, int]] = []
    files.build(list(files.missing), CPU, lambda what, done, total: reported.append((what, done, total)))
    mentions = [("test encoded by multimodal", done, 8) for done in (4, 8)]
    assert reported == [*mentions, *(("entities and mentions prepared", done, 19) for done in (8, 12, 16, 19))]
    assert not files.missing
    assert {path.name.split("-")[1] for path in (run.folder / "features").iterdir()} == {"test"}


def test_callers_with_files_of_their_own(run: Run, expected: dict[str, str]) -> None:
    files = nothing_made(run)
    missing = list(files.missing)
    for share in (missing[3:1:-1], missing[:2]):
        files.build(share, CPU)
    assert hashes(files) == expected


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_do_not_change_a_bit(run: Run, expected: dict[str, str], num_threads: int) -> None:
    files, before = nothing_made(run), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        files.build(list(files.missing), CPU)
        assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert hashes(files) == expected


def test_what_an_interrupted_caller_had_finished_is_kept(run: Run, expected: dict[str, str]) -> None:
    files = nothing_made(run)

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("entities") and done > 12:
            raise KeyboardInterrupt

    names = list(files.missing)
    with pytest.raises(KeyboardInterrupt):
        files.build(names, CPU, stop)
    assert list(files.missing) == names[2:]
    finished = [files.index / name for name in names[:2]]
    times = [path.stat().st_mtime_ns for path in finished]
    files.build(names, CPU)
    assert [path.stat().st_mtime_ns for path in finished] == times
    assert hashes(files) == expected


@pytest.mark.slow
def test_cached_features_of_the_kb_give_the_same_bytes(run: Run) -> None:
    """Of the gated whole, which reads features of four encoders; one of them is not cached."""
    found = []
    for parts in ([], ["text", "multimodal", "gate"]):
        files = nothing_made(run, "dsmip")
        for part in parts:
            encoder = run.load_encoder(part, run.config)
            run.cache.table(part, KB, encoder, run.dataset, run.collator(part), CPU)
            assert PartFeatures(run, part, run.config).cached(KB)
        files.build(list(files.missing), CPU)
        found.append(hashes(files))
    assert found[0] == found[1]


def test_nothing_is_finished_before_every_slice_is_there(run: Run) -> None:
    files = nothing_made(run)
    first, *others = files.slices
    files.build(others, CPU)
    with pytest.raises(UserError, match=rf"{first} is missing or damaged"):
        files.finish()
    assert not (files.index / "index.json").exists()
    files.build([first], CPU)
    files.finish()
    with pytest.raises(UserError, match=r"test\.safetensors is missing or damaged"):
        files.open()
