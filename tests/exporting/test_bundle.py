"""Bundles: they stand alone and link as their run does, and what is damaged is one line."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import dsmip
from dsmip.data.dataset import Dataset
from dsmip.encoders.clip import Backbone
from dsmip.exporting.export import ExportOptions, export_run
from dsmip.linking.bundle import BUNDLE, CALIBRATION, CARD, ENTITIES, IndexDtype
from dsmip.linking.found_bundles import HUB
from dsmip.runs.load_config import changed
from dsmip.runs.run import Run
from dsmip.storage.atomic import sha256_file
from dsmip.storage.object_store import ObjectStore as StoreOfUris
from ray_jobs.cli import app
from tests.support.object_store import ObjectStore
from tests.support.scoring.linked_runs import finished_run, small_system

CPU = torch.device("cpu")
MENTIONS: list[dict[str, Any]] = [{"word": "red", "sentence": "a red thing"}, {"word": "blue", "sentence": "blue"}]


def scores(linker: dsmip.Linker, mentions: Any) -> list[list[tuple[str, str, str, float, str | None]]]:
    return [
        [(link.entity_id, link.name, link.attributes, link.score, link.expert) for link in links]
        for links in linker.link_many(mentions, top=20)
    ]


@pytest.fixture
def files_of_a_backbone(tmp_path: Path, narrow_backbone: Path) -> Path:
    """An architecture and weights in files of their own."""
    folder = tmp_path / "backbone"
    folder.mkdir()
    shutil.copy(narrow_backbone, folder / "own.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        backbone = Backbone.build(str(folder / "own.json"), None)
        for parameter in backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    backbone.save_weights(folder / "own.safetensors")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "dsmip",
        pytest.param("blink", marks=pytest.mark.slow),
        *(pytest.param(each, marks=pytest.mark.soak) for each in ("mimic", "albef")),
    ],
)
def test_a_bundle_links_without_its_run_data_and_files(
    name: str, small_data: Dataset, files_of_a_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_system(name, files_of_a_backbone / "own.json")
    config = changed(config, {"backbone": {"pretrained": str(files_of_a_backbone / "own.safetensors")}})
    data = tmp_path / "data"
    shutil.copytree(small_data.folder, data)
    run = finished_run(tmp_path / "run", config, Dataset.open(data))
    mentions = list(small_data.mentions("test"))
    expected = scores(dsmip.load(run.folder), mentions)
    export_run(run.folder, tmp_path / "made", CPU)
    for gone in (data, run.folder, files_of_a_backbone):
        shutil.rmtree(gone)
    (tmp_path / "made").rename(tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    linker = dsmip.load("../bundle")
    assert scores(linker, mentions) == expected
    entity = linker.knowledge_base.entity(0)
    assert (entity.entity_id, len(entity.images)) == ("Q0", len(small_data.entity_images(0)))
    assert linker.knowledge_base.row_of("Q3") == 3


@pytest.fixture(scope="module")
def bundle(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dsmip.evaluate(run.folder, "test")
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    done = CliRunner().invoke(app, ["export", str(run.folder), str(out), "--with-backbone"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "11 entities" in done.output
    assert f"dsmip link {out} --word W --sentence S" in done.output.replace("\n", "")
    return out


def test_the_card_says_what_it_is(bundle: Path, run: Run) -> None:
    card = (bundle / CARD).read_text()
    metrics = json.loads((run.folder / "evaluate" / "test" / "dsmip" / "metrics.json").read_text())
    low, high = metrics["confidence"]["mrr"]
    assert f"| mrr | {metrics['overall']['mrr']:.3f} | {low:.3f} to {high:.3f} |" in card
    for said in (
        run.dataset.manifest_hash,
        "Ma et al.",
        "ranked against all entities",
        "| index | float32, ",
        "| calibrated | no: ",
        "| unknown |",
        "in this bundle",
    ):
        assert said in card
    assert list(bundle.glob("files/backbone.safetensors"))


def test_figures_of_earlier_weights_are_in_no_card(run: Run, tmp_path: Path) -> None:
    path = dsmip.evaluate(run.folder, "test", "visual").folder / "metrics.json"
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps(metrics | {"index": "index/visual-of-before"}))
    export_run(run.folder, tmp_path / "visual", CPU, ExportOptions(model="visual", index_dtype="float16"))
    card = (tmp_path / "visual" / CARD).read_text()
    assert "It was trained or tuned anew since it was evaluated" in card
    assert "| mrr |" not in card
    assert "| index | float16, " in card
    assert " (float32: " in card


@pytest.mark.slow
def test_a_part_alone_and_a_folder_that_is_taken(run: Run, bundle: Path, tmp_path: Path) -> None:
    export_run(run.folder, tmp_path / "text", CPU, ExportOptions(model="text"))
    linker = dsmip.load(tmp_path / "text")
    assert scores(linker, MENTIONS) == scores(dsmip.load(run.folder, model="text"), MENTIONS)
    with pytest.raises(dsmip.UserError, match="is a bundle of text, not of dsmip"):
        dsmip.load(tmp_path / "text", model="dsmip")
    with pytest.raises(dsmip.UserError, match="is a bundle, which has its entities in it"):
        dsmip.load(tmp_path / "text", data=run.dataset.folder)
    with pytest.raises(dsmip.UserError, match="is there already; give a new folder"):
        export_run(run.folder, bundle, CPU)


@pytest.mark.parametrize(
    "dtype",
    [pytest.param("float16", marks=pytest.mark.soak), pytest.param("int8", marks=pytest.mark.slow)],
)
def test_an_index_that_is_stored_smaller(
    run: Run,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dtype: IndexDtype,
) -> None:
    export_run(run.folder, tmp_path / "small", CPU, ExportOptions(index_dtype=dtype))
    whole, small = (next((each / "index").glob("slice-*")).stat().st_size for each in (bundle, tmp_path / "small"))
    assert small < 0.9 * whole  # rows are narrow here, and some columns are whole numbers
    for links, expected in zip(
        scores(dsmip.load(tmp_path / "small"), MENTIONS), scores(dsmip.load(bundle), MENTIONS), strict=True
    ):
        found = {entity_id: score for entity_id, _, _, score, _ in links}
        assert found == pytest.approx({entity_id: score for entity_id, _, _, score, _ in expected}, rel=0.02, abs=0.05)
    stored = sum(path.stat().st_size for path in (tmp_path / "small" / "index").iterdir())
    assert dsmip.load(tmp_path / "small").search.index.num_bytes < stored  # in memory as on disk
    for free, fits in ((stored, True), (stored - 1, False)):
        monkeypatch.setattr("dsmip.linking.opened_bundle.free_memory", lambda free=free: free)
        caplog.clear()
        dsmip.load(tmp_path / "small")
        assert [" GiB of memory are free" in line for line in caplog.messages] == ([] if fits else [True])
    row = next(line for line in (tmp_path / "small" / CARD).read_text().splitlines() if "the index as stored" in line)
    assert all(float(cell.strip(" %")) > 80 for cell in row.split("|")[2:4])
    assert "the index as stored" not in (bundle / CARD).read_text()


def damaged(bundle: Path, folder: Path) -> Path:
    shutil.copytree(bundle, folder)
    return folder


def rewritten(folder: Path, **changes: Any) -> Path:
    path = folder / BUNDLE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_what_is_damaged_is_one_line(bundle: Path, tmp_path: Path) -> None:
    missing = damaged(bundle, tmp_path / "missing")
    (missing / ENTITIES).unlink()
    with pytest.raises(dsmip.UserError, match=r"entities\.parquet is missing"):
        dsmip.load(missing)
    changed_file = damaged(bundle, tmp_path / "changed")
    weights = next(changed_file.glob("text/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(dsmip.UserError, match=r"text/weights\.safetensors is not the file"):
        dsmip.load(changed_file)
    cut = damaged(bundle, tmp_path / "cut")
    (cut / BUNDLE).write_text("{")
    with pytest.raises(dsmip.UserError, match=r"bundle\.json"):
        dsmip.load(cut)
    with pytest.raises(dsmip.UserError, match="bundle format 9, this version reads 1"):
        dsmip.load(rewritten(damaged(bundle, tmp_path / "other"), format=9))
    with pytest.raises(dsmip.UserError, match=r"format 2 does not go with the files: candidates\.safetensors"):
        dsmip.load(rewritten(damaged(bundle, tmp_path / "vectors"), format=2))
    with pytest.raises(dsmip.UserError, match="further"):
        dsmip.load(rewritten(damaged(bundle, tmp_path / "further"), further=1))
    outside = {"../secret": {"bytes": 1, "sha256": "0" * 64}}
    with pytest.raises(dsmip.UserError, match="is no name of a bundle's file"):
        dsmip.load(rewritten(damaged(bundle, tmp_path / "outside"), files=outside))
    listed = json.loads((bundle / BUNDLE).read_text())["files"]
    no_mapping = damaged(bundle, tmp_path / "no-mapping")
    (no_mapping / "config.yaml").write_text("- dsmip\n")
    written = {"bytes": 8, "sha256": sha256_file(no_mapping / "config.yaml")}
    rewritten(no_mapping, files=listed | {"config.yaml": written})
    with pytest.raises(dsmip.UserError, match=r"config\.yaml: must be a mapping of keys, not list"):
        dsmip.load(no_mapping)
    (missing / BUNDLE).unlink()
    with pytest.raises(dsmip.UserError, match="neither a run nor a bundle"):
        dsmip.load(missing)


def test_optional_files_that_it_does_not_list_are_not_read(bundle: Path, tmp_path: Path) -> None:
    """Reading either of them would end in an error."""
    more = damaged(bundle, tmp_path / "more")
    for name in (CALIBRATION, "dsmip/config.yaml"):
        assert not (more / name).exists()
        (more / name).write_text("neither of the two")
    linker = dsmip.load(more)
    assert linker.calibration is None
    assert scores(linker, MENTIONS) == scores(dsmip.load(bundle), MENTIONS)


def test_files_that_a_library_might_find_beside_listed_ones_are_refused(bundle: Path, tmp_path: Path) -> None:
    more = damaged(bundle, tmp_path / "more")
    (more / "files/text-0").mkdir()
    (more / "files/.DS_Store").write_text("as a file manager leaves it")
    dsmip.load(more)
    (more / "files/text-0/added_tokens.json").write_text('{"red": 4}')
    with pytest.raises(dsmip.UserError, match=r"files/text-0/added_tokens\.json is not of the bundle .*; remove it"):
        dsmip.load(more)


def test_an_export_that_fails_leaves_nothing(
    small_data: Dataset, narrow_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path / "run", small_system("clip", narrow_backbone), small_data)

    def fail(self: Dataset, rows: range | None = None) -> None:
        raise OSError("no more")

    dsmip.load(run.folder)
    monkeypatch.setattr(Dataset, "entities", fail)
    with pytest.raises(OSError, match="no more"):
        export_run(run.folder, tmp_path / "out", CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_bundle_of_the_hubs_cache(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's client lays out what it has fetched: links to files by hash."""
    cached = tmp_path / "hub" / "models--somebody--linker"
    snapshot, commit = cached / "snapshots" / ("a" * 40), "a" * 40
    for path in bundle.rglob("*"):
        if path.is_file():
            blob = cached / "blobs" / path.relative_to(bundle).as_posix().replace("/", "-")
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blob)
            target = snapshot / path.relative_to(bundle)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(blob, target)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert scores(dsmip.load(f"{HUB}somebody/linker"), MENTIONS) == scores(dsmip.load(bundle), MENTIONS)
    (snapshot / BUNDLE).unlink()
    with pytest.raises(dsmip.UserError, match="is no bundle"):
        dsmip.load(f"{HUB}somebody/linker")
    with pytest.raises(dsmip.UserError, match="hf-hub:nobody/nothing cannot be had"):
        dsmip.load(f"{HUB}nobody/nothing")


