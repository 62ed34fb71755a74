"""Layouts are found by being there, and the first one that fits a folder is taken."""

import shlex
import sys
from pathlib import Path

import pytest

from data_prep import formats
from data_prep.formats.registry import knowledge_base_file, layouts, open_knowledge_base, open_release
from data_prep.formats.release import Finding, ReleaseOptions
from dsmip.errors import UserError

LAYOUT_FILE = '''
"""A layout whose folder has a words.txt and nothing else."""

from data_prep.formats.release import KnowledgeBaseReader, Layout, RawEntity, RawMention


class Words:
    def __init__(self, file, options):
        self.file = file

    def files(self):
        return [(self.file.name, self.file)]

    def entities(self):
        for position, word in enumerate(self.file.read_text().split()):
            yield RawEntity(self.file.name, position, word.upper(), word, "a word")

    def records(self):
        for entity in self.entities():
            yield entity.entity_id, {"title": entity.name}


class WordRelease(Words):
    layout, choices = "words", {}

    def __init__(self, folder, options):
        super().__init__(folder / "words.txt", options)
        self.folder = folder

    def mentions(self, split):
        for entity in self.entities():
            yield RawMention(entity.source, entity.record, "", entity.name, "A word.", entity.entity_id)


LAYOUT = Layout(
    "words", WordRelease, lambda folder: (folder / "words.txt").is_file(), {"words.txt": KnowledgeBaseReader(Words)}
)
'''


@pytest.fixture
def with_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the layout `words`, whose module lies in a folder that belongs to the package."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more/words.py").write_text(LAYOUT_FILE)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path / "more")])
    monkeypatch.delitem(sys.modules, "data_prep.formats.words", raising=False)
    (tmp_path / "release").mkdir()
    (tmp_path / "release/words.txt").write_text("ash elm")
    return tmp_path / "release"


def test_layouts_that_are_there_come_in_the_order_in_which_they_are_tried() -> None:
    assert list(layouts()) == ["mimic", "melbench", "wikidiverse", "jsonl"]
    assert all(name == layout.name for name, layout in layouts().items())


def test_a_new_layout_is_one_file(with_words: Path) -> None:
    assert list(layouts()) == ["mimic", "melbench", "wikidiverse", "words", "jsonl"]
    seen: list[str] = []
    release = open_release(with_words, None, ReleaseOptions(), seen.append)
    assert seen == [f"{with_words}: layout words"]
    assert [mention.word for mention in release.mentions("train") if not isinstance(mention, Finding)] == ["ash", "elm"]
    assert open_release(with_words, "words", ReleaseOptions()).layout == "words"


def test_the_entities_of_a_new_layout_serve_layouts_that_have_none(with_words: Path) -> None:
    options = ReleaseOptions(kb=with_words)
    kb = open_knowledge_base(knowledge_base_file(with_words.parent, options), options)
    assert [entity.name for entity in kb.entities() if not isinstance(entity, Finding)] == ["ash", "elm"]
    with pytest.raises(UserError, match=r"has one text of each entity.*or bring a kb_entity.json"):
        open_knowledge_base(with_words / "words.txt", ReleaseOptions(entity_text="desc"))


def test_a_release_one_folder_down_is_found_and_said(with_words: Path) -> None:
    outer, seen = with_words.parent, list[str]()
    assert open_release(outer, None, ReleaseOptions(), seen.append).folder == with_words
    assert seen == [f"{with_words}: layout words"]
    assert open_release(outer, "words", ReleaseOptions(), seen.append).folder == with_words
    assert seen[1:] == [f"{with_words}: layout words"]
    (outer / "second").mkdir()
    (outer / "second/words.txt").write_text("fir")
    with pytest.raises(UserError, match=r"holds 2 releases; choose one, as .*/release or .*/second"):
        open_release(outer, None, ReleaseOptions())


@pytest.mark.parametrize(("name", "command"), [("a b.tar", "tar -xf"), ("c.zip", "unzip"), ("d.tar.gz", "tar -xf")])
def test_an_archive_is_to_be_unpacked(name: str, command: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    unpack = f"unpack it first, as by: {command} {shlex.quote(str(tmp_path / name))}"
    for given, what in ((tmp_path / name, "is an archive"), (tmp_path, f"it holds {name}")):
        with pytest.raises(UserError) as refused:
            open_release(given, None, ReleaseOptions())
        assert f"{what}; {unpack}" in str(refused.value)


def test_a_file_is_no_release(tmp_path: Path) -> None:
    (tmp_path / "mentions.jsonl").write_text("")
    with pytest.raises(UserError, match=r"mentions.jsonl: is a file; a release is given by its folder"):
        open_release(tmp_path / "mentions.jsonl", None, ReleaseOptions())


def test_what_no_layout_fits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no layout that is known \(mimic, melbench, wikidiverse, jsonl\)"):
        open_release(tmp_path / "empty", None, ReleaseOptions())
    with pytest.raises(UserError, match="--format words is unknown; known: mimic, melbench, wikidiverse, jsonl, demo"):
        open_release(tmp_path / "empty", "words", ReleaseOptions())
    with pytest.raises(UserError, match="no such folder"):
        open_release(tmp_path / "nowhere", None, ReleaseOptions())
