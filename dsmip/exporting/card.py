"""The model card of a bundle: what the model is, how good it is, what it was made of, and what it is for."""

from typing import Any

from dsmip.calibration.calibration import Calibration
from dsmip.evaluation.index_builder import OpenedModel, plan_index
from dsmip.evaluation.metrics import shown_metrics
from dsmip.evaluation.stored.layout import evaluation_name
from dsmip.exporting.agreement import MENTIONS, TOP, Agreement
from dsmip.exporting.candidate_vectors import ChosenVectors
from dsmip.separate_towers import SeparateTowers
from dsmip.storage.parsing import read_json

_PROTOCOL = (
    "Every mention of the test split is ranked against all entities of the knowledge base; ties count half. "
    "Intervals are 95 % bootstrap intervals over mentions."
)
_OF_WHOLE_INDEX = (
    "These figures, and the calibration, are of the index in single precision; this bundle stores it smaller, and the "
    "first table below says what that finds of it."
)


def model_card(
    opened: OpenedModel,
    agreement: Agreement | None,
    vectors: ChosenVectors,
    *,
    with_backbone: bool,
    index: str,
    calibration: Calibration | None = None,
    of_hub: str | None = None,
) -> str:
    """The text of README.md.

    Args:
        opened: The model.
        agreement: Of an index that is stored in less than single precision; None: it is not, or nothing is measured.
        vectors: What candidates are found by.
        with_backbone: The bundle has the backbone's tensors; else its tag brings them.
        index: In what the index is stored, and how large it is.
        calibration: Of the model, if it goes into the bundle.
        of_hub: A model of the hub that is asked for when the bundle is opened, weights aside.
    """
    run, model = opened.run, opened.model
    manifest, backbone = run.dataset.manifest, model.config.backbone
    own = "the towers' own" if SeparateTowers.parsed(backbone.architecture) else "random"
    weights = "in this bundle" if with_backbone else f"{backbone.pretrained or own}, not in this bundle"
    lines = [
        "---",
        "library_name: dsmip",
        "tags: [entity-linking, multimodal]",
        "---",
        "",
        f"# {model.name} on {_plain(manifest.name)}",
        "",
        f"Links a mention (a word, its sentence, a picture) to one of {run.dataset.num_entities} entities.",
        "",
        "    import dsmip",
        '    linker = dsmip.load("FOLDER")',
        '    print(linker.link("WORD", sentence="SENTENCE", image="photo.jpg").best)',
        "",
        "| | |",
        "|---|---|",
        f"| system | {run.system.name} ({run.system.paper}) |",
        f"| backbone | {_plain(backbone.architecture)}; weights: {_plain(weights)} |",
        *([] if of_hub is None else [f"| asked of the hub | {_plain(of_hub)}, when this bundle is opened |"]),
        f"| index | {index} |",
        f"| calibrated | {_calibrated(calibration)} |",
        f"| data set | {_plain(manifest.name)}, manifest {run.dataset.manifest_hash} |",
        f"| licence of the data | {_plain(manifest.licence)} |",
        f"| training mentions | {run.dataset.num_mentions('train')} |",
        f"| seed | {run.config.seed} |",
        "",
        "## How good it is",
        "",
        *_figures(opened),
        *_smaller_index(agreement),
        *_candidates(vectors),
        "",
        "## What it is for",
        "",
        "Linking mentions of the kind and language that it was trained on, to entities of this knowledge base. Where",
        "nothing is calibrated, it always finds some entity: it cannot say that the right one is not there. Its links",
        "are guesses: do not let them decide about people without somebody who looks at them.",
    ]
    return "\n".join(lines) + "\n"


def _calibrated(calibration: Calibration | None) -> str:
    if calibration is None:
        return "no: links have no confidences, and no mention is said to be of something unknown"
    threshold = f"{calibration.min_known:.3g}"
    return f"yes; a mention whose probability of being known is below {threshold} counts as one of something unknown"


def _figures(opened: OpenedModel) -> list[str]:
    run, name = opened.run, opened.model.name
    path, index = run.folder / evaluation_name("test", name) / "metrics.json", plan_index(opened).name
    run.storage.pull(f"{evaluation_name('test', name)}/metrics.json")
    if not path.is_file():
        return ["It was not evaluated on the test split before it was exported."]
    metrics: dict[str, Any] = read_json(path, dict, "; evaluate again")
    if metrics.get("index", index) != index:
        return ["It was trained or tuned anew since it was evaluated on the test split: those figures are of another."]
    rows = [f"{_PROTOCOL} {metrics['mentions']} mentions.", "", "| metric | | 95 % interval |", "|---|---|---|"]
    for metric in shown_metrics():
        low, high = metrics["confidence"].get(metric, (None, None))
        interval = "" if low is None else f"{low:.3f} to {high:.3f}"
        rows.append(f"| {metric} | {metrics['overall'][metric]:.3f} | {interval} |")
    return rows


def _smaller_index(agreement: Agreement | None) -> list[str]:
    if agreement is None:
        return []
    return [
        "",
        _OF_WHOLE_INDEX,
        "",
        f"Of at most {MENTIONS} validation mentions, beside a search of all entities in single precision:",
        "",
        f"| search | same best entity | of the best {TOP} |",
        "|---|---|---|",
        f"| {agreement.search} | {agreement.same_best:.1%} | {agreement.recall:.1%} |",
    ]


def _candidates(vectors: ChosenVectors) -> list[str]:
    rows = [
        f"| {each.k} | {kind} | {each.best:.1%} | {each.gold:.1%} |"
        for kind, recalls in vectors.recalls.items()
        for each in recalls
    ]
    if not rows:
        return []
    used = "global" if vectors.distilled is None else "distilled"
    return [
        "",
        f"What k candidates (`link(..., candidates=k)`) hold, of at most {MENTIONS} validation mentions: the best of",
        "all entities, and the right one, with an index of float32.",
        f"This bundle finds candidates by its {used} vectors.",
        "",
        "| k | vectors | the best | the right one |",
        "|---|---|---|---|",
        *rows,
    ]


def _plain(text: str) -> str:
    """A text as a cell of a table: on one line, with nothing that Markdown or HTML would act on."""
    return "".join(f"\\{each}" if each in "\\`*_[]<>|#" else each for each in " ".join(text.split()))
