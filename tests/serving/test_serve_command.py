"""The command `dsmip serve`: from its first line to its end."""

import os
import re
import shutil
import signal
import socket
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from typer.testing import CliRunner

import dsmip
from dsmip.exporting.export import ExportOptions, export_run
from dsmip.linking.load import LoadOptions, examples_of
from dsmip.runs.run import Run
from dsmip.serving.served import Served, Source, stamp_of
from ray_jobs.cli import app
from tests.support.cluster.ray_heads import wait_until
from tests.support.cluster.serving import served


def begun_or_answered(metrics: str) -> int:
    """Requests for links that the service has seen."""
    answered = re.search(r'requests_total{path="/link",status="200"} (\d+)', metrics)
    begun = re.search(r"requests_in_progress (\d+)", metrics)
    assert begun is not None
    return int(begun[1]) - 1 + (int(answered[1]) if answered else 0)  # without the one for the figures


@pytest.mark.slow
def test_it_serves_until_it_is_told_to_stop_and_answers_what_has_begun(run: Run) -> None:
    with served(["serve", str(run.folder)]) as (address, process), httpx.Client(base_url=address, timeout=60) as client:
        assert client.get("/health/ready").json()["entities"] == 11
        assert 'data-word="' in client.get("/").text  # mentions of the run's data to click
        statuses: list[int] = []
        begun = threading.Barrier(5)

        def ask() -> None:
            with httpx.Client(base_url=address, timeout=60) as own:
                own.get("/health/live")
                begun.wait(60)
                statuses.append(own.post("/link", json={"mentions": [{"word": "red"}] * 64}).status_code)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        begun.wait(60)
        wait_until(lambda: begun_or_answered(client.get("/metrics").text) == 4, 60, "the requests do not come")
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert statuses == [200] * 4
        assert process.wait(60) in (0, -signal.SIGTERM)
        with pytest.raises(httpx.TransportError):
            client.get("/health/live")


def serve(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def test_a_port_in_use_and_a_model_that_is_none_are_said_in_one_line(run: Run, tmp_path: os.PathLike[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = serve(run.folder, "--port", port)
    assert str(said.exception) == (
        f"--host 127.0.0.1 --port {port}: Address already in use; give another --port, or --host"
    )
    assert "no run at" in str(serve(tmp_path, "--port", 0).exception)
    assert "--host nowhere.invalid" in str(serve(run.folder, "--host", "nowhere.invalid").exception)


@pytest.mark.slow
def test_a_bundle_is_served_too_and_opened_again_when_it_is_exported_again(run: Run, tmp_path: Path) -> None:
    bundle, options = tmp_path / "bundle", LoadOptions()
    export_run(run.folder, bundle, torch.device("cpu"), ExportOptions(with_backbone=True))
    assert examples_of(bundle, options) == examples_of(run.folder, options)
    assert [each.word for each in examples_of(bundle)] == [
        each.word for each in islice(run.dataset.mentions("test"), 4)
    ]
    served = Served(Source(lambda: dsmip.load(bundle), lambda: stamp_of(bundle)))
    assert not served.check()
    shutil.rmtree(bundle)
    export_run(run.folder, bundle, torch.device("cpu"), ExportOptions(with_backbone=True))
    assert served.check()
    assert served.linker.link("red").best is not None
