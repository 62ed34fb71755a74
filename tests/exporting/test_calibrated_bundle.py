"""A calibrated run as a bundle: as sure as the run is, by the same threshold, also when its entities change."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
from typer.testing import CliRunner

import dsmip
from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip.calibration.calibration import Calibration
from dsmip.data.dataset import Dataset
from dsmip.evaluation.stored.calibration import stored_calibration
from dsmip.evaluation.stored.layout import CALIBRATED_ON, evaluation_name
from dsmip.linking.bundle import CALIBRATION, CARD, read_manifest
from dsmip.runs.run import Run
from ray_jobs.cli import app
from tests.support.scoring.grown import two_experts
from tests.support.scoring.linked_runs import finished_run
from tests.support.small_release import write_colours

ANSWERS = tuple(f"Q{number % 6}" for number in range(24))
UNCALIBRATED = "no confidences: run 'dsmip calibrate --run {} --model text' and export again"


@dataclass(frozen=True)
class Made:
    """A run, its calibration and its bundle."""

    run: Run
    calibration: Calibration
    bundle: Path

    @property
    def mentions(self) -> list[dsmip.Mention]:
        return list(self.run.dataset.mentions("test"))


def said(*arguments: str) -> str:
    """What a command prints, as one line."""
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


@pytest.fixture(scope="module")
def made(narrow_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Its threshold is another one than that of a fit: about half of the mentions mean something unknown by it."""
    folder = tmp_path_factory.mktemp("calibrated")
    release = MimicRelease(write_colours(folder / "release", ANSWERS))
    prepare(release, folder / "data", DatasetOptions(name="small"))
    run = finished_run(folder / "run", two_experts(narrow_backbone), Dataset.open(folder / "data"))
    run.save_part("dsmip", run.load_whole(), {"fusion": {"scale": dict.fromkeys(run.part_names, 0.5)}})
    dsmip.evaluate(run.folder, CALIBRATED_ON)
    fitted = stored_calibration(run, "dsmip")
    assert fitted is not None
    known = [links.known for links in dsmip.load(run.folder).link_many(list(run.dataset.mentions("test")))]
    calibration = fitted.model_copy(update={"min_known": median(each for each in known if each is not None)})
    name = f"{evaluation_name(CALIBRATED_ON, 'dsmip')}/{CALIBRATION}"
    run.storage.write_json(name, calibration.model_dump(mode="json"))
    assert "no confidences" not in said("export", str(run.folder), str(folder / "bundle"))
    return Made(run, calibration, folder / "bundle")


def sureness(linker: dsmip.Linker, mentions: list[dsmip.Mention]) -> list[tuple[float | None, float | None, bool]]:
    """Confidence of the best link, probability of being known, and whether that is too little, of each mention."""
    return [(links[0].confidence, links.known, links.is_nil) for links in linker.link_many(mentions)]


def test_it_is_as_sure_as_its_run(made: Made) -> None:
    linker = dsmip.load(made.bundle)
    assert linker.calibration == made.calibration
    found = sureness(linker, made.mentions)
    assert found == sureness(dsmip.load(made.run.folder), made.mentions)
    assert all(confidence is not None for confidence, _, _ in found)


def test_its_threshold_is_the_calibrations(made: Made) -> None:
    found = sureness(dsmip.load(made.bundle), made.mentions)
    for _, known, is_nil in found:
        assert known is not None
        assert is_nil == (known < made.calibration.min_known)
    assert {is_nil for _, _, is_nil in found} == {True, False}
    threshold = f"{made.calibration.min_known:.3g}"
    card = (made.bundle / CARD).read_text()
    assert f"| calibrated | yes; a mention whose probability of being known is below {threshold} counts" in card


def test_the_calibration_stays_when_entities_are_added(made: Made, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(made.bundle, bundle)
    (tmp_path / "new.jsonl").write_text(json.dumps({"entity_id": "Q7", "name": "black", "attributes": "colour 7"}))
    said("entities", "add", str(bundle), str(tmp_path / "new.jsonl"))
    linker = dsmip.load(bundle)
    assert (len(linker), linker.calibration) == (7, made.calibration)
    assert CALIBRATION in read_manifest(bundle)[0].files
    links = linker.link("black", sentence="a black thing")
    assert links.known is not None
    assert links.is_nil == (links.known < made.calibration.min_known)


def test_what_is_not_calibrated_says_so(made: Made, tmp_path: Path) -> None:
    run = str(made.run.folder)
    output = said("export", run, str(tmp_path / "text"), "--model", "text")
    assert UNCALIBRATED.format(run) in output
    assert "| calibrated | no: " in (tmp_path / "text" / CARD).read_text()
    assert dsmip.load(tmp_path / "text").calibration is None
