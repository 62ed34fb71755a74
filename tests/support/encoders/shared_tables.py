"""Processes of their own that read or write shared feature tables, for tests of what happens beside one another."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dsmip.data.table import Table
from dsmip.encoders.shared_tables.tables import Origin, SharedTables
from dsmip.storage.run_storage import LocalRun

ORIGIN = Origin(data="small", split="kb", part="text")
_ROWS = 1000
_fork = multiprocessing.get_context("fork")  # in milliseconds; what a child locks it gives back when it ends


def write(path: Path) -> int:
    """A table of 4 kB and some; returns its rows."""
    Table({"x": torch.ones(_ROWS)}).save(path)
    return _ROWS


def make(place: Path, key: str) -> Path:
    """A table, written by another process, so that this one does not keep it."""
    _run(lambda: _made(place, key, write))
    return place / f"{key}.safetensors"


@contextmanager
def reading(place: Path, key: str) -> Iterator[None]:
    """While another process has the table open."""
    opened, ended = _fork.Event(), _fork.Event()

    def read() -> None:
        assert SharedTables(LocalRun(place)).find(key, print)
        opened.set()
        ended.wait()

    reader = _fork.Process(target=read, daemon=True)
    reader.start()
    assert opened.wait(60)
    try:
        yield
    finally:
        ended.set()
        reader.join()


def write_together(place: Path, key: str, log: Path, number: int) -> None:
    """Several processes ask for a table at once; each that writes it notes so."""
    ready = _fork.Barrier(number)

    def noted(path: Path) -> int:
        with log.open("a") as stream:
            stream.write("written\n")
        return write(path)

    def ask() -> None:
        ready.wait(60)
        _made(place, key, noted)

    writers = [_fork.Process(target=ask) for _ in range(number)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * number


def killed_writer(place: Path, key: str) -> None:
    """A process that is killed when a part of a table is written."""

    def die(path: Path) -> int:
        path.write_bytes(bytes(1000))
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    writer = _fork.Process(target=lambda: _made(place, key, die))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL


def _made(place: Path, key: str, written: Callable[[Path], int]) -> None:
    SharedTables(LocalRun(place)).made(key, ORIGIN, written, lambda: None)


def _run(what: Callable[[], None]) -> None:
    process = _fork.Process(target=what)
    process.start()
    process.join()
    assert process.exitcode == 0
