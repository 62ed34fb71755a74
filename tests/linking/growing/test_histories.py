"""Entities that are added, removed and updated: after any history links are those of an index built anew."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import dsmip
from dsmip.config import ExperimentConfig
from dsmip.linking.bundle import IndexDtype, read_manifest
from dsmip.models import systems
from dsmip.runs.load_config import changed
from tests.support.scoring.grown import (
    Record,
    assert_same,
    colour_files,
    exported,
    links_of,
    record,
    run_of,
    two_experts,
)
from tests.support.scoring.linked_runs import small_system

# a gate of each kind, and a re-ranker
MARKS: dict[str, list[pytest.MarkDecorator]] = {"fused": [], "dsmip": [pytest.mark.slow], "blink": [pytest.mark.slow]}
OPERATIONS = ("add", "remove", "update", "compact")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_files(tmp_path_factory.mktemp("images"))


def config_of(name: str, backbone: Path) -> ExperimentConfig:
    if name != "fused":
        return small_system(name, backbone)
    return changed(
        small_system("dsmip", backbone), {"system": {"gate": {"preset": "confidence", "scoring": "mixture"}}}
    )


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=MARKS.get(each, [pytest.mark.soak])) for each in ("fused", *systems())]
)
def test_a_history_of_every_system(name: str, narrow_backbone: Path, images: Path, tmp_path: Path) -> None:
    config = config_of(name, narrow_backbone)
    bundle = exported(tmp_path / "first", config, [record(number) for number in range(6)])
    first = dsmip.load(bundle)
    before = links_of(first)
    change = first.entities.add([record(6), record(7), record(8)], images=images)
    assert (change.added, change.entities, change.segments, change.dead) == (3, 9, 2, 0)
    change = first.entities.remove(["Q0", "Q7"])
    assert (change.removed, change.entities, change.dead) == (2, 7, 2)
    assert first.entities.update([record(1, 1)], images=images).entities == 7
    left = [*(record(number) for number in (2, 3, 4, 5, 6, 8)), record(1, 1)]
    anew = dsmip.load(run_of(tmp_path / "anew", config, left).folder)
    assert_same(first.reload(), anew)
    assert_same(dsmip.load(bundle), anew)
    assert links_of(first) == before  # an open linker stays as it is
    assert first.entities.compact().segments == 1
    assert_same(dsmip.load(bundle), anew)


@pytest.fixture(scope="module")
def config(narrow_backbone: Path) -> ExperimentConfig:
    return two_experts(narrow_backbone)


@pytest.fixture(scope="module")
def bundle(config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("exported"), config, [record(number) for number in range(4)])


HISTORIES = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.sets(st.integers(0, 7), min_size=1, max_size=3)), max_size=8
)


@pytest.mark.parametrize("examples", [2, pytest.param(10, marks=pytest.mark.soak)])
def test_any_history(
    examples: int, config: ExperimentConfig, bundle: Path, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @settings(max_examples=examples, derandomize=True)
    @given(HISTORIES)
    def check(history: list[tuple[str, set[int]]]) -> None:
        folder = tmp_path_factory.mktemp("history")
        shutil.copytree(bundle, folder / "bundle")
        linker = dsmip.load(folder / "bundle")
        left = list(after(linker, history, images).values())
        anew = dsmip.load(run_of(folder / "anew", config, left).folder)
        assert_same(linker.reload(), anew)
        assert_same(dsmip.load(folder / "bundle"), anew)

    check()


def after(linker: dsmip.Linker, history: list[tuple[str, set[int]]], images: Path) -> dict[int, Record]:
    """Changes a bundle of entities 0 to 3; its records then, in the order that is promised."""
    there: dict[int, Record] = {number: record(number) for number in range(4)}
    for version, (operation, numbers) in enumerate(history, start=1):
        known, new = sorted(numbers & there.keys()), sorted(numbers - there.keys())
        if operation == "add":
            linker.entities.add([record(number, version) for number in new], images=images)
            there |= {number: record(number, version) for number in new}
        elif operation == "compact":
            linker.entities.compact()
        elif operation == "update" or len(known) < len(there):
            records = [record(number, version) for number in known]
            there = {number: each for number, each in there.items() if number not in known}
            if operation == "remove":
                linker.entities.remove(records)
            else:
                linker.entities.update(records, images=images)
                there |= dict(zip(known, records, strict=True))
    return there


def test_entities_without_a_picture_tie_wherever_they_are_stored(
    narrow_backbone: Path, images: Path, tmp_path: Path
) -> None:
    records = [record(number) for number in range(4)]  # Q0 and Q3 have none
    bundle = exported(tmp_path, small_system("dsmip", narrow_backbone), records, model="visual")
    linker = dsmip.load(bundle)
    for number in (6, 7, 9):  # Q6 and Q9 have none
        linker.entities.add([record(number)], images=images)
    linker.entities.remove(["Q0"])
    for grown in (linker.reload(), dsmip.load(bundle)):
        for links in links_of(grown):
            tied = [(row, score) for row, entity_id, *_, score in links if entity_id in ("Q3", "Q6", "Q9")]
            assert [row for row, _ in tied] == [2, 3, 5]  # in the order of their rows
            assert len({score for _, score in tied}) == 1
        linker.entities.compact()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("int8", 5e-2)])
def test_an_index_that_is_stored_smaller_grows_as_it_is(
    config: ExperimentConfig, images: Path, tmp_path: Path, dtype: IndexDtype, tolerance: float
) -> None:
    records = [record(number) for number in range(6)]
    bundle = exported(tmp_path / "small", config, records[:3], index_dtype=dtype)
    linker = dsmip.load(bundle)
    linker.entities.add(records[3:], images=images)
    linker.entities.remove(["Q1"])
    grown = linker.reload()
    linker.entities.compact()
    manifest, _ = read_manifest(bundle)
    slices = [name for name in manifest.files if name.endswith(".safetensors") and "slice" in name]
    assert slices
    tensors = {path: each for name in slices for path, each in load_file(bundle / name).items()}
    rows = {path: each.dtype for path, each in tensors.items() if each.ndim > 1 and "#scale" not in path}
    assert set(rows.values()) == {getattr(torch, dtype)}, rows
    anew = exported(tmp_path / "anew", config, [records[0], *records[2:]], index_dtype=dtype)
    for found in (grown, dsmip.load(bundle)):
        assert_same(found, dsmip.load(anew), tolerance=tolerance)
