"""The rules of the tests: they share by way of `tests/support` alone, and neither read nor replace private names."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]
_PATCHES = re.compile(r"(^|\.)(setattr|delattr|patch|patch\.object)$")
_OURS = {"benchmarks", "data_prep", "dsmip", "ray_jobs", "tests", "tools"}
_OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}


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
        if isinstance(node, ast.Call) and _PATCHES.search(ast.unparse(node.func)):
            texts = [each.value for each in node.args[:2] if isinstance(each, ast.Constant)]
            yield from ((node.lineno, text.rpartition(".")[2]) for text in texts if isinstance(text, str))
        elif isinstance(node, ast.Assign):
            targets = [each for each in node.targets if isinstance(each, ast.Attribute)]
            yield from ((node.lineno, each.attr) for each in targets if ast.unparse(each.value) != "self")


def read_privately(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines and private names that are imported, or read of anything but `self`; other packages' may be."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _OURS:
            yield from ((node.lineno, alias.name) for alias in node.names if _is_private(alias.name))
        elif isinstance(node, ast.Attribute) and _is_private(node.attr):
            of = ast.unparse(node.value)
            if of not in ("self", "cls", "torch", "super()"):
                yield node.lineno, f"{of}.{node.attr}"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in _OF_NAMED_TUPLES


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
        assert not _is_private(name), f"{path}:{line} patches {name}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_private_name_is_read(path: Path) -> None:
    """What a test looks at is what a user of the module has."""
    for line, name in read_privately(parsed(path)):
        raise AssertionError(f"{path}:{line} reads {name}")


@pytest.mark.parametrize(
    "code",
    [
        "monkeypatch.setattr(module, '_name', 1)",
        "mock.patch('package.module._name')",
        "mock.patch.object(module, '_name')",
        "module._name = 1",
    ],
)
def test_every_way_to_patch_is_seen(code: str) -> None:
    assert [name for _, name in patched(ast.parse(code))] == ["_name"]


@pytest.mark.parametrize(("code", "found"), [("from dsmip.x import _y", 1), ("x._y", 1), ("x._replace(y=1)", 0)])
def test_private_names_are_seen(code: str, found: int) -> None:
    assert len(list(read_privately(ast.parse(code)))) == found
