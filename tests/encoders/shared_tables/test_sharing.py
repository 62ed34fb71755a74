"""Shared feature tables: runs, seeds, views and systems read what one of them has computed. Calls are counted."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.build.view import make_view
from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.encoders.clip import Backbone
from dsmip.encoders.feature_cache import FeatureCache
from dsmip.encoders.feature_keys import content_key, content_of
from dsmip.encoders.shared_tables.places import FOLDER
from dsmip.encoders.shared_tables.tables import SharedTables
from dsmip.models import find_system
from dsmip.models.dsmip import GATE
from dsmip.runs.load_config import changed, parse_config
from dsmip.runs.part_features import PartFeatures
from dsmip.runs.run import Run
from dsmip.storage.run_storage import LocalRun
from dsmip.training.local_context import LocalContext
from dsmip.training.stages import train_part
from tests.support.encoders.counting import CountingEncoder

CPU = torch.device("cpu")


@pytest.fixture
def data(small_data: Dataset, tmp_path: Path) -> Dataset:
    """A copy without tables: they go into its folder."""
    shutil.copytree(small_data.folder, tmp_path / "data", ignore=shutil.ignore_patterns(FOLDER))
    return Dataset.open(tmp_path / "data")


def cache_of(folder: Path, place: Path, dtype: torch.dtype = torch.float32) -> FeatureCache:
    """Of a run."""
    shared = SharedTables(LocalRun(place))
    return FeatureCache(folder, dtype, [shared], lambda: shared)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts)


def test_another_run_and_another_part_read_the_same_table(
    data: Dataset, small_config: ExperimentConfig, tmp_path: Path
) -> None:
    collator = Run(tmp_path, small_config, data).collator("multimodal")
    encoder, place = CountingEncoder(form="x"), tmp_path / "place"
    for number, part in enumerate(("mimic", "m3el", "mmoe")):
        cache = cache_of(tmp_path / f"run-{number}", place)
        table = cache.table(part, KB, encoder, data, collator, CPU)
        assert len(table) == data.num_entities
        assert cache.find(part, KB, encoder, data, collator) is not None
    assert encoder.calls == 1
    assert not list(tmp_path.glob("run-*"))
    assert [Path(name).suffix for name in files_in(place)] == [".json", ".safetensors"]


def test_each_dependency_has_a_table_of_its_own(
    data: Dataset, small_config: ExperimentConfig, tmp_path: Path, narrow_backbone: Path
) -> None:
    run, place = Run(tmp_path, small_config, data), tmp_path / "place"
    collator = run.collator("multimodal")
    larger = changed(small_config, {"backbone": {"architecture": str(narrow_backbone)}})
    other_size = Run(tmp_path, larger, data).collator("multimodal")
    other_size.image_size += 1
    asked: list[tuple[CountingEncoder, str, Any, torch.dtype]] = [
        (CountingEncoder(form="x"), KB, collator, torch.float32),
        (CountingEncoder(form="x"), "test", collator, torch.float32),
        (CountingEncoder(form="y"), KB, collator, torch.float32),
        (CountingEncoder(2.0, form="x"), KB, collator, torch.float32),
        (CountingEncoder(form="x"), KB, collator, torch.float16),
        (CountingEncoder(form="x"), KB, run.collator("text"), torch.float32),
        (CountingEncoder(form="x"), KB, other_size, torch.float32),
    ]
    for encoder, split, read_by, dtype in asked:
        cache_of(tmp_path / "run", place, dtype).table("p", split, encoder, data, read_by, CPU)
        assert encoder.calls == 1
    assert len(list(place.glob("*.safetensors"))) == len(asked)


def test_lines_of_mentions_are_not_in_the_key_of_entities(
    data: Dataset, small_config: ExperimentConfig, tmp_path: Path
) -> None:
    encoder, keys = CountingEncoder(form="x"), []
    for template in ({}, {"mention": "{word}"}, {"entity": "{name}"}):
        run = Run(tmp_path, changed(small_config, {"system": {"template": template}}), data)
        (records,) = content_of(data, KB)
        keys.append(content_key(encoder, records, run.collator("text"), "entities", torch.float32))
    assert keys[0] == keys[1] != keys[2]


def test_what_trains_stays_in_its_run(data: Dataset, small_config: ExperimentConfig, tmp_path: Path) -> None:
    collator, encoder = Run(tmp_path, small_config, data).collator("text"), CountingEncoder()
    cache_of(tmp_path / "run", tmp_path / "place").table("p", "test", encoder, data, collator, CPU)
    assert files_in(tmp_path / "run")[0].startswith("p-test-")
    assert not (tmp_path / "place").exists()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts towers have read, call by call."""
    calls: list[int] = []
    encode = Backbone.encode_text

    def count(self: Backbone, token_ids: Tensor, *rest: Any, **more: Any) -> Any:
        calls.append(len(token_ids))
        return encode(self, token_ids, *rest, **more)

    monkeypatch.setattr(Backbone, "encode_text", count)
    return calls


