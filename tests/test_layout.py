"""The rules of the source tree: who may import whom, and how long files and functions may be."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGES = ("ray_jobs", "data_prep", "dsmip")
MAX_LINES, MAX_FUNCTION_LINES = 400, 70
# data_prep is fed with records and writes shards: of the library it knows these modules only
KNOWN_TO_DATA_PREP = {
    "dsmip",
    "atomic",
    "dataset",
    "dataset_storage",
    "errors",
    "images",
    "locations",
    "manifest",
    "object_store",
    "parallel",
    "progress",
    "records",
    "sampler",
    "tar",
    "text",
    "views",
}

SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
IDS = [str(path.relative_to(ROOT)) for path in SOURCES]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all imports, wherever in the file they stand."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.module or ""


def test_there_are_sources() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(PACKAGES)
    assert any("ops" in path.parts for path in SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_imports_go_down(path: Path) -> None:
    """ray_jobs -> data_prep -> dsmip -> dsmip/ops; Ray is known to ray_jobs alone."""
    relative = path.relative_to(ROOT)
    for name in imported(path):
        parts = name.split(".")
        if relative.parts[0] == "ray_jobs":
            continue
        assert parts[0] not in ("ray", "ray_jobs"), f"{relative} imports {name}"
        if relative.parts[0] == "data_prep":
            known = parts[0] != "dsmip" or len(parts) == 1 or parts[1] in KNOWN_TO_DATA_PREP
            assert known, f"{relative} imports {name}"
            continue
        assert parts[0] != "data_prep", f"{relative} imports {name}"
        if relative.parts[:2] == ("dsmip", "ops"):
            allowed = parts[0] in ("torch", "__future__") or parts[0] in sys.stdlib_module_names
            allowed |= parts[0] == "triton" and relative.parts[2] == "kernels"
            assert allowed or name.startswith("dsmip.ops"), f"{relative} imports {name}"


def test_object_stores_have_one_client() -> None:
    users = {path.name for path in SOURCES if any(name.split(".")[0] == "fsspec" for name in imported(path))}
    assert users == {"object_store.py"}


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_files_and_functions_fit_a_reader(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, f"{path}:{node.lineno} {node.name}"


TEST_MODULES = sorted((ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("path", TEST_MODULES, ids=[str(path.relative_to(ROOT)) for path in TEST_MODULES])
def test_test_modules_share_by_way_of_support_alone(path: Path) -> None:
    """A test module may be moved, renamed or left out without another one noticing."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            shared = parts[:2] == ["tests", "support"] or not {"tests", "conftest"} & set(parts)
            shared = shared and not any(part.startswith("test_") for part in parts)
            assert shared, f"{path} imports {name}"
