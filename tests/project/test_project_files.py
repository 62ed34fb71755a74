"""What the project's papers promise: equations' functions exist, named files and configurations are there."""

import importlib
import re
from typing import Any

import pytest

from dsmip.runs.load_config import shipped_configs
from tests.support.paths import ROOT


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("function", sorted(set(re.findall(r"`([\w/]+\.py::[\w.]+)`", _text("docs/paper.md")))))
def test_the_functions_of_the_papers_equations_exist(function: str) -> None:
    path, _, name = function.partition("::")
    found: Any = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        found = getattr(found, part)


def test_every_equation_has_a_place() -> None:
    rows = re.findall(r"^\| ([\d, -]+) \|", _text("docs/paper.md"), flags=re.M)
    covered: set[int] = set()
    for row in rows:
        for numbers in row.split(","):
            first, _, last = numbers.partition("-")
            covered |= set(range(int(first), int(last or first) + 1))
    assert covered == set(range(1, 21))


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_files_and_configurations_that_a_text_names_exist(name: str) -> None:
    text = _text(name)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not ((ROOT / name).parent / link).exists()] == []
    paths = re.findall(r"\b((?:ray_jobs|data_prep|dsmip|tests|tools|docs|deploy)/[\w/]*\w\.\w+)", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert set(re.findall(r"--config (\w+)", text)) <= set(shipped_configs())
