"""The job `dsmip plan`: what a configuration on a data set will take, before anything long starts."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.errors import UserError
from dsmip.models import find_system
from dsmip.planning.amounts import Counts
from dsmip.planning.disk import Stored, disk_problems, stored
from dsmip.planning.forecast import Forecast, Forecaster
from dsmip.planning.machine import Machines, own_cpus, this_machine
from dsmip.planning.probing.parts import bare, probe_system
from dsmip.planning.probing.pretraining import is_configured, probe_pretraining
from dsmip.planning.probing.probe import Meter
from dsmip.planning.rates import stated_node
from dsmip.runs.checks import check_pretraining, check_training
from dsmip.runs.load_config import job_config
from dsmip.storage.atomic import write_masked_json
from dsmip.storage.locations import local_path
from ray_jobs.cluster.node_types import node_types_of
from ray_jobs.local_jobs.planning.tables import show_plan
from ray_jobs.terminal.lines import complain
from ray_jobs.training.trials import draw_trials


@dataclass(frozen=True)
class Plan:
    """A forecast with its files.

    Attributes:
        probe_seconds: How long the probe took, on the clock and of processor time.
    """

    config: str
    data: str
    forecast: Forecast
    files: Sequence[Stored]
    machines: Machines
    probe_seconds: tuple[float, float]

    @property
    def fits(self) -> bool:
        return not self.forecast.problems

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        forecast, machines = self.forecast, self.machines
        parts: dict[str, dict[str, str | int]] = {
            name: {"kind": p.kind, "trained": p.trained, "total": p.total} for name, p in forecast.costs.parts.items()
        }
        if (whole := forecast.costs.whole) is not None:
            parts["(whole)"] = {"kind": "whole", "trained": whole.trained, "total": whole.total}
        return {
            "config": self.config,
            "data": self.data,
            "fits": self.fits,
            "problems": [asdict(each) for each in forecast.problems],
            "measured": not machines.stated,
            "sources": list(machines.stated),
            "probe_seconds": {"wall": self.probe_seconds[0], "cpu": self.probe_seconds[1]},
            "parts": parts,
            "steps": [asdict(each) for each in forecast.steps],
            "files": [asdict(each) for each in self.files],
            "disk": {"needed": sum(each.num_bytes for each in self.files), "free": machines.disk},
            "nodes": [asdict(each) for each in machines.nodes],
        }


def plan(
    config: str,
    data: str,
    run: str,
    cluster: Path | None,
    overrides: Sequence[str],
    json_file: Path | None,
    entities: int | None = None,
) -> Plan:
    """Probes, forecasts and prints.

    Args:
        config: A shipped configuration's name or a YAML file.
        data: A dataset directory or its URI.
        run: Where the run will lie.
        cluster: A cluster file: the forecast is for its nodes, from stated rates.
        overrides: `key=value` of the configuration.
        json_file: Where to write all of it as well.
        entities: Plan as if the knowledge base had so many.

    Raises:
        UserError: A wrong configuration, data that are not prepared, a wrong cluster file.
    """
    start = time.process_time()  # of imports, which every worker repeats
    settings = job_config(config, overrides)
    nodes = None if cluster is None else _stated(cluster, settings)
    dataset = Dataset.open(data)
    pretrains = is_configured(settings)
    warnings = check_training(bare(settings), dataset)
    for warning in dict.fromkeys([*warnings, *(check_pretraining(settings, dataset) if pretrains else [])]):
        complain(warning)
    device = torch.device("cuda" if nodes is None and _wants_gpu(settings) and torch.cuda.is_available() else "cpu")
    folder = local_path(run)
    machines = this_machine(folder, own_cpus(), float(torch.cuda.device_count()), start)
    if nodes is not None:
        machines = replace(nodes, process=machines.process, start=machines.start)
    begun, meter = (time.perf_counter(), time.process_time()), Meter(device, counts=cluster is not None)
    pretrain = probe_pretraining(settings, dataset, meter) if pretrains else None
    costs = probe_system(settings, dataset, meter)
    took = time.perf_counter() - begun[0], time.process_time() - begun[1]
    counts, trials, variants = Counts.of(dataset), 0, list[str]()
    if entities is not None:
        counts = counts.with_entities(entities)
    if costs.whole is not None:
        trials, variants = _sweep(settings)
    forecast = Forecaster(settings, costs, pretrain, counts, machines, trials, variants).forecast()
    files = stored(settings, costs, pretrain, counts, trials)
    problems = [*forecast.problems, *disk_problems(files, machines.disk, settings)]
    found = Plan(config, data, replace(forecast, problems=problems), files, machines, took)
    show_plan(found.forecast, found.files, machines, took)
    if json_file is not None:
        write_masked_json(json_file, found.to_json())
    return found


def _sweep(config: ExperimentConfig) -> tuple[int, list[str]]:
    """How many trials a sweep will have, and of which parts it trains experts of other settings first."""
    system, trials = find_system(config.model), draw_trials(config, 0)
    others = {
        (part, key)
        for trial in trials
        for part in system.feature_parts(trial.config.system)
        if part in system.part_names(config.system)
        and (key := system.part_key(part, trial.config)) != system.part_key(part, config)
    }
    return len(trials), sorted(part for part, _ in others)


def _wants_gpu(config: ExperimentConfig) -> bool:
    parts = find_system(config.model).part_names(config.system)
    return any(config.part(name).resources.gpu > 0 for name in parts)


def _stated(cluster: Path, config: ExperimentConfig) -> Machines:
    """A cluster's nodes.

    Raises:
        UserError: The file has no node types, or one whose machine nothing is stated of.
    """
    nodes, sources = [], list[str]()
    half = config.train.precision != "fp32"
    for name, kind in node_types_of(cluster).items():
        if not kind.machine:
            raise UserError(f"{cluster}: node type {name} names no machine (node_config.InstanceType)")
        resources = kind.resources
        node, of_node = stated_node(
            name, kind.machine, kind.max_workers, resources.get("CPU"), resources.get("GPU"), half=half
        )
        nodes.append(node)
        sources += of_node
    if not nodes:
        raise UserError(
            f"{cluster}: no worker node types (available_node_types, as in cluster.yaml); machines of your own are "
            "planned for on one of them: leave --cluster out there"
        )
    return Machines(nodes, 0, 0.0, None, tuple(dict.fromkeys(sources)))
