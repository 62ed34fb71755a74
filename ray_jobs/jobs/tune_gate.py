"""The job `dsmip tune` (stage two): a Ray Tune sweep over gate, units and expert settings by successive halving.

Trials are drawn up front and each rung ends before the next one starts, so the winner never depends on timing.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray_jobs.cluster.connection import connected

# isort: split
from dsmip.config import ExperimentConfig
from dsmip.errors import UserError
from dsmip.runs.checks import check_trials
from dsmip.runs.cleanup import SWEEP
from dsmip.runs.load_config import key_text, to_yaml
from dsmip.runs.loaded_model import CONFIG, PART, WEIGHTS
from dsmip.runs.run import Run, first_difference
from dsmip.storage.parsing import read_json
from dsmip.training.stages import check_held_out
from dsmip.training.trackers import check_tools
from ray_jobs.cluster.resources import check_before_start, check_feasible
from ray_jobs.cluster.tasks import run_shares
from ray_jobs.jobs.train_experts import train_parts
from ray_jobs.terminal.display import Display
from ray_jobs.training.judge import gate_warnings, judge
from ray_jobs.training.sweep import best_trial, decided, run_rung, trial_request
from ray_jobs.training.trial import RESULT, PartTables, TrialTask, cache_features, trial_name
from ray_jobs.training.trials import Trial, draw_trials, survivors


def tune_gate(
    run: Run, config: ExperimentConfig, display: Display, *, seed: int = 0, verbose: bool = False
) -> dict[str, Any]:
    """Sweeps `config.tune.space` around `config`, writes the best trial as the run's whole system, returns its report.

    Run again it goes on from finished rungs and the trials' checkpoints. The test split is never read.

    Raises:
        UserError: No gate, an expert is missing, wrong space, another sweep is there.
        JobFailed: A trial failed.
    """
    if not run.system.gated:
        raise UserError(f"{run.system.name} has no gate: 'dsmip train' trains all of it and there is nothing to tune")
    _check_config(run, config)
    check_tools(config.watch)
    trials = draw_trials(config, seed)
    stamp = _checked_stamp(run, trials, seed)
    if run.is_finished(run.system.name) and run.part_report(run.system.name).get("sweep") == stamp:
        display.say(f"  sweep finished already: {best_trial(run.part_report(run.system.name))}")
        return run.part_report(run.system.name)
    check_trials([(trial.changes, trial.config) for trial in trials])
    check_held_out(run.dataset, run.config.held_out)
    check_before_start([trial_request("a trial", config.tune.resources)])
    if config.tune.trials != "all" and len(trials) < config.tune.trials:
        display.say(
            f"  tune.space has {len(trials)} different settings: {len(trials)} trials, not {config.tune.trials}"
        )
    started = time.monotonic()
    with run.recorded("tune", config, seed=seed), connected(verbose=verbose):
        check_feasible([trial_request("a trial", config.tune.resources)])
        _train_variants(run, trials, display, verbose=verbose)
        features = _cache_all_features(run, trials, display)
        _claim_folder(run, trials, seed, stamp)
        results = _halve(run, trials, features, display)
        report = _save_winner(run, trials, results, (seed, stamp), features, display)
    for line in report["warnings"]:
        display.say(f"  warning: {line}")
    display.say(f"  swept in {time.monotonic() - started:.0f} s; {best_trial(report)}")
    return report


def _check_config(run: Run, config: ExperimentConfig) -> None:
    """Checks the configuration of a sweep against the run's.

    Raises:
        UserError: A sweep cannot make a change: stage one is over.
    """
    fixed = {"tune", "system", "watch"}
    if difference := first_difference(
        run.config.model_dump(mode="json", exclude=fixed), config.model_dump(mode="json", exclude=fixed)
    ):
        raise UserError(f"{difference}, but stage one is over: change tune.* or system.*, or train another run")


def _checked_stamp(run: Run, trials: Sequence[Trial], seed: int) -> str:
    """Hash of what the sweep is.

    Raises:
        UserError: The run holds another sweep.
    """
    stamp = sweep_key(trials, seed, run.note_files())
    path = run.folder / SWEEP
    if path.is_file():
        remedy = f"; delete {run.storage}/tune to start anew"
        found, its_seed, num_trials = read_json(path, lambda it: (it["sha256"], it["seed"], len(it["trials"])), remedy)
        if found == sweep_key(trials, seed):  # of an older version, which had the names of files in it
            return str(found)
        if found != stamp:
            raise UserError(
                f"{run.storage}/tune holds another sweep (seed {its_seed}, {num_trials} trials, or "
                "other settings); repeat that one to resume it, or delete the folder to start anew"
            )
    return stamp


def sweep_key(trials: Sequence[Trial], seed: int, names: Mapping[str, str] | None = None) -> str:
    """Hex digest of what a sweep is: its seed and its trials' configurations, without what only shows figures.

    Args:
        names: What stands for the names of files in it.
    """
    configs = (trial.config.model_copy(update={"watch": ()}) for trial in trials)
    text = json.dumps([seed, *(key_text(config, names) for config in configs)])
    return hashlib.sha256(text.encode()).hexdigest()


def _claim_folder(run: Run, trials: Sequence[Trial], seed: int, stamp: str) -> None:
    shown = {str(trial.number): dict(trial.changes) for trial in trials}
    run.storage.write_json(SWEEP, {"sha256": stamp, "seed": seed, "trials": shown})


def _used_parts(run: Run, trials: Sequence[Trial]) -> list[tuple[Run, str]]:
    """Every feature part that some trial needs, once: its home and name."""
    used: dict[tuple[str, str], tuple[Run, str]] = {}
    for trial in trials:
        for part in run.system.feature_parts(trial.config.system):
            home = run.home(part, trial.config)
            used.setdefault((home.storage.location, part), (home, part))
    return list(used.values())


def _train_variants(run: Run, trials: Sequence[Trial], display: Display, *, verbose: bool) -> None:
    """Trains experts of stage-one settings that only the sweep asks for; the run's own must be finished."""
    variants = []
    for home, part in _used_parts(run, trials):
        if part not in run.part_names or home.is_finished(part):
            continue
        if home.folder == run.folder:
            home.part_report(part)  # raises: says that 'dsmip train' comes first
        variants.append((home, part))
    if variants:
        display.say(f"  {len(variants)} experts of other settings to train first")
        train_parts(run, variants, display, verbose=verbose)


