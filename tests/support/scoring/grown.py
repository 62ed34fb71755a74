"""A small knowledge base whose entities are changed, in a bundle, and one that is built anew of the same entities."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import dsmip
from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.jsonl import JsonlRelease
from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.exporting.export import ExportOptions, export_run
from dsmip.runs.load_config import parse_config
from dsmip.runs.run import Run
from tests.support.scoring.linked_runs import finished_run
from tests.support.small_release import image_bytes

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "grey", "pink", "brown", "cyan", "white", "black")
MENTIONS: list[dict[str, Any]] = [
    {"word": "red", "sentence": "a red thing", "image": image_bytes((20, 16), "red")},
    {"word": "blue", "sentence": "a blue thing"},
    {"word": "grey", "sentence": "grey and pink", "image": image_bytes((20, 16), "pink")},
]
Record = dict[str, Any]


def record(number: int, version: int = 0) -> Record:
    """An entity, one of three of them without a picture; another `version` has other texts, and perhaps a picture."""
    colour = COLOURS[(number + version) % len(COLOURS)]
    images = [f"{colour}.jpg"] if (number + version) % 3 else []
    attributes = {"number": number, "version": version}
    return {"entity_id": f"Q{number}", "name": colour, "attributes": attributes, "images": images}


def two_experts(backbone: Path) -> ExperimentConfig:
    """DSMIP of a text and a visual expert."""
    gate = {"picture": "clip", "width": 8}
    system = {"experts": {"text": {}, "visual": {}}, "use": ["text", "visual"], "width": 8, "gate": gate}
    return parse_config({"model": "dsmip", "backbone": {"architecture": str(backbone)}, "system": system})


def colour_files(folder: Path) -> Path:
    """A folder with the pictures that records name."""
    folder.mkdir(parents=True, exist_ok=True)
    for colour in COLOURS:
        (folder / f"{colour}.jpg").write_bytes(image_bytes((16, 16), colour))
    return folder


def run_of(folder: Path, config: ExperimentConfig, records: Sequence[Record]) -> Run:
    """A run of the same weights for the same configuration, on a data set of these entities."""
    release = colour_files(folder / "release")
    gold = records[0]["entity_id"]
    mentions = [
        {"mention_id": split, "word": "red", "sentence": "a thing", "entity_id": gold, "split": split}
        for split in ("train", "validation", "test")
    ]
    for name, lines in (("entities", records), ("mentions", mentions)):
        (release / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    prepare(JsonlRelease(release), folder / "data", DatasetOptions(name="colours"))
    run = finished_run(folder / "run", config, Dataset.open(folder / "data"))
    if config.model == "dsmip":  # what fusions are scaled by
        run.save_part("dsmip", run.load_whole(), {"fusion": {"scale": dict.fromkeys(run.part_names, 0.5)}})
    return run


def exported(folder: Path, config: ExperimentConfig, records: Sequence[Record], **options: Any) -> Path:
    """A bundle of these entities."""
    run = run_of(folder, config, records)
    export_run(run.folder, folder / "bundle", torch.device("cpu"), ExportOptions(**options))
    return folder / "bundle"


def links_of(linker: dsmip.Linker, **options: Any) -> list[list[tuple[Any, ...]]]:
    """Rows, ids, texts, scores and experts of all links."""
    return [
        [(link.entity_row, link.entity_id, link.name, link.attributes, link.expert, link.score) for link in links]
        for links in linker.link_many(MENTIONS, top=len(linker), **options)
    ]


def assert_same(found: dsmip.Linker, expected: dsmip.Linker, tolerance: float = 1e-5, **options: Any) -> None:
    """Both have the same entities and links; scores that differ by less than the tolerance may be in any order."""
    assert len(found) == len(expected)
    everything = range(len(expected))
    assert found.knowledge_base.texts(everything) == expected.knowledge_base.texts(everything)
    for one, other in zip(links_of(found, **options), links_of(expected, **options), strict=True):
        assert [each[-1] for each in one] == pytest.approx([each[-1] for each in other], rel=tolerance, abs=tolerance)
        assert _by_row(one, tolerance) == _by_row(other, tolerance)
        for (*a, _), (*b, score) in zip(one, other, strict=True):
            assert a == b or _ties(score, other, tolerance)


def _by_row(links: Iterable[tuple[Any, ...]], tolerance: float) -> Mapping[int, Any]:
    return {row: (more, pytest.approx(score, rel=tolerance, abs=tolerance)) for row, *more, score in links}


def _ties(score: float, links: Iterable[tuple[Any, ...]], tolerance: float) -> bool:
    return sum(abs(score - each[-1]) <= 2 * tolerance for each in links) > 1
