"""The rules of the source tree: rooms and their floors, no circles of modules, sizes of rooms, files and functions.

`uv run pytest tests/project/test_house.py -s` prints the figures of the import graph.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGES = ("ray_jobs", "data_prep", "dsmip", "benchmarks")
MAX_ROOM_FILES, MAX_LINES, MAX_FUNCTION_LINES = 12, 365, 70

GROUND = (
    "dsmip.config",
    "dsmip.distributed",
    "dsmip.errors",
    "dsmip.keys",
    "dsmip.messages",
    "dsmip.parallel",
    "dsmip.private",
    "dsmip.progress",
    "dsmip.rank_options",
    "dsmip.separate_towers",
    "dsmip.version",
)
# The house from the roof down. An import may stay in its room or go to a lower floor; rooms of one floor are strangers.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "benchmarks.big_release",
        "benchmarks.gpu",
        "benchmarks.linking",
        "benchmarks.memory",
        "benchmarks.prepare",
        "benchmarks.serving",
        "benchmarks.shards",
        "benchmarks.stage_one",
        "benchmarks.stores",
    ),
    ("benchmarks.ranking", "benchmarks.training"),
    ("benchmarks.data", "benchmarks.roofline"),
    ("benchmarks",),
    ("ray_jobs",),
    ("ray_jobs.commands",),
    ("ray_jobs.jobs",),
    ("ray_jobs.local_jobs",),
    ("ray_jobs.training",),
    ("ray_jobs.cluster",),
    ("ray_jobs.terminal",),
    ("data_prep.inspection.presentation",),
    ("data_prep.demo", "data_prep.enhancement", "data_prep.inspection"),
    ("data_prep.build",),
    ("data_prep.formats",),
    ("data_prep",),
    ("dsmip",),
    ("dsmip.serving",),
    ("dsmip.suites",),
    ("dsmip.exporting", "dsmip.planning", "dsmip.reporting"),
    ("dsmip.linking",),
    ("dsmip.distillation", "dsmip.reranking"),
    ("dsmip.training",),
    ("dsmip.evaluation",),
    ("dsmip.calibration",),
    ("dsmip.runs",),
    ("dsmip.models.cross_encoders",),
    ("dsmip.models",),
    ("dsmip.units",),
    ("dsmip.encoders",),
    ("dsmip.encoders.shared_tables", "dsmip.encoders.towers"),
    ("dsmip.encoders.formats",),
    ("dsmip.data", "dsmip.pages"),
    ("dsmip.storage",),
    GROUND,
    ("dsmip.ops",),
)
DATA_PREP_KNOWS = ("dsmip.data", "dsmip.pages", "dsmip.storage", *GROUND)


@cache
def modules() -> Mapping[str, Path]:
    """Files by module name; a package goes by its own."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def names_imported(path: Path) -> Iterator[str]:
    """Dotted names of all imports, wherever in the file they stand, functions included."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module or ""


@cache
def imports() -> Mapping[str, frozenset[str]]:
    """Which modules of the project each of them imports."""
    return {name: frozenset(names_imported(path)) & modules().keys() - {name} for name, path in modules().items()}


def room_of(module: str) -> tuple[int, str]:
    """Floor, counted from the roof, and room of a module: the longest entry of FLOORS that it lies in."""
    found = [
        (len(room), floor, room)
        for floor, rooms in enumerate(FLOORS)
        for room in rooms
        if module == room or module.startswith(f"{room}.")
    ]
    assert found, f"{module} is in no room of FLOORS"
    _, floor, room = max(found)
    return floor, "ground" if room in GROUND else room


def circles(graph: Mapping[str, frozenset[str]]) -> list[list[str]]:
    """Sets of modules that reach one another (Tarjan's strongly connected components of two and more)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in graph[name]:
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            members = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(members) > 1:
                found.append(sorted(members))

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return found


def test_imports_point_down() -> None:
    wrong = []
    for name, others in sorted(imports().items()):
        floor, room = room_of(name)
        for other in sorted(others):
            below, room_below = room_of(other)
            if room_below != room and below <= floor:
                wrong.append(f"{name} imports {other}: from {room} (floor {floor}) to {room_below} (floor {below})")
    assert not wrong, "\n".join(wrong)


def test_there_is_no_circle_of_modules() -> None:
    assert circles(imports()) == []


def test_a_circle_is_found() -> None:
    graph = {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("a"), "d": frozenset("a")}
    assert circles(graph) == [["a", "b", "c"]]


def test_the_figures_of_the_import_graph() -> None:
    rooms = {room_of(name)[1] for name in modules()}
    assert rooms == {room_of(room)[1] for floor in FLOORS for room in floor}, "FLOORS names a room that is not there"
    num_imports = sum(len(others) for others in imports().values())
    print(
        f"\n{len(modules())} modules in {len(rooms)} rooms on {len(FLOORS)} floors, {num_imports} imports, "
        f"{len(circles(imports()))} circles"
    )


def test_foreign_packages_stay_where_they_belong() -> None:
    """Ray is known to ray_jobs (and what measures it) alone; data_prep knows no models, ops torch alone."""
    wrong = []
    for name, path in modules().items():
        for other in names_imported(path):
            top = other.partition(".")[0]
            allowed = True
            if name.startswith(("dsmip", "data_prep")):
                allowed = top != "ray"
            if name.startswith("data_prep") and other in modules():
                allowed = top == "data_prep" or other == "dsmip" or other.startswith(DATA_PREP_KNOWS)
            if name.startswith("dsmip.ops"):
                allowed = top == "torch" or top in sys.stdlib_module_names or other.startswith("dsmip.ops")
                allowed |= top == "triton" and name.startswith("dsmip.ops.kernels")
            if name.startswith("ray_jobs.terminal"):
                allowed = top != "ray"
            if not allowed:
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_rooms_are_small_enough_to_know() -> None:
    folders = {path.parent for path in modules().values()} | {
        path.parent for path in (ROOT / "tests" / "support").rglob("*.py")
    }
    crowded = {
        str(folder.relative_to(ROOT)): len(list(folder.glob("*.py")))
        for folder in folders
        if len(list(folder.glob("*.py"))) > MAX_ROOM_FILES
    }
    assert not crowded, crowded
    ground = {"__init__", *(name.rpartition(".")[2] for name in GROUND)}
    assert {path.stem for path in (ROOT / "dsmip").glob("*.py")} == ground


@pytest.mark.parametrize("name", modules())
def test_files_and_functions_fit_a_reader(name: str) -> None:
    path = modules()[name]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, f"{path}:{node.lineno} {node.name}"


@pytest.mark.parametrize("name", modules())
def test_the_first_line_names_the_thing(name: str) -> None:
    first = (ast.get_docstring(parsed(modules()[name])) or "").partition("\n")[0]
    assert first, f"{name} has no docstring"
    riddle = first.split()[0] in {"What", "How", "Who", "Where", "Whether", "Which", "Why"}
    assert not riddle, f"{name}: {first}"
