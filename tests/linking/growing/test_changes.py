"""Changes of a bundle's entities: what is refused, what breaks off, who reads and writes meanwhile."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import dsmip
from dsmip.linking.growing.entities import EntitiesChange
from tests.support.scoring.grown import Record, assert_same, colour_files, exported, links_of, record, two_experts
from tests.support.small_release import image_bytes

RECORDS = [record(number) for number in range(6)]


@pytest.fixture(scope="module")
def made(narrow_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("exported"), two_experts(narrow_backbone), RECORDS)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = colour_files(tmp_path_factory.mktemp("images"))
    (folder / "broken.jpg").write_bytes(image_bytes((30, 30))[:-200])
    return folder


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "bundle")
    return tmp_path / "bundle"


def state(bundle: Path) -> dict[str, bytes]:
    """All files but the lock."""
    files = (path for path in bundle.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in files}


def ids(linker: dsmip.Linker) -> list[str]:
    return [text["entity_id"] for text in linker.knowledge_base.texts(range(len(linker)))]


def new(number: int = 8, **fields: Any) -> Record:
    return {**record(number), **fields}


REFUSED: list[tuple[str, list[Any], str]] = [
    ("add", [new(), new(2)], r"record 1: Q2: is there already: 'update' replaces it"),
    ("add", [new(), new(9), new()], r"record 2: Q8: comes twice \(first: record 0\)"),
    ("add", [new(name=" ")], "record 0: Q8: name: empty"),
    ("add", [new(name=None)], "record 0: Q8: name: empty"),
    ("add", [new(name=["x"])], "record 0: Q8: name: a value of type list is no text"),
    ("add", [new(attributes={"a": {"b": 1}})], "record 0: Q8: attributes: more than texts and numbers"),
    ("add", [new(images=["broken.jpg"])], r"record 0: Q8: images broken\.jpg: picture unreadable"),
    ("add", [new(images="gone.jpg")], r"record 0: Q8: images gone\.jpg: no such file"),
    ("add", [new(images=["../images.jpg"])], r"record 0: Q8: images \.\./images\.jpg: outside the folder"),
    ("add", [new(images=["https://x/y.jpg"])], "record 0: Q8: images https://x/y.jpg: no address is fetched"),
    ("add", [new(image="red.jpg")], "record 0: Q8: image: an entity's pictures are called images"),
    ("add", [new(), {"name": "nobody"}], "record 1: no entity_id"),
    ("add", [new(entity_id=" ")], "record 0: entity_id '' is empty"),
    ("add", [new(entity_id="a\nb\x00")], "record 0: entity_id .* is empty, too long or no text"),
    ("add", ["Q9"], "record 0: Q9: an entity is an object with entity_id and name"),
    ("add", new(), "entities: a value of type dict; give a list"),  # type: ignore[list-item]
    ("update", [new(2), new()], "record 1: Q8: is not in the knowledge base: 'add' adds it"),
    ("update", [new(2), new(2)], r"record 1: Q2: comes twice \(first: record 0\)"),
    ("remove", ["Q2", "Q8"], "record 1: Q8: is not in the knowledge base"),
    ("remove", ["Q2", {"entity_id": "Q2"}], r"record 1: Q2: comes twice \(first: record 0\)"),
    ("remove", [each["entity_id"] for each in RECORDS], "no entity would be left"),
    ("remove", "Q2", "entities: a value of type str; give a list"),  # type: ignore[list-item]
]


def test_what_is_refused_changes_nothing(bundle: Path, images: Path) -> None:
    linker, before = dsmip.load(bundle), state(bundle)
    for how, records, message in REFUSED:
        options: dict[str, Any] = {} if how == "remove" else {"images": images}
        for given in (records, iter(records)) if isinstance(records, list) else (records,):
            with pytest.raises(dsmip.UserError, match=message):
                getattr(linker.entities, how)(given, **options)
            assert state(bundle) == before, message


def test_records_of_every_kind(bundle: Path, images: Path) -> None:
    linker, before = dsmip.load(bundle), state(bundle)
    picture = image_bytes((40, 30), "green", "PNG")
    linker.entities.add([{"entity_id": 10, "name": "ten", "attributes": "a number", "images": picture, "more": 1}])
    linker.entities.add([dsmip.Entity(-1, "Q11", "eleven", "", (picture,))])
    columns = {"entity_id": ["Q12"], "name": ["twelve"], "attributes": [None], "images": [["green.jpg"]]}
    linker.entities.add(pa.table(columns), images=images)
    linker.entities.add((new(number) for number in (13, 14)), images=images)
    assert linker.entities.add([]) == linker.entities.remove([]) == EntitiesChange(0, 0, 11, 5, 0)
    after = state(bundle)
    assert {name for name in before if after.get(name) != before[name]} == {"bundle.json"}  # nothing is written again
    kb = linker.reload().knowledge_base
    assert ids(linker.reload())[6:] == ["10", "Q11", "Q12", "Q13", "Q14"]
    assert [kb.image(row) is None for row in range(6, 11)] == [False, False, False, False, False]
    assert kb.entity(kb.row_of("10")).attributes == "a number"
    assert kb.entity(kb.row_of("Q13")).attributes == "number: 13. version: 0."


def killed_while_adding(bundle: Path, images: Path) -> None:
    def kill(what: str, done: int, total: int) -> None:  # the segment is written, and nothing names it
        os.kill(os.getpid(), signal.SIGKILL)

    dsmip.load(bundle).entities.add([new()], images=images, progress=kill)


@pytest.mark.slow  # a process of its own imports torch
def test_a_killed_change_leaves_the_old_state(bundle: Path, images: Path) -> None:
    before = links_of(dsmip.load(bundle))
    process = multiprocessing.get_context("spawn").Process(target=killed_while_adding, args=(bundle, images))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    (left,) = bundle.glob("segments/*/entities.parquet")
    (bundle / ".bundle.json.0f.tmp").write_text("{")
    linker = dsmip.load(bundle)
    assert links_of(linker) == before
    linker.entities.remove(["Q2"])
    assert not left.parent.exists()
    assert not list(bundle.glob(".bundle.json*"))
    linker.entities.add([new()], images=images)
    assert ids(linker.reload()) == ["Q0", "Q1", "Q3", "Q4", "Q5", "Q8"]


def test_an_interrupted_change_leaves_nothing(bundle: Path, images: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    linker = dsmip.load(bundle)
    linker.entities.add([new()], images=images)
    before = state(bundle)
    with pytest.raises(KeyboardInterrupt):
        linker.entities.update([new(2, name="two")], images=images, progress=interrupt)
    assert state(bundle) == before
    with pytest.raises(KeyboardInterrupt):
        linker.entities.compact(interrupt)
    assert state(bundle) == before


def test_two_writers_at_once_are_refused(bundle: Path, images: Path) -> None:
    linker, other = dsmip.load(bundle), dsmip.load(bundle)
    refused = list[str]()

    def records() -> Iterator[Record]:
        changes: list[Callable[[], object]] = [lambda: other.entities.remove(["Q2"]), other.entities.compact]
        for change in changes:
            with pytest.raises(dsmip.UserError, match="somebody else is changing its entities; try again") as error:
                change()
            refused.append(str(error.value))
        yield new()

    linker.entities.add(records(), images=images)
    assert len(refused) == 2
    other.entities.remove(["Q2"])  # of the state that is there by now
    assert ids(other.reload()) == ids(linker.reload()) == ["Q0", "Q1", "Q3", "Q4", "Q5", "Q8"]


def test_an_open_linker_keeps_what_is_deleted_meanwhile(bundle: Path, images: Path) -> None:
    linker = dsmip.load(bundle)
    before = links_of(linker)
    linker.entities.add([new(8), new(9)], images=images)
    with_two = linker.reload()
    grown = links_of(with_two)
    linker.entities.compact()
    linker.entities.remove(["Q9"])  # deletes what nothing names any more
    assert not (bundle / "entities.parquet").exists()
    assert not (bundle / "index").exists()
    assert links_of(linker) == before
    assert links_of(with_two) == grown
    assert [with_two.knowledge_base.image(row) is None for row in range(8)] == [True, False, False] * 2 + [False, True]
    assert_same(linker.reload(), dsmip.load(bundle))


def test_what_cannot_be_changed(made: Path, bundle: Path, tmp_path: Path) -> None:
    run = made.parent / "run"
    with pytest.raises(dsmip.UserError, match=r"is no bundle, .* export the run first \(dsmip export .*run OUT\)"):
        dsmip.load(run).entities.add([new()])
    linker = dsmip.load(bundle)
    text = (bundle / "bundle.json").read_text()
    tree = json.loads(text)
    tree["files"]["config.yaml"]["bytes"] += 1
    (bundle / "bundle.json").write_text(json.dumps(tree))
    with pytest.raises(dsmip.UserError, match="its model is another one by now; open the bundle again"):
        linker.entities.add([{"entity_id": "Q8", "name": "eight"}])
    for segments in ([{"folder": "../x", "entities": 6}], [{"folder": "", "entities": 6, "removed": [6]}]):
        (bundle / "bundle.json").write_text(json.dumps({**json.loads(text), "segments": segments}))
        with pytest.raises(dsmip.UserError, match=r"bundle\.json: segments"):
            dsmip.load(bundle)
