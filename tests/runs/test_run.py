"""Run directories: made once, opened again, refused where they do not fit."""

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml

import dsmip
from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip.config import ExperimentConfig, merged
from dsmip.data.dataset import Dataset
from dsmip.errors import UserError
from dsmip.runs.load_config import changed, load_config, overridden, read_config, to_yaml
from dsmip.runs.run import Run
from dsmip.runs.weights import own_weights
from dsmip.storage.run_storage import LocalRun
from tests.support.small_release import plain_release

Log = pytest.LogCaptureFixture


@pytest.fixture
def run(small_data: Dataset, small_config: ExperimentConfig, tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", small_config, small_data)


@pytest.fixture
def other_data(tmp_path: Path) -> Dataset:
    prepare(MimicRelease(plain_release(tmp_path / "release", 3, 4)), tmp_path / "other", DatasetOptions(name="other"))
    return Dataset.open(tmp_path / "other")


def with_key(config: ExperimentConfig, key: str, value: object) -> ExperimentConfig:
    if key.startswith("system."):
        section = merged(config.system, {key.removeprefix("system."): value})
        return config.model_copy(update={"system": section})
    return config.model_copy(update={key: value})


def test_a_run_opens_with_what_it_was_made_from(run: Run) -> None:
    again = Run.open(run.folder)
    assert again.config == run.config
    assert again.dataset.manifest_hash == run.dataset.manifest_hash
    assert again.part_names == ("text", "visual", "multimodal")
    assert Run.create(run.folder, run.config, run.dataset).config == run.config


@pytest.mark.parametrize(
    ("key", "value", "was"), [("seed", 3, "0"), ("system.width", 9, "8"), ("model", "mimic", "dsmip")]
)
def test_another_configuration_is_refused_by_its_key(run: Run, key: str, value: object, was: str) -> None:
    (run.training_folder / "text" / "checkpoint_0").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{key} was '?{was}'?, is now '?{value}'?.*--run"):
        Run.create(run.folder, with_key(run.config, key, value), run.dataset)
    assert Run.open(run.folder).config == run.config


def test_a_run_that_has_trained_nothing_takes_another_configuration(run: Run) -> None:
    """Else whoever mistyped a weights file could not correct himself."""
    (run.training_folder / "text").mkdir(parents=True)
    other = with_key(run.config, "seed", 3)
    assert Run.create(run.folder, other, run.dataset).config == other
    assert Run.open(run.folder).config == other
    assert not run.training_folder.exists()


def test_a_trained_run_takes_other_resources_and_another_sweep(run: Run) -> None:
    (run.training_folder / "text" / "checkpoint_0").mkdir(parents=True)
    other = changed(run.config, {"tune": {"trials": 3}, "parts": {"text": {"resources": {"cpu": 0.5}}}})
    assert Run.create(run.folder, other, run.dataset).config == other
    assert Run.open(run.folder).config == other
    assert run.has_begun


def test_other_data_is_refused(run: Run, other_data: Dataset) -> None:
    with pytest.raises(UserError, match=r"made on data 'small'.*other"):
        Run.open(run.folder, other_data)
    with pytest.raises(UserError, match=r"made on data 'small'.*other"):
        Run.create(run.folder, run.config, other_data)


def test_the_same_data_elsewhere_is_accepted(run: Run, small_data: Dataset, tmp_path: Path) -> None:
    stamp = run.folder / "run.json"
    stored = json.loads(stamp.read_text())
    stored["data"]["folder"] = str(tmp_path / "moved")
    stamp.write_text(json.dumps(stored))
    with pytest.raises(UserError, match="moved"):
        Run.open(run.folder)
    assert Run.open(run.folder, small_data).dataset is small_data


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"data": 5}', b'{"data": {"name": "x"}}', b"\xff\xfe"])
def test_a_damaged_stamp_is_named(run: Run, content: bytes) -> None:
    (run.folder / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        Run.open(run.folder)


def test_a_damaged_configuration_is_named(run: Run) -> None:
    path = run.folder / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "sead": 1}))
    with pytest.raises(UserError, match=r"config\.yaml: unknown key 'sead'"):
        Run.open(run.folder)
    path.unlink()
    with pytest.raises(UserError, match=r"no config\.yaml"):
        Run.open(run.folder)


