"""The job `dsmip demo`: every step from drawn data to a comparison of experts, gate and oracle, in one folder."""

import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray_jobs.cluster.connection import check_cluster, connected

# isort: split
import pyarrow.parquet as pq
import torch
from rich.table import Table

from data_prep.demo.release import DemoConfig
from data_prep.formats.mimic import MimicRelease
from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.data.image_preparation import JPEG_QUALITY
from dsmip.data.manifest import ImageSettings
from dsmip.errors import UserError
from dsmip.evaluation.experts.oracle import oracle
from dsmip.evaluation.experts.survey import KeptScores
from dsmip.evaluation.index_builder import OpenedEvaluation
from dsmip.evaluation.metrics import shown_metrics
from dsmip.evaluation.report import evaluate_model
from dsmip.evaluation.stored.layout import CALIBRATED_ON, RANKS, evaluation_name
from dsmip.progress import no_progress
from dsmip.runs.load_config import changed, job_config
from dsmip.runs.run import Run
from dsmip.storage.atomic import write_json
from dsmip.storage.parsing import read_json
from ray_jobs.cluster.resources import cluster_kinds
from ray_jobs.jobs.prepare import BuildOptions, prepare_release, write_release_once
from ray_jobs.jobs.pretrain import pretrain_backbone
from ray_jobs.jobs.train_experts import train_experts
from ray_jobs.jobs.tune_gate import tune_gate
from ray_jobs.terminal.display import Display

ORACLE = "oracle"


