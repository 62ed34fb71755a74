"""The rules of docstrings: errors stand in a section `Raises:`, one a line, not in running text."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ROOMS = ("dsmip", "data_prep", "ray_jobs", "benchmarks", "tools", "deploy", "tests")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")
_ERROR = r"`?\b(?:[A-Z]\w*(?:Error|Warning)|JobFailed|NotRankable|StoreAway|HalfOverflow)\b`?"
# "Raises UserError when ...", "...; UserError names the key"; not "an OSError that names it"
_SENTENCE = re.compile(rf"\b[Rr]aises:? (?:an? )?{_ERROR}|(?:^|[.;,] ){_ERROR}:? \w")
_ENTRY = re.compile(rf"{_ERROR}: ")


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines and docstrings of a module and of all that is defined in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield getattr(node, "lineno", 1), ast.get_docstring(node) or ""


def faults(docstring: str) -> Iterator[str]:
    """Lines that say in running text what is raised, and lines of a `Raises:` that name two errors."""
    section = ""
    for line in docstring.splitlines():
        if heading := _SECTION.fullmatch(line):
            section = heading[1]
        elif line and not line.startswith(" "):
            section = ""
        if section == "Raises":
            if len(_ENTRY.findall(line)) > 1:
                yield line
        elif _SENTENCE.search(line):
            yield line


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_what_is_raised_stands_in_its_section(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    wrong = [f"{path}:{number}: {line.strip()}" for number, text in docstrings(tree) for line in faults(text)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("docstring", "found"),
    [
        ("Opens it.\n\nRaises:\n    UserError: There is none.\n    OSError: The disk is full.", 0),
        ("Opens it.\n\nRaises UserError when there is none.", 1),
        ("The system of that name; UserError names the nearest one.", 1),
        ("Opens it.\n\nRaises:\n    ValueError: No such split. UserError: A shard is missing.", 1),
        ("Makes of all errors an OSError that names the folder.", 0),
        ("Opens it.\n\nArgs:\n    path: The file; raises UserError without one.", 1),
    ],
)
def test_running_text_is_told_from_a_section(docstring: str, found: int) -> None:
    assert len(list(faults(docstring))) == found
