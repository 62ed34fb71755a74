"""`dsmip enhance` with BM25: what is added, what stays, that no gold is looked at, and who reads it then."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.build.view import make_view
from data_prep.inspection.report import inspect_dataset
from data_prep.inspection.verification import verify_dataset
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB, SPLITS
from dsmip.data.text import Template, mention_text
from dsmip.errors import UserError
from dsmip.runs.checks import check_texts
from dsmip.runs.load_config import load_config
from ray_jobs.local_jobs.enhance import EnhanceOptions, enhance_data
from ray_jobs.terminal.display import Display
from tests.support.ambiguous import ambiguous

DESC = r"system.template.mention='{word} [SEP] {sentence} [SEP] {desc}'"


def enhanced(data: Dataset, out: Path, **options: Any) -> Dataset:
    enhance_data(data.location, str(out), EnhanceOptions(**options), Display())
    return Dataset.open(out)


def descriptions(dataset: Dataset) -> dict[str, str]:
    return {mention.mention_id: mention.desc for split in SPLITS for mention in dataset.mentions(split)}


def test_mentions_get_a_description_and_all_else_stays(data: Dataset, tmp_path: Path) -> None:
    made = enhanced(data, tmp_path / "out")
    found = descriptions(made)
    assert [found[f"test{number}"] for number in range(4)] == [
        "a tree with leaves",
        "a street in a town",
        "a tree with acorns",
        "",
    ]
    for split in SPLITS:
        for before, after in zip(data.mentions(split), made.mentions(split), strict=True):
            assert (after.mention_id, after.word, after.sentence) == (before.mention_id, before.word, before.sentence)
            assert (after.entity_id, after.image, dict(after.groups)) == (
                before.entity_id,
                before.image,
                dict(before.groups),
            )
            assert before.desc == ""
    assert list(made.entities()) == list(data.entities())
    for shard in made.manifest.shards_of(KB):
        assert (made.folder / shard.path).samefile(data.folder / shard.path)
    assert verify_dataset(made.folder).ok
    assert made.manifest.choices["mention_desc"].startswith("lexical, settings ")
    settings = json.loads((made.folder / "enhancement/settings.json").read_text())
    assert (settings["descriptions"], settings["data_sha256"]) == ("knowledge base", data.manifest_hash)


def test_no_gold_is_looked_at(data: Dataset, tmp_path: Path) -> None:
    other = ambiguous(tmp_path, shift=1)
    golds = [[mention.entity_id for mention in each.mentions("train")] for each in (data, other)]
    assert golds[0] != golds[1]
    assert descriptions(enhanced(other, tmp_path / "other")) == descriptions(enhanced(data, tmp_path / "out"))


def test_a_table_of_ones_own_is_taken_instead(data: Dataset, tmp_path: Path) -> None:
    table = tmp_path / "labels.jsonl"
    table.write_text('{"label": "Ash", "description": "what is left of a fire"}\n')
    found = descriptions(enhanced(data, tmp_path / "out", descriptions=table))
    assert {found[f"test{number}"] for number in range(3)} == {""}
    assert found["test3"] == "what is left of a fire"


def test_the_same_again_is_complete_and_other_settings_are_refused(
    data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = enhanced(data, tmp_path / "out")
    assert "27 of 36 mentions have a description; 27 have candidates by name, 27 by the very" in capsys.readouterr().out
    assert enhanced(data, tmp_path / "out").manifest_hash == before.manifest_hash
    assert "is complete already" in capsys.readouterr().out
    assert enhanced(data, tmp_path / "again").manifest_hash == before.manifest_hash
    with pytest.raises(UserError, match="holds another dataset, or one enhanced in another way"):
        enhanced(data, tmp_path / "out", candidates=3)
    with pytest.raises(UserError, match="holds another dataset"):
        enhanced(data, data.folder)
    with pytest.raises(UserError, match="has descriptions already"):
        enhanced(before, tmp_path / "twice")
    view = make_view(data.folder, tmp_path / "view", 0.5, 0)
    with pytest.raises(UserError, match="is a view; enhance the dataset that it is a view of"):
        enhanced(view, tmp_path / "of-view")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and no enhancement"):
        enhanced(data, tmp_path / "mine")
    with pytest.raises(UserError, match="is made in a folder of this machine"):
        enhance_data(data.location, "s3://bucket/out", EnhanceOptions(), Display())


def test_an_interrupted_build_goes_on(data: Dataset, tmp_path: Path) -> None:
    whole = enhanced(data, tmp_path / "out")
    (whole.folder / "manifest.json").unlink()
    (whole.folder / whole.manifest.shards_of("test")[0].path).write_bytes(b"half")
    assert enhanced(data, tmp_path / "out").manifest_hash == whole.manifest_hash
    assert verify_dataset(whole.folder).ok


def test_templates_read_it_where_there_is_some(data: Dataset, tmp_path: Path) -> None:
    made = enhanced(data, tmp_path / "out")
    config = load_config("mmoe_wikimel", [DESC])
    template: Template = config.system.template
    mention = next(each for each in made.mentions("test") if each.mention_id == "test0")
    assert mention_text(mention, template).endswith("No. test0 [SEP] a tree with leaves")
    check_texts(config, made)
    with pytest.raises(UserError, match=r"has no descriptions of mentions, and the template .* make them with"):
        check_texts(config, data)
    view = make_view(made.folder, tmp_path / "view", 0.5, 0)
    check_texts(config, view)


def test_inspection_says_how_often_it_is_the_golds_own_text(data: Dataset, tmp_path: Path) -> None:
    report = inspect_dataset(enhanced(data, tmp_path / "out"))
    rows = {row.name: row.counts["test"] for row in report.mentions}
    assert (rows["with_desc"].count, rows["with_desc"].of) == (9, 12)
    assert (rows["desc_of_gold"].count, rows["desc_of_gold"].of) == (9, 9)
    wrong_golds = inspect_dataset(enhanced(ambiguous(tmp_path, 1), tmp_path / "other"))
    wrong = {row.name: row.counts["test"] for row in wrong_golds.mentions}
    assert (wrong["desc_of_gold"].count, wrong["desc_of_gold"].of) == (0, 9)
    assert {row.name: row.counts["test"].count for row in inspect_dataset(data).mentions}["with_desc"] == 0