@pytest.mark.slow
def test_a_bundle_in_an_object_store(bundle: Path, bucket: str, object_store: ObjectStore) -> None:
    store = StoreOfUris(bucket)
    for path in (path for path in bundle.rglob("*") if path.is_file()):
        store.put(path, path.relative_to(bundle).as_posix())
    linker = dsmip.load(bucket)
    assert scores(linker, MENTIONS) == scores(dsmip.load(bundle), MENTIONS)
    weights = f"{bucket}/text/weights.safetensors"
    reads = object_store.num_reads()[weights]
    assert reads > 0
    dsmip.load(f"{bucket}/")  # what is here already is not fetched again
    assert object_store.num_reads()[weights] == reads
    with pytest.raises(dsmip.UserError, match="is in a store: copy the bundle into a folder of your own"):
        linker.entities.remove(["Q1"])
    changed = json.loads((bundle / BUNDLE).read_text())
    changed["files"]["lost.txt"] = {"bytes": 1, "sha256": "0" * 64}
    store.write(BUNDLE, json.dumps(changed).encode())
    with pytest.raises(dsmip.UserError, match=r"lost\.txt is missing: the bundle is damaged"):
        dsmip.load(bucket)
    changed["files"] = {"../outside": changed["files"]["lost.txt"]}
    store.write(BUNDLE, json.dumps(changed).encode())
    with pytest.raises(dsmip.UserError, match=f"{bucket}/{BUNDLE}: .* is no name of a bundle's file"):
        dsmip.load(bucket)
    for damaged in (b"\xff", b'{"format": 2}', b'{"format": 1}'):
        store.write(BUNDLE, damaged)
        with pytest.raises(dsmip.UserError, match=f"^{bucket}/{BUNDLE}"):  # not the copy on this node
            dsmip.load(bucket)
