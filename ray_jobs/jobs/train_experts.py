"""The job `dsmip train` (stage one): every part of a system at once, each a Ray Train run of its own."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray_jobs.cluster.connection import connected

# isort: split
from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.errors import ReportedError
from dsmip.reranking.training import train_any_part
from dsmip.runs.checks import check_training
from dsmip.runs.load_config import read_config, to_yaml
from dsmip.runs.run import Run
from dsmip.runs.status import TrainingState, read_status
from dsmip.storage.locations import Location, open_run_storage
from dsmip.training.stages import check_held_out
from dsmip.training.trackers import Watched, check_tools
from ray_jobs.cluster.resources import check_before_start
from ray_jobs.terminal.display import Display
from ray_jobs.training.context import RayContext
from ray_jobs.training.ray_train import Training, run_trainings


def train_experts(
    config: ExperimentConfig, dataset: Dataset, location: Location, display: Display, *, verbose: bool = False
) -> Run:
    """Trains all parts that are not finished yet into the run at `location`; run again it resumes.

    Raises:
        UserError: The configuration and the data cannot be trained with, the run belongs to something else, or the
            cluster can never run a part.
        JobFailed: After all other parts have ended.
    """
    check_tools(config.watch)
    storage = open_run_storage(location)  # or the address is refused
    for line in check_training(config, dataset):
        display.say(line)
    check_held_out(dataset, config.held_out)
    run = Run.create(storage, config, dataset)
    display.interrupted = lambda: _saved(run)
    with run.recorded("train"):
        train_parts(run, [(run, part) for part in run.part_names], display, verbose=verbose)
    return run


def train_parts(root: Run, parts: Sequence[tuple[Run, str]], display: Display, *, verbose: bool = False) -> None:
    """Trains the unfinished ones of `parts`: pairs of a home (`root` or a variant below it) and a part's name.

    Re-rankers come after all others, whose best entities they are trained on.
    """
    trainings = []
    for home, part in parts:
        if home.is_finished(part):
            display.say(f"  {part}: finished already, {_figures(home, part)}")
        else:
            trainings.append(_training(root, home, part))
    if not trainings:
        return
    started = time.monotonic()
    check_before_start([training.request for training in trainings])
    with connected(verbose=verbose):
        rerankers = root.system.rerankers(root.config.system)
        for later in (False, True):
            if now := [each for each in trainings if (each.settings["part"] in rerankers) == later]:
                run_trainings(now, display)
    root.storage.refresh()
    for home, part in parts:
        display.say(f"  {part}: {_figures(home, part)}")
    display.say(f"  trained in {time.monotonic() - started:.0f} s; run: {root.storage}")


def _saved(run: Run) -> str:
    """What is kept of an interrupted training, and how it goes on."""
    try:
        parts = [each for each in read_status(run.storage).parts if each.name in run.part_names]
    except ReportedError:  # the store is away
        return f"interrupted; the same command goes on from what is saved in {run.storage}"
    kept = ", ".join(f"{each.name} {_kept(each)}" for each in parts)
    return f"interrupted; saved in {run.storage}: {kept}; the same command goes on from there"


def _kept(part: TrainingState) -> str:
    if part.state == "finished":
        return "finished"
    if not (part.epochs_saved or part.step_saved):
        return "nothing yet"
    step = f" and {part.step_saved} steps" if part.step_saved else ""
    return f"{part.epochs_saved} of {part.num_epochs} epochs{step}"


def _training(root: Run, home: Run, part: str) -> Training:
    plan = home.config.part(part)
    name = part if home.folder == root.folder else f"{part}-{home.folder.name}"
    return Training(
        name=name,
        loop=worker_loop,
        settings={
            "root": root.storage.location,
            "data": root.dataset.location,
            "config": to_yaml(home.config),
            "part": part,
        },
        num_epochs=home.config.train_of(part).epochs,
        location=home.trainings,
        plan=plan,
        watched=Watched(root.storage, name, home.config.watch, home.config.model_dump(mode="json")),
    )


def worker_loop(context: RayContext, settings: Mapping[str, Any]) -> None:
    root = Run.open(settings["root"], settings["data"])
    home = root.home(settings["part"], read_config(settings["config"]))
    train_any_part(home, settings["part"], context)


def _figures(home: Run, part: str) -> str:
    best = home.part_report(part)["best"]
    if not best:  # `dsmip import` made it
        return "imported, without validation figures"
    when = f"after epoch {int(best['epoch']) + 1}" if "epoch" in best else "with nothing to train"
    return f"validation hits@1 {best['hits@1']:.3f}, MRR {best['mrr']:.3f} {when}"
