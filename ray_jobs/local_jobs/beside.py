"""The figures that a gated system is judged by: its best expert, fusions without a gate, the oracle."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dsmip.evaluation.experts.oracle import oracle
from dsmip.evaluation.metrics import shown_metrics
from dsmip.evaluation.stored.layout import METRICS_FILE, RANKS, evaluation_name
from dsmip.runs.run import Run
from dsmip.storage.parsing import read_json
from ray_jobs.terminal.lines import say


def show_beside(run: Run, split: str, experts: Sequence[str]) -> None:
    """Prints the figures of what has been evaluated on the split, and names what has not."""
    folders = {name: run.folder / evaluation_name(split, name, run.below) for name in (*experts, *run.system.fusions)}
    missing = [name for name, folder in folders.items() if not (folder / RANKS).is_file()]
    for title, figures in beside({n: folder for n, folder in folders.items() if n not in missing}, experts):
        say(f"  {title}: " + "  ".join(f"{name} {figures[name]:.3f}" for name in shown_metrics()))
    if missing:
        say(f"  shown beside it once they are evaluated too: --model {', '.join(missing)}")


def beside(folders: Mapping[str, Path], experts: Sequence[str]) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Titles and metrics of the best expert (by hits@1), of the fusions, and of the oracle over the experts.

    Args:
        folders: Evaluation folders, of one split; experts are compared only where all of them are there.
    """
    metrics = {name: read_json(folder / METRICS_FILE, lambda it: it["overall"]) for name, folder in folders.items()}
    if set(experts) <= metrics.keys():
        best = max(experts, key=lambda name: metrics[name]["hits@1"])
        yield f"best expert, {best}", metrics[best]
    yield from ((f"{name} of the experts, without a gate", metrics[name]) for name in metrics if name not in experts)
    if set(experts) <= metrics.keys():
        found = oracle({name: folders[name] for name in experts})
        yield "oracle, each mention by the expert that ranks its gold best", found["overall"]
