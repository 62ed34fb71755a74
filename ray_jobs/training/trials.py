"""Trials of a sweep, drawn up front, and which of them go on. Knows no Ray."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
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

    Of a grid (`trials: all`) every setting, in the order of its lists; there nothing is drawn. A key `train.<name>`
    changes the stage-two training (`tune.train`), every other key the configuration itself.

    Raises:
        UserError: When a key of the space, or a drawn value, is not valid.
    """
    trials = [Trial(0, {}, config)]
    known = {to_yaml(config)}
    is_grid, repeated = config.tune.trials == "all", 0
    settings = _grid(config.tune.space) if is_grid else _draws(config.tune.space, seed)
    for changes in settings:
        if len(trials) == config.tune.trials or (repeated == _DRAWS_PER_TRIAL and not is_grid):
            break
        changed = swept(config, changes)
        repeated += 1
        if to_yaml(changed) not in known:
            known.add(to_yaml(changed))
            trials.append(Trial(len(trials), changes, changed))
            repeated = 0
    return trials


def _draws(space: Mapping[str, Choice], seed: int) -> Iterator[dict[str, Any]]:
    """Settings of the space without end; none of an empty one."""
    rng = Random(f"sweep/{seed}")
    while space:
        yield {key: _draw(choice, rng) for key, choice in space.items()}


def _grid(space: Mapping[str, Choice]) -> Iterator[dict[str, Any]]:
    """Every setting of a space of listed values, the last dimension fastest."""
    values = [[_plain(value) for value in choice.values or ()] for choice in space.values()]
    for setting in product(*values):
        yield dict(zip(space, setting, strict=True))


def survivors(mrr: Mapping[int, float], reduction: int) -> list[int]:
    """The best ceil(n / reduction) trial numbers by validation MRR, in ascending order; ties go to the lower number."""
    best_first = sorted(mrr, key=lambda number: (-mrr[number], number))
    return sorted(best_first[: ceil(len(mrr) / reduction)])


def _draw(choice: Choice, rng: Random) -> Any:
    if choice.values is not None:
        return _plain(rng.choice(choice.values))
    if choice.uniform is not None:
        return rng.uniform(*choice.uniform)
    assert choice.loguniform is not None
    low, high = choice.loguniform
    return exp(rng.uniform(log(low), log(high)))


def _plain(value: Any) -> Any:
    """As configurations have it."""
    return list(value) if isinstance(value, tuple) else value