def _cache_all_features(run: Run, trials: Sequence[Trial], display: Display) -> dict[tuple[str, str], PartTables]:
    """Computes all feature tables before the trials start; returns their files by (home's location, part)."""
    resources = trials[0].config.tune.resources
    used = {
        f"{part} features" if home.folder == run.folder else f"{part} features {home.folder.name}": (home, part)
        for home, part in _used_parts(run, trials)
    }
    where = run.storage.location, run.dataset.location
    shares = {name: (*where, to_yaml(home.config), part) for name, (home, part) in used.items()}
    made = run_shares(cache_features, shares, cpu=resources.cpu, gpu=resources.gpu, display=display)
    features = {(home.storage.location, part): made[name] for name, (home, part) in used.items()}
    sizes = {name: size for tables in features.values() for name, size in tables.num_bytes.items()}
    num_bytes = sum(sizes.values())
    for folder in sorted({tables.beside for tables in features.values() if tables.beside}):
        display.say(f"  the gate reads {folder}")
    display.say(f"  feature tables of {len(used)} encoders: {num_bytes / 2**20:.0f} MiB, shared by all trials")
    return features


def _halve(
    run: Run, trials: Sequence[Trial], features: Mapping[tuple[str, str], PartTables], display: Display
) -> dict[int, float]:
    """Runs rung after rung; returns the last rung's validation MRR by trial number."""
    plan = trials[0].config.tune
    results: dict[int, float] = {}
    numbers = [trial.number for trial in trials]
    for rung, epochs in enumerate(plan.rungs):
        name = f"tune/rung-{rung}.json"
        if not (run.folder / name).is_file():
            tasks = {n: _task(run, trials[n], epochs, features) for n in numbers}
            outcome = decided(run_rung(run, rung, tasks, plan.resources, display), display)
            left = survivors(outcome["mrr"], plan.reduction)
            run.storage.write_json(name, {"epochs": epochs, **outcome, "survivors": left})
        results, failed, numbers = read_json(run.folder / name, _rung, f"; delete {run.storage}/tune to start anew")
        for number, message in failed.items():
            display.say(f"  trial {number}: failed: {message}")
        figures = ", ".join(f"trial {n} {mrr:.4f}" for n, mrr in sorted(results.items()))
        display.say(f"  rung {rung + 1} of {len(plan.rungs)}, {epochs} epochs, validation MRR: {figures}")
    return results


def _rung(stored: Any) -> tuple[dict[int, float], dict[str, str], list[int]]:
    """MRR by trial, messages of those that failed, and which go on."""
    return {int(number): mrr for number, mrr in stored["mrr"].items()}, stored["failed"], stored["survivors"]


def _task(run: Run, trial: Trial, epochs: int, features: Mapping[tuple[str, str], PartTables]) -> TrialTask:
    parts = run.system.feature_parts(trial.config.system)
    tables = {part: features[run.home(part, trial.config).storage.location, part] for part in parts}
    return TrialTask(trial.number, run.storage.location, run.dataset.location, to_yaml(trial.config), epochs, tables)


def _save_winner(
    run: Run,
    trials: Sequence[Trial],
    results: Mapping[int, float],
    sweep: tuple[int, str],
    features: Mapping[tuple[str, str], PartTables],
    display: Display,
) -> dict[str, Any]:
    """Judges the best trial, and copies it into the run as the whole system; part.json comes last.

    Args:
        sweep: Its seed and its stamp.
    """
    best = min(results, key=lambda number: (-results[number], number))
    judged = _judged(run, trials[best], features, display)
    source, target = run.storage / trial_name(best), run.storage / run.system.name
    source.pull(RESULT, WEIGHTS)
    result: dict[str, Any] = read_json(source.folder / RESULT, dict, f"; delete {run.storage}/tune to start anew")
    target.delete(PART)  # of an earlier sweep: its weights are about to go
    with target.atomic(WEIGHTS) as temporary:
        shutil.copyfile(source.folder / WEIGHTS, temporary)
    target.write_text(CONFIG, to_yaml(trials[best].config))
    changes, (seed, stamp) = dict(trials[best].changes), sweep
    report = {**result, "trial": best, "changes": changes, "mrr": dict(results), "sweep": stamp, "tune_seed": seed}
    report |= {"fusion": judged, "warnings": gate_warnings(run.system.name, result["best"], judged)}
    target.write_json(PART, report)
    return run.part_report(run.system.name)


def _judged(run: Run, trial: Trial, features: Mapping[tuple[str, str], PartTables], display: Display) -> dict[str, Any]:
    """What `judge` says of a trial, on a worker with the trials' resources."""
    task, resources = _task(run, trial, 0, features), trial.config.tune.resources
    share = (task.root, task.data, trial_name(trial.number), task.config, task.features)
    return run_shares(judge, {"judge": share}, cpu=resources.cpu, gpu=resources.gpu, display=display)["judge"]
