"""The forecast: amounts worked out by hand, and what does not fit with the key to set."""

from dataclasses import replace
from pathlib import Path

import pytest

from dsmip.config import ExperimentConfig, TrainConfig
from dsmip.data.dataset import Dataset
from dsmip.encoders.base import Side
from dsmip.encoders.shared_tables.tables import LIMIT
from dsmip.errors import UserError
from dsmip.planning.amounts import Counts, minings_of, steps_of, training, validations_of
from dsmip.planning.disk import disk_problems, stored
from dsmip.planning.forecast import Forecaster
from dsmip.planning.machine import Machines, Node
from dsmip.planning.probing.parts import EncoderCosts, Kind, PartCosts, SystemCosts
from dsmip.planning.probing.probe import Cost
from dsmip.planning.probing.steps import Stepped
from dsmip.planning.rates import stated_node, stated_rates
from dsmip.planning.sizes import PartBytes, TableBytes
from dsmip.runs.load_config import parse_config

MIB = 1 << 20
COUNTS = Counts(100, 60, {"train": 50, "validation": 10, "test": 20}, {"train": 25, "validation": 5, "test": 10})


def config(**changes: object) -> ExperimentConfig:
    train = {"epochs": 6, "batch_size": 8, "validate_every": 4}
    return parse_config({"model": "clip", "backbone": {"architecture": "tiny"}, "train": train, **changes})


def part(kind: Kind = "towers") -> PartCosts:
    table: dict[Side, TableBytes] = {"mentions": TableBytes(item=1000), "entities": TableBytes(item=1000)}
    encode: dict[Side, Cost] = {"mentions": Cost(0.1), "entities": Cost(0.2)}
    own = kind == "towers"
    encoder = EncoderCosts(table, encode, 0, MIB, own, None if own else "clip")
    sizes = PartBytes(module=8 * MIB, trained=4 * MIB, state=4 * MIB, stored=4 * MIB)
    step = Stepped(Cost(3.0), 100 * MIB)
    return PartCosts("clip", kind, 10, 20, sizes, encoder, table, Cost(0.001), Cost(1e-4), step)


def forecaster(one: PartCosts, memory: int = 4000 * MIB) -> Forecaster:
    machines = Machines([Node("this machine", 1, 2.0, 0.0, memory)], process=400 * MIB, start=5.0, disk=None)
    return Forecaster(config(), SystemCosts({"clip": one}, None), None, COUNTS, machines)


def test_a_training_s_seconds_by_hand() -> None:
    """6 epochs of 7 steps of 3 s; two validations: entities of 0.2 s, mentions of 0.1 s, prepared, 1,000 pairs."""
    costs = SystemCosts({"clip": part()}, None)
    expected = 6 * 7 * 3.0 + 2 * (100 * 0.2 + 10 * 0.1 + 110 * 0.001 + 1000 * 1e-4)
    assert training(config(), part(), costs, COUNTS).seconds == pytest.approx(expected)


def test_steps_validations_and_minings() -> None:
    train = TrainConfig(epochs=7, batch_size=8, validate_every=3, hard_negatives=2, hard_negatives_every=2)
    assert (steps_of(50, train), validations_of(train), minings_of(train)) == (7, 3, 3)
    assert minings_of(train.model_copy(update={"hard_negatives": 0})) == 0


def test_memory_that_is_not_there_is_named_with_its_key() -> None:
    assert not forecaster(part()).forecast().problems
    (problem,) = [each for each in forecaster(part(), memory=1000 * MIB).forecast().problems if "train" in each.what]
    assert "1,000 MiB are free" in str(problem)
    assert "train.micro_batch_size to 4" in str(problem)


def test_a_worker_that_no_node_has_room_for() -> None:
    wanting = replace(forecaster(part()), config=config(parts={"clip": {"resources": {"cpu": 1, "gpu": 1}}}))
    (problem,) = wanting.forecast().problems
    assert str(problem) == (
        "clip asks for 1 CPU and 1 GPU a worker, which no node has: set parts.clip.resources.cpu and "
        "parts.clip.resources.gpu to what there is"
    )


def test_disk_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = SystemCosts({"clip": part("cached")}, None)
    files = stored(config(), costs, None, COUNTS, 0)
    sizes = {each.what: each.num_bytes for each in files}
    assert sizes["features of clip"] == 180_000  # 50 + 10 + 20 mentions and 100 entities
    assert sizes["index"] == 100_000
    assert sizes["checkpoints of parts"] == 2 * 16 * MIB
    assert not disk_problems(files, 10**9, config())
    (problem,) = disk_problems(files, 10**6, config())
    assert "checkpoints of parts" in problem.what
    assert "dsmip clean" in problem.remedy
    monkeypatch.setenv(LIMIT, "0.0001")
    (problem,) = disk_problems(files, None, config())
    assert LIMIT in problem.remedy


def test_stated_rates_name_their_sources_and_cards() -> None:
    rates = stated_rates()
    for name, machine in rates.machines.items():
        assert machine.source, name
        assert (machine.card is None) == (machine.gpus == 0), name
        assert machine.card is None or machine.card in rates.cards, name
    node, sources = stated_node("gpu", "g6.2xlarge", None, 8, 1, half=True)
    assert node.gpu_rate == pytest.approx(121e12 * rates.achieved)
    assert len(sources) == 2
    with pytest.raises(UserError, match=r"node type gpu: .*'g6.2xlargo' \(the nearest is g6.2xlarge\)"):
        stated_node("gpu", "g6.2xlargo", 1, None, None, half=False)


def test_a_card_s_work_takes_as_long_as_its_reading_at_least() -> None:
    node = Node("gpu", 1, 8.0, 1.0, None, None, cpu_rate=1e9, gpu_rate=1e12)
    assert node.seconds(Cost(5.0, 2e12, 0.5), on_gpu=True, threads=1) == pytest.approx(2.0)
    assert node.seconds(Cost(5.0, 2e12, 3.0), on_gpu=True, threads=1) == pytest.approx(3.0)
    assert node.seconds(Cost(5.0, 2e9, 1.0), on_gpu=False, threads=2) == pytest.approx(1.5)


def test_counts_are_those_of_the_manifest(small_data: Dataset, tmp_path: Path) -> None:
    counts = Counts.of(small_data)
    assert counts.items("kb") == (11, 8)
    assert counts.items("train")[0] == 23
