"""What a sweep tries and keeps: trials drawn up front, survivors that depend on figures alone."""

import math
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dsmip.config import ExperimentConfig, TuneConfig, merged
from dsmip.errors import UserError
from dsmip.runs.load_config import parse_config, to_yaml
from ray_jobs.training.sweep import best_trial
from ray_jobs.training.trials import draw_trials, survivors


def with_space(config: ExperimentConfig, space: dict[str, Any], trials: int | Literal["all"] = 6) -> ExperimentConfig:
    tune = TuneConfig(trials=trials, space=space)
    return config.model_copy(update={"tune": tune})


def test_trial_0_is_the_configuration_itself_and_no_trial_comes_twice(small_config: ExperimentConfig) -> None:
    config = with_space(
        small_config,
        {"system.gate.temperature": {"values": [0.1, 0.5]}, "train.learning_rate": {"loguniform": [1e-4, 1e-2]}},
        trials=20,
    )
    trials = draw_trials(config, seed=1)
    assert [trial.number for trial in trials] == list(range(20))
    assert trials[0].config == config
    assert len({to_yaml(trial.config) for trial in trials}) == 20
    for trial in trials[1:]:
        assert trial.config.system.gate.temperature == trial.changes["system.gate.temperature"]  # type: ignore[attr-defined]
        assert trial.config.tune_train().learning_rate == trial.changes["train.learning_rate"]
        assert 1e-4 <= trial.changes["train.learning_rate"] <= 1e-2
        assert trial.config.train == config.train  # stage one is what it was


def test_trials_depend_on_the_seed_alone(small_config: ExperimentConfig) -> None:
    config = with_space(small_config, {"system.gate.dropout": {"uniform": [0.0, 0.5]}})
    assert draw_trials(config, 5) == draw_trials(config, 5)
    assert draw_trials(config, 5) != draw_trials(config, 6)


def test_a_small_space_is_used_up_without_repetition(small_config: ExperimentConfig) -> None:
    space = {"system.use": {"values": [["text", "multimodal"], ["visual", "text"]]}}
    trials = draw_trials(with_space(small_config, space), seed=0)
    assert trials[0].changes == {}
    drawn = sorted(trial.changes["system.use"] for trial in trials[1:])
    assert drawn == [["text", "multimodal"], ["visual", "text"]]


def test_all_of_a_grid_is_tried_once_whatever_the_seed(small_config: ExperimentConfig) -> None:
    """The configuration's own setting is one of the grid's, and comes first."""
    own = small_config.system.gate.temperature
    space = {
        "system.gate.temperature": {"values": [0.25, own, 0.75]},
        "system.use": {"values": [list(small_config.system.use), ["visual", "text"]]},
    }
    config = with_space(small_config, space, trials="all")
    trials = draw_trials(config, seed=1)
    found = [(trial.config.system.gate.temperature, trial.config.system.use) for trial in trials]
    assert found[0] == (own, small_config.system.use)
    uses = (small_config.system.use, ("visual", "text"))
    assert sorted(found) == sorted((temperature, use) for temperature in (0.25, own, 0.75) for use in uses)
    assert trials == draw_trials(config, seed=2)


def test_a_grid_is_tried_whole_whatever_repeats_in_it(small_config: ExperimentConfig) -> None:
    """A preset overrides other keys of the gate, so most settings are the same."""
    space = {
        "system.gate.preset": {"values": ["paper", "confidence"]},
        "system.gate.temperature": {"values": [0.25]},
        "system.gate.inputs": {"values": ["raw", "normalised", "confidence", "both"]},
        "system.gate.scoring": {"values": ["choice", "mixture", "product"]},
        "system.gate.training": {"values": ["sampled", "mixture"]},
        "system.gate.calibration": {"values": ["none", "scale", "fitted"]},
        "system.gate.units": {"values": ["tuned", "frozen"]},
    }
    trials = draw_trials(with_space(small_config, space, trials="all"), seed=0)
    assert {trial.changes["system.gate.preset"] for trial in trials[1:]} == {"paper", "confidence"}


def test_a_range_is_no_grid(small_config: ExperimentConfig) -> None:
    space = {"system.gate.temperature": {"values": [0.5]}, "train.learning_rate": {"uniform": [0.1, 0.2]}}
    with pytest.raises(ValidationError, match=r"every setting of a grid, but train.learning_rate is a range: list its"):
        with_space(small_config, space, trials="all")


@pytest.mark.parametrize("trials", ["al", 0, 1.5])
def test_a_wrong_number_of_trials_names_its_key_alone(trials: object) -> None:
    with pytest.raises(UserError, match=r"tune.trials: .*; tune.trials: Input should be 'all'") as caught:
        parse_config({"model": "clip", "backbone": {"architecture": "tiny"}, "tune": {"trials": trials}})
    assert "constrained" not in str(caught.value)


def test_without_a_space_there_is_one_trial(small_config: ExperimentConfig) -> None:
    assert len(draw_trials(with_space(small_config, {}), seed=0)) == 1


@pytest.mark.parametrize(
    ("space", "named"),
    [
        ({"system.gate.temprature": {"values": [0.1]}}, "did you mean 'temperature'"),
        ({"system.gate.temperature": {"values": [-1.0]}}, "system.gate.temperature"),
        ({"train.learning_rat": {"values": [0.1]}}, "learning_rate"),
        ({"system.width.x": {"values": [1]}}, "'system.width.x' is no key"),
        ({"backbone.architecture": {"values": ["tiny"]}}, "'backbone.architecture' cannot be searched"),
        ({"system.use": {"values": [["text", "sound"]]}}, "system.use"),
    ],
)
def test_a_wrong_space_names_its_key(small_config: ExperimentConfig, space: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        draw_trials(with_space(small_config, space), seed=0)
    with pytest.raises(UserError, match=named):  # and stage one does not start with it
        parse_config({**small_config.model_dump(mode="json"), "tune": {"space": space}})


@given(st.dictionaries(st.integers(0, 30), st.sampled_from([0.1, 0.2, 0.3]), min_size=1), st.integers(2, 4))
def test_survivors_are_the_best_and_ties_go_to_the_lower_number(mrr: dict[int, float], reduction: int) -> None:
    kept = survivors(mrr, reduction)
    assert kept == sorted(kept)
    assert len(kept) == math.ceil(len(mrr) / reduction)
    for out in mrr.keys() - set(kept):
        assert all(mrr[number] > mrr[out] or (mrr[number] == mrr[out] and number < out) for number in kept)


def test_the_configuration_with_drawn_lists_survives_its_yaml(small_config: ExperimentConfig) -> None:
    from dsmip.runs.load_config import read_config

    config = with_space(small_config, {"system.use": {"values": [["text", "visual"]]}})
    drawn = draw_trials(config, seed=0)[1].config
    assert read_config(to_yaml(drawn)) == drawn
    assert merged(drawn.tune, {}) == drawn.tune


def test_the_best_trial_s_sentence_has_the_rule_of_equals() -> None:
    report = {"trial": 0, "changes": {}, "best": {"hits@1": 0.25, "mrr": 0.5}, "mrr": {"0": 0.5, "1": 0.4}}
    said = "best is trial 0 (the configuration unchanged): validation hits@1 0.250, MRR 0.500"
    assert best_trial(report) == said
    report["mrr"] = {"2": 0.5, "0": 0.5}
    assert best_trial(report) == f"{said}; trial 2 has the same MRR, and of equals the lowest number is taken"
    report["mrr"] = {"0": 0.5, "2": 0.5, "4": 0.5}
    assert "; trial 2, trial 4 have the same MRR, and" in best_trial(report)
