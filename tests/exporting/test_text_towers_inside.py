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
from tests.support.encoders.small_backbones import SMALL_BACKBONES
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
    assert "| tokenizer |" not in (tmp_path / "bundle" / CARD).read_text()
    shutil.rmtree(run.folder)
    shutil.rmtree(gone)
    found = links(tmp_path / "bundle", mentions)
    assert [[entity for entity, _ in each] for each in found] == [[entity for entity, _ in each] for each in expected]
    assert [score for each in found for _, score in each] == pytest.approx([s for each in expected for _, s in each])


def test_a_network_of_a_file_that_names_a_folder(small_data: Dataset, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    architecture = SMALL_BACKBONES["BERT"](tmp_path / "own")
    options = ExportOptions(with_backbone=True)
    check_stands_alone(small_system("bert", architecture), small_data, tmp_path, tmp_path / "own", options)


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
    assert f"| tokenizer | of {on_the_hub} on the hub" in (tmp_path / "bundle" / CARD).read_text()


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
