"""The command `dsmip serve` in a process of its own."""

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.support.paths import ROOT


@contextmanager
def served(arguments: Sequence[str]) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The command on a free port, once it serves: its address and its process, which ends with the block.

    Args:
        arguments: Of `dsmip`, `serve` first.
    """
    command = [sys.executable, "-c", "from ray_jobs.cli import main; main()", *arguments, "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        said: list[str] = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"serving on (http://127.0.0.1:\d+) ", line):
                yield found[1], process
                return
        raise AssertionError("".join(said))
    finally:
        process.kill()
        process.wait()
