"""A run's model on other data: figures, features and an index of their own, and nothing of the run's is touched."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import dsmip
from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip.calibration import calibration
from dsmip.data.dataset import Dataset
from dsmip.evaluation.stored import calibration as stored
from dsmip.evaluation.stored.comparison import read_evaluation
from dsmip.evaluation.stored.layout import CALIBRATION, RANKS
from dsmip.runs.run import Run


@pytest.fixture(scope="module")
def grown(small_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same release with three entities more, before all others, so that every row is another one."""
    folder = tmp_path_factory.mktemp("grown")
    shutil.copytree(small_data.folder.parent / "release", folder / "release")
    path = folder / "release" / "kb_entity.json"
    more = [{"qid": f"N{row}", "entity_name": f"new {row}", "attr": "", "image_list": []} for row in range(3)]
    path.write_text(json.dumps([*more, *json.loads(path.read_text())]))
    prepare(MimicRelease(folder / "release"), folder / "data", DatasetOptions(name="grown"))
    return Dataset.open(folder / "data")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_data_has_a_place_of_its_own(run: Run, grown: Dataset) -> None:
    own = dsmip.evaluate(run.folder, "test", "multimodal")
    dsmip.evaluate(run.folder, "validation", "multimodal")
    before = {name: each for name, each in contents(run.folder).items() if not name.startswith("records/")}
    found = dsmip.evaluate(run.folder, "test", "multimodal", data=grown.folder)
    assert found.folder == run.folder / f"other_data/{grown.manifest_hash[:16]}/evaluate/test/multimodal"
    assert found.metrics["data"] == {"name": "grown", "sha256": grown.manifest_hash}
    assert (found.metrics["entities"], own.metrics["entities"]) == (14, 11)
    assert "data" not in own.metrics
    after = contents(run.folder)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"other_data", "records"}
    ranks, of_own = (pq.read_table(each.folder / RANKS).to_pylist() for each in (found, own))
    for row, own_row in zip(ranks, of_own, strict=True):
        scores, own_scores = (dict(zip(each["top"], each["top_scores"], strict=True)) for each in (row, own_row))
        assert {name: scores[name] for name in own_scores} == pytest.approx(own_scores, rel=1e-5, abs=1e-5)
        assert row["gold_seen"] == own_row["gold_seen"]
        assert row["better"] >= own_row["better"]
    assert read_evaluation(run.folder, "test", "multimodal").kb_hash == read_kb_hash(own.folder)


def read_kb_hash(folder: Path) -> bytes:
    metadata: dict[bytes, bytes] = pq.read_schema(folder / RANKS).metadata
    return metadata[b"kb_sha256"]


def test_its_calibration_is_its_own(run: Run, grown: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (stored, calibration):
        monkeypatch.setattr(module, "MIN_MENTIONS", 5)
    found = dsmip.evaluate(run.folder, "validation", "text", data=grown.folder)
    assert json.loads((found.folder / CALIBRATION).read_text())["index"].startswith("other_data/")
    assert stored.stored_calibration(run, "text") is None
    assert dsmip.load(run.folder, model="text").calibration is None
    assert "calibration" not in dsmip.evaluate(run.folder, "test", "text").metrics
    assert "calibration" in dsmip.evaluate(run.folder, "test", "text", data=grown.folder).metrics


def test_the_run_s_own_data_elsewhere_gives_its_own_figures(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.dataset.folder, tmp_path / "moved")
    found = dsmip.evaluate(run.folder, "test", "text", data=tmp_path / "moved")
    assert found.folder == run.folder / "evaluate/test/text"
    assert "data" not in found.metrics


def test_seen_golds_are_not_told_where_the_run_s_data_is_gone(
    small_data: Dataset, grown: Dataset, run: Run, tmp_path: Path
) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    stamp = json.loads((tmp_path / "run/run.json").read_text())
    stamp["data"]["folder"] = str(tmp_path / "nowhere")
    (tmp_path / "run/run.json").write_text(json.dumps(stamp))
    found = dsmip.evaluate(tmp_path / "run", "test", "text", data=grown.folder)
    assert "gold_seen" not in found.metrics["groups"]
    assert set(pq.read_table(found.folder / RANKS).column("gold_seen").to_pylist()) == {None}
    with pytest.raises(dsmip.UserError, match="manifest"):
        dsmip.load(tmp_path / "run", data=grown.folder)
