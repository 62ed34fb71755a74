"""What frozen trunks say in validations: kept, and to the last bit what encoding anew gives."""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.data.records import Entity
from dsmip.data.table import Ragged, Table
from dsmip.encoders import feature_cache
from dsmip.encoders.clip import Backbone
from dsmip.evaluation.preparation import prepare_batches
from dsmip.runs.load_config import parse_config
from dsmip.runs.run import Run
from dsmip.training.validation.kept_trunks import KeptTrunks
from dsmip.units.matcher import Matcher

CPU = torch.device("cpu")
MULTIMODAL = {"prompt_length": 2, "prompt_depth": 2}
CASES: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    # model, part, its settings, the towers whose trunks are kept
    "text tower": ("mimic", "mimic", {"tune": "text", "width": 8, "num_tokens": 10}, {"vision"}),
    "projections": ("clip", "clip", {"tune": "projection"}, {"text", "vision"}),
    "all": ("clip", "clip", {"tune": "full"}, set()),
    "prompts in both": (
        "dsmip",
        "multimodal",
        {"experts": {"text": {}, "visual": {}, "multimodal": MULTIMODAL}},
        set(),
    ),
    "prompts in texts": (
        "dsmip",
        "multimodal",
        {"experts": {"text": {}, "visual": {}, "multimodal": {**MULTIMODAL, "prompts_in": "text"}}},
        {"vision"},
    ),
    "text_image": (
        "dsmip",
        "text_image",
        {"experts": {"text": {}, "visual": {}, "text_image": {"tune": "text"}}, "use": ["text", "text_image"]},
        {"vision"},
    ),
}


class Opened(NamedTuple):
    run: Run
    part: str
    matcher: Matcher
    kept: set[str]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "BATCH_SIZE", 4)


@pytest.fixture(params=list(CASES))
def opened(request: pytest.FixtureRequest, tmp_path: Path, narrow_backbone: Path, small_data: Dataset) -> Opened:
    return open_case(request.param, tmp_path, narrow_backbone, small_data)


def open_case(case: str, folder: Path, backbone: Path, data: Dataset) -> Opened:
    model, part, system, kept = CASES[case]
    if model == "dsmip":
        system = {**system, "width": 8, "gate": {"picture": "clip", "width": 8}}
        system.setdefault("use", ["text", "multimodal"])
    run = Run(
        folder / "run",
        parse_config({"model": model, "backbone": {"architecture": str(backbone)}, "system": system}),
        data,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        matcher = run.system.build_part(part, run.config, with_encoder=True)
    return Opened(run, part, matcher, kept)


def trained_on(matcher: Matcher, seed: int) -> None:
    """All that trains changes, as between two validations."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in matcher.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def counted_trunks(matcher: Matcher) -> Counter[str]:
    """How often each tower's trunk runs from here on."""
    runs = Counter[str]()
    for module in matcher.modules():
        if isinstance(module, Backbone):
            for tower in (module.text, module.vision):
                count_runs(tower, runs)
    return runs


def count_runs(tower: Any, runs: Counter[str]) -> None:
    trunk = tower.trunk

    def counting(*arguments: Any, **options: Any) -> Any:
        runs[tower.name] += 1
        return trunk(*arguments, **options)

    tower.trunk = counting


def values(table: Table) -> Mapping[str, Tensor]:
    return {n: c.in_use().values if isinstance(c, Ragged) else table.dense(n) for n, c in table.columns.items()}


def assert_same(one: Table, other: Table) -> None:
    assert values(one).keys() == values(other).keys()
    for name, tensor in values(one).items():
        assert torch.equal(tensor, values(other)[name]), name
        assert bool(tensor.isfinite().all())


WANTED: list[tuple[str, Sequence[int]]] = [(KB, range(11)), ("validation", range(7)), (KB, [0, 2, 3, 5, 8, 10])]


def test_validations_are_those_of_encoding_anew(opened: Opened) -> None:
    """Thrice, of all entities, of mentions and of some entities, whose batches are others."""
    run, part, matcher, _ = opened
    collator = run.collator(part)
    kept = KeptTrunks(matcher, run.dataset, collator, CPU, pytest.fail)
    for seed in range(3):
        trained_on(matcher, seed)
        for split, rows in WANTED:
            found = prepare_batches(kept.batches(split, rows), split, matcher, CPU)
            anew = feature_cache.item_batches(split, run.dataset, collator, rows)  # type: ignore[arg-type]
            assert_same(found, prepare_batches(anew, split, matcher, CPU))


def test_kept_trunks_do_not_run_again_and_see_no_pictures(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    run, part, matcher, towers = opened
    kept = KeptTrunks(matcher, run.dataset, run.collator(part), CPU, pytest.fail)
    runs, read = counted_trunks(matcher), Counter[str]()
    entities = Dataset.entities

    def counting(self: Dataset, rows: Sequence[int] | None = None) -> Iterator[Entity]:
        read["entities"] += 1
        return entities(self, rows)

    monkeypatch.setattr(Dataset, "entities", counting)
    first = prepare_batches(kept.batches(KB, range(11)), KB, matcher, CPU)
    runs.clear()
    read.clear()
    again = prepare_batches(kept.batches(KB, range(11)), KB, matcher, CPU)
    assert_same(again, first)
    assert not {*runs} & towers
    seen = "image" in run.collator(part).item_format.of_entities and "vision" not in towers
    assert bool(read) == (seen or not towers)


def test_a_full_disk_keeps_nothing(
    tmp_path: Path, narrow_backbone: Path, small_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once, and validations go on."""
    run, part, matcher, _ = open_case("text tower", tmp_path, narrow_backbone, small_data)
    said = list[str]()
    kept = KeptTrunks(matcher, run.dataset, run.collator(part), CPU, said.append)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=100, free=1))
    runs = counted_trunks(matcher)
    tables = [prepare_batches(kept.batches(KB, range(11)), KB, matcher, CPU) for _ in range(2)]
    assert_same(*tables)
    assert runs["vision"] == 6
    (line,) = said
    assert "no room" in line


def test_no_backbone_keeps_anything_after_a_validation(
    tmp_path: Path, narrow_backbone: Path, small_data: Dataset
) -> None:
    """Training asks for other items; a validation that is given up in the middle leaves nothing either."""
    run, part, matcher, _ = open_case("text tower", tmp_path, narrow_backbone, small_data)
    kept = KeptTrunks(matcher, run.dataset, run.collator(part), CPU, pytest.fail)
    batches = kept.batches(KB, range(11))
    next(batches)
    assert [m.keeper is not None for m in matcher.modules() if isinstance(m, Backbone)] == [True]
    batches.close()  # type: ignore[attr-defined]
    assert [m.keeper for m in matcher.modules() if isinstance(m, Backbone)] == [None]
