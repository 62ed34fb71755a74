"""Bytes that are forecast from a sample, against those of files that are written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.data.table import Ragged, Table, concatenate
from dsmip.encoders.feature_cache import encode_split, load_features
from dsmip.evaluation.preparation import prepare_entities, with_has_image
from dsmip.models import find_system, systems
from dsmip.planning.probing.parts import SIDES
from dsmip.planning.probing.probe import Meter, Sample, encoded, scored
from dsmip.planning.sizes import materialised, part_bytes
from dsmip.runs.checkpoints import Checkpoint, save_checkpoint
from dsmip.runs.load_config import parse_config
from dsmip.runs.loaded_model import TrainedParts
from dsmip.runs.weights import own_weights, save_weights
from dsmip.training.trainer import trained_state

CPU = torch.device("cpu")
SYSTEMS: dict[str, dict[str, Any]] = {
    "dsmip": {
        "width": 8,
        "gate": {"picture": "clip"},
        "experts": {"text": {}, "visual": {"tune": "full"}, "multimodal": {"prompt_length": 2, "prompt_depth": 2}},
    },
    "albef": {"layers": 1, "heads": 2, "masked_weight": 0.0},
    "blink": {
        "pooling": "tower",
        "markers": [],
        "num_tokens": 20,
        "template": {"mention": "{word}", "entity": "{name}"},
    },
    "bert": {"pooling": "tower", "markers": [], "template": {"mention": "{word}", "entity": "{name}"}},
    "dzmned": {"width": 16},
    "ghmfc": {"width": 16, "heads": 2},
}


ROUNDED = {"ghmfc": 1e-3, "m3el": 0.02, "mmoe": 0.02}
"""How far forecasts are off where items of one kind are not of one size; all others are exact."""


def cases() -> Iterator[Any]:
    for name, system in systems().items():
        section = parse_config(
            {"model": name, "backbone": {"architecture": "tiny"}, "system": SYSTEMS.get(name, {})}
        ).system
        for part in system.part_names(section):
            if part not in system.rerankers(section):
                yield pytest.param(name, part, id=f"{name}-{part}")


def config_of(name: str, backbone: Path) -> ExperimentConfig:
    return parse_config({"model": name, "backbone": {"architecture": str(backbone)}, "system": SYSTEMS.get(name, {})})


def tensor_bytes(path: Path) -> int:
    """Of a safetensors file, without its header."""
    with safe_open(path, framework="pt") as stored:
        return sum(each.numel() * each.element_size() for each in map(stored.get_tensor, stored.keys()))


@pytest.mark.parametrize(("name", "part"), [*cases()])
def test_tables_and_index_take_what_was_forecast(
    name: str, part: str, small_data: Dataset, narrow_backbone: Path, tmp_path: Path
) -> None:
    config = config_of(name, narrow_backbone)
    parts, meter, sample = TrainedParts(tmp_path, config), Meter(CPU, seconds=600), Sample.of(small_data)
    matcher = find_system(name).build_part(part, config, with_encoder=True)
    collator, pictured = parts.collator(part), small_data.manifest.entities_with_image
    found = {side: encoded(matcher, collator, sample, side, torch.float16, meter) for side in SIDES}
    path = tmp_path / "table.safetensors"

    def written() -> Any:
        return pytest.approx(tensor_bytes(path), rel=ROUNDED.get(name, 0.0), abs=0.0)

    encode_split(path, KB, matcher, small_data, collator, CPU, torch.float16)
    assert found["entities"].stored.of(small_data.num_entities, pictured) == written()
    kb = with_has_image(load_features([path]), small_data)
    encode_split(path, "train", matcher, small_data, collator, CPU, torch.float16)
    of_train = small_data.manifest.splits["train"]
    assert found["mentions"].stored.of(of_train.mentions, of_train.with_image) == written()

    tables = {side: (each.table, each.has_image_N) for side, each in found.items()}
    prepared = scored(matcher, tables, meter).prepared
    prepare_entities(matcher, kb, range(len(kb)), CPU).save(path)
    assert prepared["entities"].of_index(small_data.num_entities, pictured) == written()


@pytest.mark.parametrize(("name", "part"), [*cases()])
def test_weights_and_checkpoints_take_what_was_forecast(
    name: str, part: str, narrow_backbone: Path, tmp_path: Path
) -> None:
    """All but headers, and the optimizer's count of steps."""
    matcher = find_system(name).build_part(part, config_of(name, narrow_backbone), with_encoder=True)
    found = part_bytes(matcher)
    save_weights(tmp_path / "weights.safetensors", own_weights(matcher))
    assert found.stored == tensor_bytes(tmp_path / "weights.safetensors")
    trained = [each for each in matcher.parameters() if each.requires_grad]
    if not trained:
        assert found.trained == 0
        return
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for each in trained:
        each.grad = torch.ones_like(each)
    optimizer.step()
    state = trained_state(matcher)
    save_checkpoint(tmp_path / "c", Checkpoint(1, [], state, state, optimizer.state_dict(), {}, {}))
    written = sum(file.stat().st_size for file in (tmp_path / "c").iterdir())
    assert found.checkpoint <= written <= found.checkpoint + 2048 * (len(trained) + len(state) + 4)


def test_a_materialised_table_shares_nothing() -> None:
    lengths = torch.tensor([2, 0, 1])
    ragged = Ragged(torch.arange(6.0).view(3, 2), lengths.cumsum(0) - lengths, lengths)
    table = Table({"tokens": ragged, "vector": torch.tensor([[1.0], [2.0], [3.0]])})
    expected = concatenate([table, table.take(slice(0, 2))])
    found = materialised(table, 5)
    for name in ("values", "starts", "lengths"):
        assert torch.equal(getattr(found.ragged("tokens"), name), getattr(expected.ragged("tokens"), name))
    assert torch.equal(found.dense("vector"), expected.dense("vector"))
