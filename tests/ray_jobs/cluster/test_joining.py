"""An address that no cluster answers at, or whose cluster refuses the caller: one line and exit code 2, in seconds."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from dsmip.data.dataset import Dataset
from dsmip.runs.run import Run
from tests.support.paths import ROOT

JOIN = """
import json, os, sys
from ray_jobs.cluster.connection import connected
from dsmip.errors import ReportedError
for address in json.loads(sys.argv[1]):
    os.environ["RAY_ADDRESS"] = address
    try:
        with connected():
            print("joined")
    except ReportedError as error:
        print(error.exit_code, error)
"""
COMMANDS = """
import json, sys
from ray_jobs.cli import app
from dsmip.errors import ReportedError
for arguments in json.loads(sys.argv[1]):
    try:
        app(arguments, standalone_mode=False)
        print("done")
    except ReportedError as error:
        print("ENDED", error.exit_code, error)
"""


def said(code: str, given: object, address: str) -> list[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables["RAY_ADDRESS"] = address
    command = [sys.executable, "-c", code, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, timeout=250, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout.splitlines()


def refused(address: str, why: str) -> str:
    return f"2 RAY_ADDRESS={address}: {why}; name a running cluster, or unset it for a local Ray"


def test_a_dead_or_wrong_address_is_told_in_one_line() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        dead = f"127.0.0.1:{bound.getsockname()[1]}"
        why = {
            dead: "Connection refused",
            f"ray://{dead}": "Connection refused",
            "rubbish": "is not auto, HOST:PORT or ray://HOST:PORT",
            ":6379": "is not auto, HOST:PORT or ray://HOST:PORT",
            "127.0.0.1:port": "is not auto, HOST:PORT or ray://HOST:PORT",
        }
        assert said(JOIN, list(why), dead) == [refused(address, reason) for address, reason in why.items()]


@pytest.mark.slow
def test_what_is_no_ray_is_told_so() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert said(JOIN, [address], address) == [refused(address, "what answers there is no Ray")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a process table of its own")
def test_auto_without_any_cluster_is_told_in_one_line() -> None:
    table = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*table, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no process table of its own")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [*table, sys.executable, "-c", JOIN, json.dumps(["auto"])]
    given = {**variables, "RAY_ADDRESS": "auto", "RAY_TMPDIR": "/nowhere"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=given, timeout=250, check=False)
    assert done.stdout.startswith("2 RAY_ADDRESS=auto: Could not find any running Ray instance"), done
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_command_that_joins_says_so(run: Run, small_data: Dataset, tmp_path: Path) -> None:
    data, folder = str(small_data.folder), str(run.folder)
    fresh = ["--config", "demo", "--data", data, "--set", "held_out=0"]  # too few mentions for a share
    commands: Sequence[Sequence[str]] = [
        ["prepare", str(small_data.folder.parent / "release"), str(tmp_path / "data"), "--ray"],
        ["pretrain", *fresh, "--out", str(tmp_path / "backbone.safetensors")],
        ["train", *fresh, "--run", str(tmp_path / "run"), "--set", "backbone.pretrained=null"],
        ["features", data, "--kind", "vgg16", "--random-weights", "0"],
        ["evaluate", "--run", folder, "--split", "validation", "--workers", "2"],
        ["demo", "--out", str(tmp_path / "demo")],
    ]
    lines = [line for line in said(COMMANDS, commands, "127.0.0.1:1") if line.startswith("ENDED")]
    assert lines == [f"ENDED {refused('127.0.0.1:1', 'Connection refused')}"] * len(commands)
