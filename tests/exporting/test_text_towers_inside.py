"""Bundles whose text tower is a Hugging Face model: its configuration and tokenizer are inside, nothing is asked."""

import json
import shutil
import uuid
from pathlib import Path

import pytest
import torch

import dsmip
from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.encoders.architecture import read_architecture
from dsmip.exporting.export import ExportOptions, export_run
from dsmip.linking.bundle import CARD
from tests.support.encoders.small_backbones import SMALL_BACKBONES, TEXT, VISION
from tests.support.encoders.small_bert import write_small_bert
from tests.support.scoring.linked_runs import finished_run, small_system

CPU = torch.device("cpu")
WORDS = ("a", "thing", ",", "number", ":", "colour", "red", "green", "blue", "1", "2", "3")


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the hub's client has fetched, in its own layout; of another name each time, as names are remembered."""
    name = f"bert-{uuid.uuid4().hex}"
    model = tmp_path / "hub" / f"models--somebody--{name}"
    write_small_bert(model / "snapshots" / ("0" * 40), WORDS)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return f"somebody/{name}"


def links(where: Path, mentions: list[dsmip.Mention]) -> list[list[tuple[str, float]]]:
    return [[(link.entity_id, link.score) for link in found] for found in dsmip.load(where).link_many(mentions, top=11)]


def check_stands_alone(
    config: ExperimentConfig, data: Dataset, tmp_path: Path, gone: Path, options: ExportOptions
) -> None:
    """Its links are those of the run, when what the run reads is there no more."""
    run = finished_run(tmp_path / "run", config, data)
    mentions, notices = list(data.mentions("test")), list[str]()
    expected = links(run.folder, mentions)
    export_run(run.folder, tmp_path / "bundle", CPU, options, notice=notices.append)
    assert not any("hub" in notice for notice in notices)
    assert "| asked of the hub |" not in (tmp_path / "bundle" / CARD).read_text()
    shutil.rmtree(run.folder)
    shutil.rmtree(gone)
    found = links(tmp_path / "bundle", mentions)
    assert [[entity for entity, _ in each] for each in found] == [[entity for entity, _ in each] for each in expected]
    assert [score for each in found for _, score in each] == pytest.approx([s for each in expected for _, s in each])


@pytest.mark.parametrize("apart", [False, True])
def test_a_network_of_a_file_that_names_folders(apart: bool, small_data: Dataset, tmp_path: Path) -> None:
    """One for both, or one for the tokenizer, which needs no configuration of a network."""
    own = tmp_path / "own"
    own.mkdir()
    architecture = SMALL_BACKBONES["BERT"](own)
    if apart:
        (own / "tokenizer").mkdir()
        for path in (own / "bert").glob("*token*"):
            path.rename(own / "tokenizer" / path.name)
        network = json.loads(Path(architecture).read_text())
        network["text_cfg"]["hf_tokenizer_name"] = "./tokenizer"
        Path(architecture).write_text(json.dumps(network))
    options = ExportOptions(with_backbone=True)
    check_stands_alone(small_system("bert", architecture), small_data, tmp_path, own, options)


@pytest.mark.parametrize("kind", ["separate towers", "texts alone"])
def test_separate_towers_of_files(kind: str, small_data: Dataset, tmp_path: Path) -> None:
    """Their own weights are the backbone's, and not in the bundle a second time."""
    own = tmp_path / "own"
    own.mkdir()
    architecture = SMALL_BACKBONES[kind](own)
    config = small_system("bert", architecture)
    check_stands_alone(config, small_data, tmp_path, own, ExportOptions(with_backbone=True))
    inside = [path for path in (tmp_path / "bundle" / "files").rglob("*") if path.suffix == ".safetensors"]
    assert [path.name for path in inside] == ["backbone.safetensors"]


def test_a_tokenizer_of_the_hub_for_a_tower_of_open_clips(
    on_the_hub: str, small_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SigLIP has one, without a configuration beside it."""
    model = tmp_path / "hub" / f"models--{on_the_hub.replace('/', '--')}"
    (model / "snapshots" / ("0" * 40) / "config.json").unlink()
    (model / ".no_exist" / ("0" * 40)).mkdir(parents=True)  # as the client notes what it has asked for in vain
    (model / ".no_exist" / ("0" * 40) / "config.json").touch()
    network = {
        "embed_dim": 24,
        "text_cfg": {**TEXT, "vocab_size": 160, "hf_tokenizer_name": on_the_hub},
        "vision_cfg": VISION,
    }
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "siglip.json").write_text(json.dumps(network))
    config = small_system("bert", tmp_path / "own" / "siglip.json")
    monkeypatch.chdir(tmp_path)
    check_stands_alone(config, small_data, tmp_path, tmp_path / "hub", ExportOptions(with_backbone=True))


@pytest.mark.parametrize("pair", [False, True])
def test_a_text_tower_of_the_hub(*, pair: bool, on_the_hub: str, small_data: Dataset, tmp_path: Path) -> None:
    vision = SMALL_BACKBONES["pictures alone"](tmp_path) if pair else ""
    config = small_system("bert", f"hf:{on_the_hub} + {vision} + 24" if pair else f"hf:{on_the_hub}")
    check_stands_alone(config, small_data, tmp_path, tmp_path / "hub", ExportOptions(with_backbone=True))


def test_without_its_weights_the_hub_is_still_asked(on_the_hub: str, small_data: Dataset, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", small_system("bert", f"hf:{on_the_hub}"), small_data)
    notices = list[str]()
    export_run(run.folder, tmp_path / "bundle", CPU, notice=notices.append)
    assert f"opening it asks the hub for {on_the_hub}; --with-backbone puts that in" in notices
    assert f"| asked of the hub | {on_the_hub}, when" in (tmp_path / "bundle" / CARD).read_text()


def test_a_networks_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    network = read_architecture("ViT-B-16-SigLIP")  # of other pictures than CLIP's
    (tmp_path / "network.json").write_text(json.dumps(network.as_json()))
    again = read_architecture(str(tmp_path / "network.json"))
    assert (again.config, again.pixels, again.mean, again.std) == (
        network.config,
        network.pixels,
        network.mean,
        network.std,
    )
    assert network.pixels != read_architecture("ViT-B-32").pixels
