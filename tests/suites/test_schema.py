"""Suites as files: the shipped ones are whole, and wrong ones are refused by the key that is wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dsmip.data.dataset import Dataset
from dsmip.errors import UserError
from dsmip.suites.members import Column, Member, data_differences, suite_members, suite_rows
from dsmip.suites.published import published_figures, published_parameters
from dsmip.suites.schema import ParameterSuite, Suite, load_suite, shipped_suites
from dsmip.suites.steps import Places, suite_steps, wanted

BASE: dict[str, Any] = {
    "title": "t",
    "data": {"wikimel": {}},
    "systems": {"dsmip": {"config": "{data}"}, "mimic": {"config": "mimic_{data}"}},
    "seeds": [0, 1],
    "significance": {"of": "dsmip"},
}


def suite(path: Path, **changes: Any) -> Suite:
    file = path / "own.yaml"
    file.write_text(yaml.safe_dump({**BASE, **changes}))
    found = load_suite(str(file))
    assert isinstance(found, Suite)
    return found


def members(of: Suite, out: Path = Path("out")) -> list[Member]:
    return suite_members(of, "suite own", out)


@pytest.mark.parametrize("name", ["demo", "low_resource", "table1", "table2"])
def test_shipped_suites_have_members_rows_and_steps(name: str) -> None:
    found = load_suite(name)
    assert isinstance(found, Suite)
    of = members(found)
    assert len(of) == len(found.all_systems()) * len(found.data) * len(found.shares) * len(found.seeds)
    assert {member.config.seed for member in of} == set(found.seeds)
    rows = suite_rows(found, of)
    steps = suite_steps(found, of, Places(Path("root"), Path("out")))
    before = set[str]()
    for step in steps.values():
        assert before.issuperset(step.needs)
        before.add(step.name)
    evaluations = [step for step in steps.values() if step.kind == "evaluate"]
    assert len(evaluations) == len(rows) * len(found.data) * len(found.shares) * len(found.seeds)


def test_all_suites_are_shipped_and_their_published_figures_are_of_rows_and_sets_that_there_are() -> None:
    assert shipped_suites() == ["demo", "low_resource", "table1", "table2", "table3"]
    tables = {name: load_suite(name) for name in shipped_suites()}
    known = set()
    for each in tables.values():
        if isinstance(each, Suite):
            rows = {f"{name}/{model}" for name, system in each.all_systems().items() for model in system.rows}
            known |= {(row, data) for row in rows | set(each.all_systems()) for data in each.data}
    assert published_figures().keys() <= known
    table3 = tables["table3"]
    assert isinstance(table3, ParameterSuite)
    assert published_parameters().keys() == table3.parameters.keys()
    assert published_figures()["dsmip", "wikimel"].figures["hits@1"] == pytest.approx(0.8897)
    assert published_figures()["dsmip", "wikimel"].figures["mean_rank"] == 10.37


def test_the_papers_settings_are_one_trial_and_a_space_is_searched_by_name(tmp_path: Path) -> None:
    space = {"trials": 4, "rungs": [1, 2], "space": {"train.learning_rate": {"values": [0.1, 0.01]}}}
    exact = members(suite(tmp_path))[0].config.tune
    assert (exact.trials, exact.rungs, exact.space) == (1, (20,), {})
    searched = members(suite(tmp_path, spaces={"grid": space}, search="grid"))[0].config.tune
    assert (searched.trials, searched.rungs, list(searched.space)) == (4, (1, 2), ["train.learning_rate"])
    assert searched.train == exact.train
    whole = {**space, "trials": "all"}
    assert members(suite(tmp_path, spaces={"grid": whole}, search="grid"))[0].config.tune.trials == "all"


def test_an_ablation_is_its_system_but_for_some_keys(tmp_path: Path) -> None:
    changes = {"system": {"experts": {"multimodal": {"prompt_length": 0, "prompt_depth": 0}}}}
    own = suite(tmp_path, ablations={"bare": {"of": "dsmip", "set": changes, "label": "without prompts"}})
    whole, bare = (next(each.config for each in members(own) if each.system == name) for name in ("dsmip", "bare"))
    assert (whole.system.experts["multimodal"].prompt_length, bare.system.experts["multimodal"].prompt_length) == (2, 0)
    assert whole.train == bare.train
    assert [row.label for row in suite_rows(own, members(own))] == ["dsmip", "mimic", "without prompts"]


def test_steps_share_views_and_backbones(tmp_path: Path) -> None:
    systems = {"clip": {"config": "demo_clip"}, "dsmip": {"config": "demo"}}
    data = {"demo": {"drawn": {"seed": 1}, "backbone": "demo"}}
    own = suite(tmp_path, systems=systems, data=data, shares=[0.5, 1.0])
    steps = suite_steps(own, members(own), Places(None, tmp_path))
    shared = [step.name for step in steps.values() if step.kind in ("data", "backbone")]
    assert shared == ["data/demo", "data/demo-first-50", "backbones/demo"]
    assert steps["demo-50/dsmip/seed-1/train"].needs == ("data/demo", "data/demo-first-50", "backbones/demo")
    assert steps["demo/clip/seed-0/train"].needs == ("data/demo", "backbones/demo")
    assert steps["demo/dsmip/seed-0/evaluate-dsmip"].needs == ("demo/dsmip/seed-0/tune",)
    assert list(wanted(steps, ["demo/clip/seed-1/evaluate-clip"])) == [
        "data/demo",
        "backbones/demo",
        "demo/clip/seed-1/train",
        "demo/clip/seed-1/evaluate-clip",
    ]
    weights = {member.config.backbone.pretrained for member in members(own, tmp_path)}
    assert weights == {str(tmp_path / "backbones" / "demo.safetensors")}


WRONG = [
    ({"seed": [1]}, "unknown key 'seed'.*seeds"),
    ({"systems": {"dsmip": {"config": "{data}", "label": "x", "sets": {}}}}, "systems.dsmip.sets"),
    ({"seeds": [3]}, "significance is asked of one seed"),
    ({"seeds": [3, 3]}, "has something twice"),
    ({"shares": [0]}, "shares.0"),
    ({"metrics": ["hits"]}, "unknown metric 'hits'"),
    ({"significance": {"of": "dsmip", "metric": "median_rank"}}, "no mean over mentions"),
    ({"search": "grid"}, "unknown space 'grid'"),
    ({"ablations": {"x": {"of": "dsnip", "set": {}}}}, "unknown system 'dsnip'"),
    ({"ablations": {"mimic": {"of": "dsmip", "set": {}}}}, "a system has this name already"),
    ({"systems": {"dsmip": {"config": "{data}", "data": {"wikimal": "x"}}}}, "unknown data set 'wikimal'"),
    ({"data": {"../out": {}}}, "data.*pattern"),
    ({"data": {}}, "data"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_a_wrong_file_is_refused_by_its_key(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        suite(tmp_path, **changes)


WRONG_MEMBERS = [
    (
        {"systems": {"dsmip": {"config": "{data}"}, "mimik": {"config": "mimik_{data}"}}},
        "systems.mimik.config: .*mimik_wik",
    ),
    (
        {"systems": {"dsmip": {"config": "{data}", "set": {"system": {"wide": 3}}}}},
        r"systems.dsmip, wikimel: .*system\.wide",
    ),
    ({"systems": {"dsmip": {"config": "{data}", "rows": {"texts": "T"}}}}, "unknown model 'texts'; it has dsmip, text"),
    ({"significance": {"of": "dsmap"}}, "unknown row 'dsmap'; there are dsmip, mimic"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG_MEMBERS)
def test_wrong_members_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    own = suite(tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        suite_rows(own, members(own))


def test_nothing_can_be_searched_without_a_gate(tmp_path: Path) -> None:
    space = {"trials": 2, "rungs": [1], "space": {"train.learning_rate": {"values": [0.1]}}}
    systems = {"mimic": {"config": "mimic_{data}"}}
    own = suite(tmp_path, systems=systems, significance=None, spaces={"g": space}, search="g")
    with pytest.raises(UserError, match="no system has a gate"):
        members(own)


def test_an_unknown_suite_names_those_there_are() -> None:
    with pytest.raises(UserError, match="'tabel1' is neither a file nor a shipped name; shipped: demo"):
        load_suite("tabel1")


def test_data_of_one_table_must_be_alike(small_data: Dataset) -> None:
    manifest = small_data.manifest
    assert data_differences(manifest, manifest) == []
    other = manifest.model_copy(update={"choices": {**manifest.choices, "entity_text": "desc"}, "entities": 5})
    assert data_differences(manifest, other) == ["entities (11 and 5)", "entity_text (attr and desc)"]
    assert str(Column("wikimel", 0.1)) == "wikimel, 10 %"
