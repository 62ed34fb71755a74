"""A sweep's rungs on Ray Tune: synchronous successive halving."""

import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ray_jobs.cluster import connection  # noqa: F401  (first: Ray reads its variables when it is imported)

# isort: split
from ray import tune

from dsmip.config import Resources
from dsmip.errors import ReportedError
from dsmip.messages import masked
from dsmip.runs.run import Run
from ray_jobs.cluster.failures import Failure, JobFailed, exit_code_of
from ray_jobs.cluster.resources import Request
from ray_jobs.cluster.tasks import Call, run_watched
from ray_jobs.terminal.display import Display
from ray_jobs.training.trial import TrialTask, guarded_trial

_SYNC_SECONDS = 60  # for Tune's few notes about trials; its own 30 min would be waited for when a store is away
_LOST_TRIALS = 2  # how many times a trial restarts from its checkpoint after its process was lost


def run_rung(
    run: Run, rung: int, tasks: Mapping[int, TrialTask], resources: Resources, display: Display
) -> dict[int, float | Failure]:
    """One Ray Tune run over the given trials; returns the validation MRR of each, or why it has none."""
    storage = run.storage / "tune/ray"
    storage.delete(f"rung-{rung}")  # of an interrupted sweep: trials have own checkpoints
    path, file_system = storage.arrow_filesystem()

    def fit(events: Any) -> Any:
        trainable = tune.with_parameters(tune_trial, tasks=dict(tasks), events=events)
        return tune.Tuner(
            tune.with_resources(trainable, {"CPU": resources.cpu, "GPU": resources.gpu}),
            param_space={"number": tune.grid_search(list(tasks))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(
                name=f"rung-{rung}",
                storage_path=path,
                storage_filesystem=file_system,
                sync_config=tune.SyncConfig(sync_timeout=_SYNC_SECONDS),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=_LOST_TRIALS),
            ),
        ).fit()

    requests = [trial_request(f"trial {number}", resources) for number in tasks]
    for _, call in run_watched({"rung": Call(fit, requests)}, display):
        try:
            grid = call.result()
        except Exception as error:  # a store that is away comes as whatever its client raises
            raise _stopped(run, rung, error) from error
    found = {result.config["number"]: result for result in grid}
    return {number: trial_outcome(found[number]) for number in tasks}


def _stopped(run: Run, rung: int, error: Exception) -> JobFailed:
    """Tune itself failed, not a trial."""
    log, seen = f"tune/rung-{rung}.error.txt", ""
    with suppress(ReportedError):
        run.storage.write_text(log, masked("".join(traceback.format_exception(error))))
        seen = f" (see {run.storage}/{log})"
    reason = " ".join(str(error).split()) or type(error).__name__
    return JobFailed(f"rung {rung + 1} stopped: {reason}{seen}; run the same command again to resume", 1)


def trial_outcome(result: Any) -> float | Failure:
    """A trial's validation MRR, or why it has none."""
    metrics = result.metrics or {}
    if "mrr" in metrics:
        mrr: float = metrics["mrr"]
        return mrr
    if "failure" in metrics:
        return Failure(**metrics["failure"])
    return Failure(f"its process was lost: {' '.join(str(result.error).split())}", may_pass=True)


def decided(ends: Mapping[int, float | Failure], display: Display) -> dict[str, Any]:
    """A rung's `mrr` and messages of those that `failed`, by trial number.

    Raises:
        JobFailed: When a trial failed of what may pass, for the winner would depend on it; and when all failed.
    """
    failures = {number: end for number, end in ends.items() if isinstance(end, Failure)}
    if may_pass := {number: failure for number, failure in failures.items() if failure.may_pass}:
        for number, failure in may_pass.items():
            display.say(f"  trial {number}: failed: {failure.message}")
        names = ", ".join(f"trial {number}" for number in may_pass)
        raise JobFailed(f"failed: {names}; run the same command again to resume", exit_code_of(may_pass.values()))
    mrr = {number: end for number, end in ends.items() if not isinstance(end, Failure)}
    if not mrr:
        number, first = next(iter(failures.items()))
        raise JobFailed(f"all trials failed; trial {number}: {first.message}", exit_code_of(failures.values()))
    return {"mrr": mrr, "failed": {number: failure.message for number, failure in failures.items()}}


def best_trial(report: Mapping[str, Any]) -> str:
    """A finished sweep in a sentence: its best trial, and the rule where others are equal."""
    changes = ", ".join(f"{key}={value}" for key, value in report["changes"].items()) or "the configuration unchanged"
    best, trial = report["best"], int(report["trial"])
    mrr = {int(number): value for number, value in report["mrr"].items()}
    equal = [f"trial {number}" for number in sorted(mrr) if number != trial and mrr[number] == mrr[trial]]
    have = "have" if len(equal) > 1 else "has"
    rule = f"; {', '.join(equal)} {have} the same MRR, and of equals the lowest number is taken" if equal else ""
    return f"best is trial {trial} ({changes}): validation hits@1 {best['hits@1']:.3f}, MRR {best['mrr']:.3f}{rule}"


def tune_trial(config: dict[str, int], tasks: Mapping[int, TrialTask], events: Any) -> None:
    tune.report(guarded_trial(tasks[config["number"]], events))


def trial_request(name: str, resources: Resources) -> Request:
    """What a trial asks of the cluster."""
    return Request(name, 1, resources.cpu, resources.gpu)