def run_demo(
    out: Path,
    world: DemoConfig,
    *,
    config: str = "demo",
    overrides: Sequence[str] = (),
    verbose: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Runs all steps in `out` and returns what it writes to `out/results.json`. Run again, it resumes.

    Raises:
        UserError: When `out` belongs to something else.
        JobFailed: When a training failed.
    """
    out, display = out.resolve(), display or Display()
    base = job_config(config, overrides)
    check_cluster()
    journal = Journal.open(out, world, display)
    with ExitStack() as ray_runs:
        with (
            journal.step("release", "Drawing a world of heraldic houses while Ray starts"),
            ThreadPoolExecutor(1) as pool,
        ):
            drawing = pool.submit(write_release_once, world, out / "release")
            ray_runs.enter_context(connected(verbose=verbose))
            drawing.result()
        with journal.step("prepare", "Preparing the data set"):
            dataset = _prepare(out, world)
        with journal.step("pretrain", "Pretraining a small CLIP on the knowledge base's own pictures and texts"):
            backbone = out / "backbone.safetensors"
            pretrain_backbone(_with_all_cpus(base), dataset, backbone, display)
        settings = changed(base, {"backbone": {"pretrained": str(backbone)}})
        with journal.step("train", f"Stage one: training {', '.join(settings.parts)}"):
            run = train_experts(settings, dataset, out / "run", display)
        with journal.step("tune", "Stage two: tuning the gate"):
            tune_gate(run, run.config, display, seed=world.seed)
    with journal.step("evaluate", "Ranking the whole knowledge base for every test mention"):
        results = compare(run, "test")
    results["seconds"] = journal.seconds
    write_json(out / "results.json", results)
    show_results(results, out, display)
    display.say("See it in a browser, or link a mention with it:")
    display.say(f"  {shlex.join(['dsmip', 'serve', _here(run.folder)])}")
    display.say(f"  {link_command(run, out)}")
    return results


def compare(run: Run, split: str) -> dict[str, Any]:
    """Figures of every expert, the gated system and the oracle over the experts; shares of the gate; hits@1 by kind.

    The system is calibrated first. `fusions` has those of the experts' calibrated mean and product, which have no gate.
    """
    experts = run.system.choices(run.whole_config().system)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluate_model(OpenedEvaluation(run, CALIBRATED_ON, run.system.name), device)
    run = replace(run, dataset=run.dataset.holding(split))  # read once for all models
    kept = KeptScores()
    evaluated = {
        model: evaluate_model(OpenedEvaluation(run, split, model), device, kept=kept)
        for model in (*experts, run.system.name, *run.system.fusions)
    }
    best = oracle({name: evaluated[name].folder for name in experts})
    fusions = {name: evaluated.pop(name).metrics["overall"] for name in run.system.fusions}
    overall = {name: each.metrics["overall"] for name, each in evaluated.items()} | {ORACLE: best["overall"]}
    kinds: dict[str, dict[str, float]] = {}
    for kind, hits in best["by_kind"].items():
        of_kind = {name: each.metrics["groups"]["kind"][kind]["hits@1"] for name, each in evaluated.items()}
        kinds[kind] = of_kind | {ORACLE: hits}
    usage = evaluated[run.system.name].metrics["experts"]
    return {
        "models": _shown(overall),
        "fusions": _shown(fusions),
        "gate": {key: usage[key] for key in ("pair_share", "gold_share")},
        "kinds": kinds,
    }


def _shown(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {key: figures[key] for key in shown_metrics()} for name, figures in metrics.items()}


def covered(models: Mapping[str, Mapping[str, float]], whole: str, figure: str = "hits@1") -> float | None:
    """Share of the way from the best expert to the oracle that the whole system goes; None when they are equal."""
    best = max(figures[figure] for name, figures in models.items() if name not in (whole, ORACLE))
    way = models[ORACLE][figure] - best
    return (models[whole][figure] - best) / way if way > 0 else None


def show_results(results: Mapping[str, Any], out: Path, display: Display) -> None:
    """Prints the tables, where everything is, and what to do next."""
    models, gate = results["models"], results["gate"]
    whole = next(name for name in models if name not in gate["pair_share"] and name != ORACLE)
    table = Table(
        "", *shown_metrics(), "pairs", "gold pairs", title="Test split, ranked against the whole knowledge base"
    )
    for name, figures in {**models, **results["fusions"]}.items():
        shares = [f"{gate[key][name]:.0%}" if name in gate[key] else "" for key in ("pair_share", "gold_share")]
        table.add_row(name, *(f"{figures[key]:.3f}" for key in shown_metrics()), *shares)
    display.console.print(table)
    kinds = Table("hits@1 by kind of mention", *models)
    for kind, hits in results["kinds"].items():
        kinds.add_row(kind, *(f"{hits[name]:.3f}" for name in models))
    display.console.print(kinds)
    if (share := covered(models, whole)) is not None:
        display.say(f"{whole} covers {share:.0%} of the way from the best expert to the oracle (hits@1).")
    display.say(f"Took {sum(results['seconds'].values()):.0f} s. Figures: {out / 'results.json'}; run: {out / 'run'}")
    display.say("Your own data in the MIMIC layout:")
    display.say("  dsmip prepare PATH/TO/RELEASE my-data --format mimic")
    backbone = f"backbone.pretrained={out / 'backbone.safetensors'}"
    display.say(f"  dsmip train --config demo --data my-data --run my-run --set {shlex.quote(backbone)}")
    display.say("  dsmip tune --run my-run")
    display.say("  dsmip evaluate --run my-run --split test")


def link_command(run: Run, out: Path) -> str:
    """What links a test mention by hand: of those with a picture the one whose entity the system ranks best."""
    ranks = run.folder / evaluation_name("test", run.system.name) / RANKS
    images = out / "release" / "mention_image"
    rows = pq.read_table(ranks, columns=["mention_id", "word", "sentence", "rank"]).to_pylist()
    shown = [row for row in rows if (images / f"{row['mention_id']}.jpg").is_file()]
    row = min(shown, key=lambda each: each["rank"])
    asked = [
        "--word",
        row["word"],
        "--sentence",
        row["sentence"],
        "--image",
        _here(images / f"{row['mention_id']}.jpg"),
    ]
    return shlex.join(["dsmip", "link", _here(run.folder), *asked])


def _here(path: Path) -> str:
    """A path as one would type it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _prepare(out: Path, world: DemoConfig) -> Dataset:
    images = ImageSettings(size=world.picture_size, quality=JPEG_QUALITY)
    options = BuildOptions(name=f"demo-{world.seed}", images=images, seed=world.seed)
    prepare_release(MimicRelease(out / "release"), out / "data", options, no_progress)
    return Dataset.open(out / "data")


def _with_all_cpus(config: ExperimentConfig) -> ExperimentConfig:
    """The backbone trains alone, so it gets a whole node."""
    largest = max((kind.resources.get("CPU", 0.0) for kind in cluster_kinds()), default=1.0)
    cpus = min(largest, float(os.cpu_count() or 1))
    return changed(config, {"pretrain": {"resources": {"cpu": cpus}}})


@dataclass
class Journal:
    """`demo.json`: which demo this folder holds, and how long its finished steps took."""

    path: Path
    world: DemoConfig
    seconds: dict[str, float]
    display: Display

    @staticmethod
    def open(out: Path, world: DemoConfig, display: Display) -> "Journal":
        """The journal of `out`, new or from an earlier try.

        Raises:
            UserError: The folder holds something else.
        """
        path = out / "demo.json"
        if path.is_file():
            remedy = "; use another --out"
            stored, seed, seconds = read_json(
                path, lambda it: (it["world"], it["world"]["seed"], it["seconds"]), remedy
            )
            if stored != world.model_dump(mode="json"):
                raise UserError(f"{out} holds the demo of seed {seed} with its own settings; use another --out")
            return Journal(path, world, seconds, display)
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out} is not empty and holds no demo; use another --out")
        journal = Journal(path, world, {}, display)
        journal._write()
        return journal

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        """Announces a step and remembers its seconds, over all tries."""
        self.display.say(title)
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 1)
            self._write()

    def _write(self) -> None:
        write_json(self.path, {"world": self.world.model_dump(mode="json"), "seconds": self.seconds})