def test_folders_that_are_no_runs(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run at .*nowhere"):
        Run.open(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty and not a run"):
        Run.create(tmp_path / "full", run.config, run.dataset)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_an_interrupted_start_is_begun_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(storage: LocalRun, name: str, value: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LocalRun, "write_json", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Run.create(tmp_path / "again", run.config, run.dataset)
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["config.yaml"]
    other = with_key(run.config, "seed", 3)
    Run.create(tmp_path / "again", other, run.dataset)
    assert Run.open(tmp_path / "again").config == other


def test_a_configuration_of_the_users_own_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    own = tmp_path / "own/config.yaml"
    own.parent.mkdir()
    own.write_text("# mine\n" + to_yaml(run.config))
    with pytest.raises(UserError, match="not empty and not a run"):
        Run.create(own.parent, run.config, run.dataset)
    assert own.read_text().startswith("# mine")


def test_parts_are_finished_when_their_report_is_there(run: Run) -> None:
    assert not run.is_finished("text")
    with pytest.raises(UserError, match=r"no finished 'text'; run 'dsmip train' first"):
        run.load_part("text", with_encoder=False)
    with pytest.raises(UserError, match=r"no finished 'dsmip'; run 'dsmip tune' first"):
        run.load_whole()
    matcher = run.system.build_part("text", run.config, with_encoder=True)
    run.save_part("text", matcher, {"best": {"mrr": 0.5}})
    assert run.is_finished("text")
    assert run.part_report("text") == {"best": {"mrr": 0.5}}
    stored = own_weights(run.load_part("text", with_encoder=True))
    assert stored.keys() == own_weights(matcher).keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in own_weights(matcher).items())


def test_a_part_of_another_form_lives_in_a_variant(run: Run) -> None:
    """Prompt depth belongs to stage one; the gate's temperature does not."""

    def with_system(**changes: object) -> ExperimentConfig:
        return run.config.model_copy(update={"system": merged(run.config.system, changes)})

    deeper = with_system(experts={"multimodal": {"prompt_depth": 1}})
    variant = run.home("multimodal", deeper)
    assert variant.folder.parent == run.folder / "variants"
    assert run.home("multimodal", deeper).folder == variant.folder
    assert run.home("text", deeper).folder == run.folder
    assert run.home("multimodal", with_system(gate={"temperature": 0.7})).folder == run.folder
    assert run.home("multimodal", with_system(experts={"multimodal": {"prompt_depth": 0}})).folder != variant.folder


def count_parses(log: pytest.LogCaptureFixture) -> int:
    return sum(record.name == "dsmip.runs.load_config" for record in log.records)


def test_one_process_parses_a_text_once(run: Run, small_data: Dataset, tmp_path: Path, caplog: Log) -> None:
    """A worker opens its run, and is sent the configuration of its part, which is most often the run's."""
    fresh = Run.create(tmp_path / "fresh", changed(run.config, {"seed": 80_117}), small_data)
    text = to_yaml(fresh.config)
    with caplog.at_level(logging.DEBUG, "dsmip.runs.load_config"):
        opened = Run.open(fresh.folder)
        assert opened.home("text", read_config(text)) is opened
        assert load_config(str(fresh.folder / "config.yaml")) == opened.config
        assert overridden(opened.config, [], "config") is opened.config
        assert count_parses(caplog) == 1
        assert overridden(opened.config, ["train.epochs=7"], "config").train.epochs == 7
    assert count_parses(caplog) == 2
    with pytest.raises(UserError, match=r"^config of mine: unknown key 'train\.epocs'"):
        overridden(opened.config, ["train.epocs=7"], "config of mine")


@pytest.mark.parametrize(("model", "texts"), [("text", 1), ("dsmip", 2)])
def test_an_evaluation_parses_each_text_once(
    run: Run, small_data: Dataset, tmp_path: Path, caplog: Log, model: str, texts: int
) -> None:
    """The run's, and of a tuned whole the best trial's."""
    made = Run.create(tmp_path / "fresh", changed(run.config, {"seed": 80_200 + texts}), small_data)
    trial = changed(made.config, {"system": {"gate": {"temperature": 0.5 + texts}}})
    for name in made.part_names:
        made.save_part(name, made.system.build_part(name, made.config, with_encoder=True), {})
    made.save_part("dsmip", made.system.build_whole(trial), {})
    made.storage.write_text("dsmip/config.yaml", to_yaml(trial))
    with caplog.at_level(logging.DEBUG, "dsmip.runs.load_config"):
        dsmip.evaluate(made.folder, "test", model)
    assert count_parses(caplog) == texts
