"""A bundle onto the hub and back, against a stand-in of its HTTP interface; a hub that refuses, or is away."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dsmip
from dsmip.errors import UserError
from dsmip.evaluation.stored.layout import CALIBRATION
from dsmip.exporting.export import ExportOptions, export_run
from dsmip.linking.bundle import BUNDLE, stated_files
from dsmip.linking.found_bundles import HUB, push_bundle
from dsmip.runs.run import Run
from ray_jobs.cli import app
from tests.support.servers.hub import ATTRIBUTES, TOKEN, Hub, running_hub

ME = "somebody/linker"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The client reads HF_ENDPOINT and HF_HUB_CACHE when it is imported: what it has made of them is changed."""
    with running_hub() as hub:
        use(hub.endpoint, monkeypatch)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # as other tests have it
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def use(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def some_bundle(tmp_path: Path) -> Path:
    """Files as they are pushed; what is in them is of no account."""
    folder = tmp_path / "bundle"
    (folder / "text").mkdir(parents=True)
    (folder / "bundle.json").write_text("{}")
    (folder / "text/weights.safetensors").write_bytes(bytes(range(256)))
    return folder


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert TOKEN not in text
    return text


def test_an_exported_bundle_is_pushed_and_loaded(hub: Hub, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", str(run.folder), str(out), "--push", ME, "--with-backbone"])
    assert done.exit_code == 0, done.output
    assert f"on the hub: dsmip.load('{HUB}{ME}')" in done.output
    assert hub.private == {ME}
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert hub.models[ME] == {ATTRIBUTES: b"", **files}
    here = dsmip.load(out).link("red", sentence="a red thing")
    shutil.rmtree(out)
    there = dsmip.load(f"{HUB}{ME}")
    links = there.link("red", sentence="a red thing")
    assert [(link.entity_id, link.score) for link in links] == [(link.entity_id, link.score) for link in here]
    with pytest.raises(UserError, match=f"{HUB}{ME} is the hub's: copy the bundle"):
        there.entities.remove(["Q1"])


def test_a_second_push_replaces_the_files(hub: Hub, some_bundle: Path) -> None:
    push_bundle(some_bundle, ME)
    (some_bundle / "bundle.json").write_text('{"new": 1}')
    assert push_bundle(some_bundle, ME) == f"{HUB}{ME}"
    assert hub.models[ME]["bundle.json"] == b'{"new": 1}'


def test_a_second_push_removes_what_the_first_one_had_more_and_nothing_else(hub: Hub, run: Run, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    export_run(run.folder, second, torch.device("cpu"), ExportOptions())
    shutil.copytree(second, first)
    (first / CALIBRATION).write_text("{}")
    (first / BUNDLE).unlink()
    manifest = json.loads((second / BUNDLE).read_text())
    files = {name: file.model_dump() for name, file in stated_files(first).items()}
    (first / BUNDLE).write_text(json.dumps(manifest | {"files": files}))
    push_bundle(first, ME)
    assert CALIBRATION in hub.models[ME]
    hub.models[ME]["notes[1].md"] = b"the owner's own"
    push_bundle(second, ME)
    assert CALIBRATION not in hub.models[ME]
    pushed = {path.relative_to(second).as_posix() for path in second.rglob("*") if path.is_file()}
    assert hub.models[ME].keys() == {ATTRIBUTES, "notes[1].md", *pushed}
    assert hub.commits[ME] == 2  # who loads it meanwhile finds one bundle or the other
    assert dsmip.load(f"{HUB}{ME}").calibration is None


def test_a_token_that_is_refused(hub: Hub, some_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(UserError) as pushed:
        push_bundle(some_bundle, ME)
    said = one_line(pushed)
    assert said.startswith(f"--push {ME}: the hub does not take it (")
    assert "401 Unauthorized" in said
    assert said.endswith(f"the bundle is at {some_bundle}; then: hf upload {ME} {some_bundle}")
    assert not hub.models
    with pytest.raises(UserError) as loaded:
        dsmip.load(f"{HUB}{ME}")
    said = one_line(loaded)
    assert "401 Unauthorized" in said
    assert said.endswith("check the name, the network and HF_TOKEN")


def test_a_hub_that_is_away(hub: Hub, some_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use("http://127.0.0.1:9", monkeypatch)  # the discard port: nobody listens
    with pytest.raises(UserError) as pushed:
        push_bundle(some_bundle, ME)
    assert "Connection refused" in one_line(pushed)
    with pytest.raises(UserError) as loaded:
        dsmip.load(f"{HUB}{ME}")
    said = one_line(loaded)
    assert said.startswith(f"{HUB}{ME} cannot be had (")
    assert "Connection refused" in said


def test_what_is_no_name_or_no_model(hub: Hub, some_bundle: Path) -> None:
    with pytest.raises(UserError) as loaded:
        dsmip.load(f"{HUB}nobody/nothing")
    assert "404" in one_line(loaded)
    with pytest.raises(UserError) as pushed:
        push_bundle(some_bundle, "a name/with/too/much")
    assert one_line(pushed).startswith("--push a name/with/too/much: ")
