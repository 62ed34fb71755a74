"""What a ranking reads is the same whoever makes it, in whatever order, with or without cached features."""

import shutil

import pytest
import torch

from dsmip.data.manifest import KB
from dsmip.encoders import feature_cache
from dsmip.errors import UserError
from dsmip.evaluation import index_builder as pieces_of_rankings
from dsmip.evaluation.index_builder import Pieces, plan_pieces
from dsmip.runs.part_features import PartFeatures
from dsmip.runs.run import Run
from dsmip.storage.atomic import sha256_file

CPU = torch.device("cpu")
ROWS = 4


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices start where batches do, as in use."""
    monkeypatch.setattr(feature_cache, "BATCH_SIZE", ROWS)
    monkeypatch.setattr(pieces_of_rankings, "BATCH_SIZE", ROWS)


def nothing_made(run: Run, model: str = "multimodal") -> Pieces:
    for folder in ("index", "features"):
        shutil.rmtree(run.folder / folder, ignore_errors=True)
    return plan_pieces(run, "test", model, slice_rows=ROWS)


def hashes(pieces: Pieces) -> dict[str, str]:
    folder = pieces.finish().index
    return {path.name: sha256_file(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(run: Run) -> dict[str, str]:
    """What one call makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache, "BATCH_SIZE", ROWS)
        patch.setattr(pieces_of_rankings, "BATCH_SIZE", ROWS)
        pieces = nothing_made(run)
        pieces.make(list(pieces.missing), CPU)
    return hashes(pieces)


def test_every_item_is_in_one_piece(run: Run) -> None:
    pieces = nothing_made(run)
    assert [list(rows) for rows in pieces.slices.values()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert list(pieces.missing.values()) == [8, 4, 4, 3]
    assert pieces.files.mentions.name in pieces.missing
    told: list[tuple[str, int, int]] = []
    pieces.make(list(pieces.missing), CPU, lambda what, done, total: told.append((what, done, total)))
    mentions = [("test encoded by multimodal", done, 8) for done in (4, 8)]
    assert told == [*mentions, *(("entities and mentions prepared", done, 19) for done in (8, 12, 16, 19))]
    assert not pieces.missing
    assert {path.name.split("-")[1] for path in (run.folder / "features").iterdir()} == {"test"}


def test_callers_with_pieces_of_their_own(run: Run, expected: dict[str, str]) -> None:
    pieces = nothing_made(run)
    missing = list(pieces.missing)
    for share in (missing[3:1:-1], missing[:2]):
        pieces.make(share, CPU)
    assert hashes(pieces) == expected


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_do_not_change_a_bit(run: Run, expected: dict[str, str], num_threads: int) -> None:
    pieces, before = nothing_made(run), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        pieces.make(list(pieces.missing), CPU)
        assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert hashes(pieces) == expected


def test_what_an_interrupted_caller_had_finished_is_kept(run: Run, expected: dict[str, str]) -> None:
    pieces = nothing_made(run)

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("entities") and done > 12:
            raise KeyboardInterrupt

    names = list(pieces.missing)
    with pytest.raises(KeyboardInterrupt):
        pieces.make(names, CPU, stop)
    assert list(pieces.missing) == names[2:]
    finished = [pieces.files.index / name for name in names[:2]]
    times = [path.stat().st_mtime_ns for path in finished]
    pieces.make(names, CPU)
    assert [path.stat().st_mtime_ns for path in finished] == times
    assert hashes(pieces) == expected


def test_cached_features_of_the_kb_give_the_same_bytes(run: Run) -> None:
    """Of the gated whole, which reads features of four encoders; one of them is not cached."""
    found = []
    for parts in ([], ["text", "multimodal", "gate"]):
        pieces = nothing_made(run, "dsmip")
        for part in parts:
            encoder = run.load_encoder(part, run.config)
            run.cache.table(part, KB, encoder, run.dataset, run.collator(part), CPU)
            assert PartFeatures(run, part, run.config).cached(KB).is_file()
        pieces.make(list(pieces.missing), CPU)
        found.append(hashes(pieces))
    assert found[0] == found[1]


def test_nothing_is_finished_before_every_piece_is_there(run: Run) -> None:
    pieces = nothing_made(run)
    first, *others = pieces.slices
    pieces.make(others, CPU)
    with pytest.raises(UserError, match=rf"{first} is missing or damaged"):
        pieces.finish()
    assert not (pieces.files.index / "index.json").exists()
    pieces.make([first], CPU)
    with pytest.raises(UserError, match=r"test\.safetensors is missing or damaged"):
        pieces.finish().open()