def test_a_second_seed_trains_without_encoding(
    data: Dataset, small_config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole way: the run keeps no table, its evaluation reads the shared ones."""
    calls, losses = counted(monkeypatch), []
    for seed in (0, 1):
        run = Run.create(tmp_path / f"run-{seed}", changed(small_config, {"seed": seed}), data)
        losses.append(train_part(run, "text", LocalContext(tmp_path / f"checkpoints-{seed}")).history[-1]["loss"])
        assert sum(calls) == 11 + 23 + 7
        assert not (run.folder / "features").exists()
        assert PartFeatures(run, "text", run.config).cached(KB) is not None
    assert losses[0] != losses[1]
    assert len(list((data.folder / FOLDER).glob("*.safetensors"))) == 3


def view_of(data: Dataset, folder: Path, fraction: float) -> Dataset:
    return make_view(data.folder, folder, fraction, seed=0)


@pytest.mark.parametrize("whole_first", [True, False])
def test_a_view_reads_rows_of_the_whole_table(
    data: Dataset, small_config: ExperimentConfig, tmp_path: Path, whole_first: bool
) -> None:
    """Where that is computed; else its own, which are no others' but other splits and the kb are."""
    view, encoder = view_of(data, tmp_path / "view", 0.5), CountingEncoder(form="x")
    collator, place = Run(tmp_path, small_config, data).collator("text"), tmp_path / "place"
    whole = cache_of(tmp_path / "whole", place)
    for split in ("train", "test", KB) if whole_first else ("test", KB):
        whole.table("p", split, encoder, data, collator, CPU)
    calls = encoder.calls
    found = {
        split: cache_of(tmp_path / "part", place).table("p", split, encoder, view, collator, CPU)
        for split in ("train", "test", KB)
    }
    assert encoder.calls - calls == (0 if whole_first else 1)
    expected = collator.mentions(list(view.mentions("train"))).token_ids[:, :2].float()
    assert len(expected) == view.num_mentions("train") == 12
    assert torch.equal(found["train"].dense("text_global"), expected)
    assert len(found[KB]) == data.num_entities


SHARED_CLIP = {"tune": "frozen", "num_tokens": 9}


def test_systems_over_the_same_frozen_towers_have_the_same_key(
    data: Dataset, narrow_backbone: Path, tmp_path: Path
) -> None:
    def key(model: str, section: dict[str, Any], **backbone: Any) -> str | None:
        tree = {"model": model, "backbone": {"architecture": str(narrow_backbone), **backbone}, "system": section}
        run = Run(tmp_path, parse_config(tree), data)
        part = find_system(model).feature_parts(run.config.system)[0]
        encoder = find_system(model).build_encoder(part, run.config)
        return content_key(encoder, "records", run.collator(part), "entities", torch.float32)

    mimic = key("mimic", SHARED_CLIP)
    assert mimic is not None
    assert mimic == key("m3el", SHARED_CLIP) == key("mmoe", SHARED_CLIP)
    others = [
        key("mimic", {**SHARED_CLIP, "num_tokens": 10}),
        key("mimic", {**SHARED_CLIP, "mask_padding": True}),
        key("jmel", {"tune": "frozen"}),
        key("clip", {"tune": "frozen"}),
    ]
    assert len({mimic, *others}) == 5
    assert key("mimic", {**SHARED_CLIP, "tune": "full"}) is None
    wider = json.loads(narrow_backbone.read_text())
    wider["quick_gelu"] = True
    (tmp_path / "other.json").write_text(json.dumps(wider))
    assert mimic != key("mimic", SHARED_CLIP, architecture=str(tmp_path / "other.json"))  # the same tensors
    shutil.copy(narrow_backbone, tmp_path / "moved.json")
    assert mimic == key("mimic", SHARED_CLIP, architecture=str(tmp_path / "moved.json"))


def test_the_gate_shares_its_inputs(data: Dataset, small_config: ExperimentConfig, tmp_path: Path) -> None:
    runs = [Run.create(tmp_path / name, changed(small_config, {"seed": len(name)}), data) for name in ("a", "bb")]
    one, other = (PartFeatures(run, GATE, run.config).files("test", CPU) for run in runs)
    assert one == other
    assert one[0].parent == data.folder / FOLDER


Elsewhere = Callable[[Dataset, Path, pytest.MonkeyPatch], Path]


def beside(data: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return data.folder / FOLDER


def named(data: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSMIP_FEATURES", str(folder / "named"))
    return folder / "named"


def on_the_node(data: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (data.folder / FOLDER).write_text("no folder can be made here, as on a disk that may only be read")
    monkeypatch.setenv("DSMIP_CACHE", str(folder / "node"))
    return folder / "node" / "features"


def in_the_run(data: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSMIP_FEATURES", "run")
    return folder / "run" / "features"


def nowhere_else(data: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A named place that cannot be written."""
    monkeypatch.setenv("DSMIP_FEATURES", "/proc/features")
    return folder / "run" / "features"


@pytest.mark.parametrize("place", [beside, named, on_the_node, in_the_run, nowhere_else])
def test_where_tables_lie(
    data: Dataset, small_config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Elsewhere
) -> None:
    expected, encoder = place(data, tmp_path, monkeypatch), CountingEncoder(form="x")
    run = Run.create(tmp_path / "run", small_config, data)
    arguments = ("p", "test", encoder, data, run.collator("text"), CPU)
    path = run.cache.ensure(*arguments)
    assert path.parent == expected
    assert path == run.cache.ensure(*arguments)
    assert path == run.cache.opened(run.cache.address(path))
    assert encoder.calls == 1


def test_a_run_with_its_own_tables_goes_on_with_them(
    data: Dataset, small_config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = CountingEncoder(form="x")
    run = Run.create(tmp_path / "run", small_config, data)
    monkeypatch.setenv("DSMIP_FEATURES", "run")
    own = run.cache.ensure("p", "test", encoder, data, run.collator("text"), CPU)
    monkeypatch.delenv("DSMIP_FEATURES")
    assert run.cache.ensure("p", "test", encoder, data, run.collator("text"), CPU) == own
    assert replace(run, of_other_data=True).cache.ensure("p", "test", encoder, data, run.collator("text"), CPU) != own
    assert encoder.calls == 2
