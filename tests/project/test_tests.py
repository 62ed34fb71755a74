"""The rules of the tests: they share by way of `tests/support` alone, and put nothing in the place of private names."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names of all that is imported, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def patched(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines and names of attributes that are set on anything but `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("setattr", "delattr", "patch"):
            texts = [each.value for each in node.args[:2] if isinstance(each, ast.Constant)]
            yield from ((node.lineno, text.rpartition(".")[2]) for text in texts if isinstance(text, str))
        elif isinstance(node, ast.Assign):
            targets = [each for each in node.targets if isinstance(each, ast.Attribute)]
            yield from ((node.lineno, each.attr) for each in targets if ast.unparse(each.value) != "self")


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_test_module_imports_another(path: Path) -> None:
    """One may be moved, renamed or left out without another one noticing."""
    for name in imported(parsed(path)):
        ours = name.split(".")[0] == "tests"
        assert not ours or name.split(".")[1:2] == ["support"], f"{path} imports {name}"
        assert not any(part.startswith("test_") or part == "conftest" for part in name.split(".")[:-1]), name


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_private_name_is_patched(path: Path) -> None:
    """What takes another thing's place takes that of a public constant, function or method."""
    for line, name in patched(parsed(path)):
        assert not name.startswith("_") or name.endswith("__"), f"{path}:{line} patches {name}"
