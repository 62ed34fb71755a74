"""`dsmip systems`: the figures that papers print, what parts read, and configurations of one's own."""

import json
from pathlib import Path

import pytest

from dsmip.models import systems
from dsmip.runs.load_config import load_config
from ray_jobs.local_jobs.systems import Pictures, Texts, describe, show_systems


def test_all_systems_are_listed_with_the_parameters_that_papers_print(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DSMIP's table 3: 7.6 M of the multimodal expert, against the whole CLIP."""
    found = {each.system: each for each in show_systems(None, [], tmp_path / "systems.json")}
    assert found.keys() == systems().keys()
    parts = {part.name: part for part in found["dsmip"].parts}
    assert parts["multimodal"].trained == pytest.approx(7.6e6, rel=0.01)
    (clip,) = found["clip"].parts
    assert clip.trained == pytest.approx(151.3e6, rel=0.001)
    text = parts["text"]
    assert text.total - text.trained == clip.total - 1  # CLIP as a linker has a temperature of its own
    assert (parts["dsmip"].stage, parts["dsmip"].texts) == (2, None)
    said = capsys.readouterr().out
    assert "7.55 M" in said
    assert "151.28 M" in said
    for each in found.values():
        assert each.paper in said
    assert found["bert"].unknown is None or "hf:bert-base-uncased cannot be had" in said  # without internet
    stored = {each["system"]: each for each in json.loads((tmp_path / "systems.json").read_text())}
    assert stored["clip"]["parts"][0]["trained"] == clip.trained


@pytest.mark.parametrize("name", systems())
def test_a_system_names_its_paper_and_its_published_configuration(name: str) -> None:
    system = systems()[name]
    assert load_config(system.published_config).model == name
    assert system.paper.rstrip()[-4:].isdigit()


def test_what_parts_read_follows_the_configuration(narrow_backbone: Path) -> None:
    overrides = [f"backbone.architecture={narrow_backbone}", "system.num_tokens=20", "system.tune=frozen"]
    config = load_config("mimic_wikimel", overrides)
    (part,) = describe(config, "mine").parts
    assert part.texts == Texts("{word} [SEP] {sentence}", "{name} [SEP] {attributes}", tokens=20, padded=True)
    assert part.pictures == Pictures(16, "squash", "lanczos")
    assert 0 < part.trained < part.total
