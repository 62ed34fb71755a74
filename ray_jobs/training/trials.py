"""Trials of a sweep, drawn up front, and which of them go on. Knows no Ray."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, exp, log
from random import Random
from typing import Any

from dsmip.config import Choice, ExperimentConfig
from dsmip.runs.load_config import swept, to_yaml

_DRAWS_PER_TRIAL = 100  # a finite space is taken as used up after so many repetitions in a row


@dataclass(frozen=True)
class Trial:
    """One configuration of a sweep. `changes` are the drawn values by key; trial 0 has none."""

    number: int
    changes: Mapping[str, Any]
    config: ExperimentConfig


def draw_trials(config: ExperimentConfig, seed: int) -> list[Trial]:
    """Up to `config.tune.trials` different configurations: first the unchanged one, then random draws of the space.

    A key `train.<name>` changes the stage-two training (`tune.train`), every other key the configuration itself.

    Raises:
        UserError: When a key of the space, or a drawn value, is not valid.
    """
    rng = Random(f"sweep/{seed}")
    trials = [Trial(0, {}, config)]
    known = {to_yaml(config)}
    for number in range(1, config.tune.trials):
        for _ in range(_DRAWS_PER_TRIAL if config.tune.space else 0):
            changes = {key: _draw(choice, rng) for key, choice in config.tune.space.items()}
            drawn = swept(config, changes)
            if to_yaml(drawn) not in known:
                known.add(to_yaml(drawn))
                trials.append(Trial(number, changes, drawn))
                break
        else:
            break
    return trials


def survivors(mrr: Mapping[int, float], reduction: int) -> list[int]:
    """The best ceil(n / reduction) trial numbers by validation MRR, in ascending order; ties go to the lower number."""
    best_first = sorted(mrr, key=lambda number: (-mrr[number], number))
    return sorted(best_first[: ceil(len(mrr) / reduction)])


def _draw(choice: Choice, rng: Random) -> Any:
    if choice.values is not None:
        value = rng.choice(choice.values)
        return list(value) if isinstance(value, tuple) else value
    if choice.uniform is not None:
        return rng.uniform(*choice.uniform)
    assert choice.loguniform is not None
    low, high = choice.loguniform
    return exp(rng.uniform(log(low), log(high)))
