"""Learning rate schedule and parameter groups."""

import pytest
from torch import nn

from dsmip.config import OptimizerConfig, TrainConfig
from dsmip.training.optimizer import build_optimizer, learning_rate_factor


def test_the_first_step_of_warm_up_trains() -> None:
    config = TrainConfig(warmup_steps=4)
    assert [learning_rate_factor(step, 10, config) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_goes_down_to_zero() -> None:
    config = TrainConfig(schedule="cosine", warmup_steps=2)
    factors = [learning_rate_factor(step, 10, config) for step in range(11)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.5)
    assert factors[10] == pytest.approx(0.0)
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert learning_rate_factor(5, 2, config) == pytest.approx(0.0)  # warm-up longer than the training


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"backbone": nn.Linear(2, 2)})
        self.unit = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_parameter_groups() -> None:
    """Towers have their rate, vectors no decay, frozen parameters no place."""
    towers = Towers()
    config = TrainConfig(learning_rate=0.1, tower_learning_rate=0.01, weight_decay=0.5)
    groups = build_optimizer(towers, config, {"encoder.backbone.weight", "encoder.backbone.bias"}).param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    backbone = towers.encoder["backbone"]
    assert isinstance(backbone, nn.Linear)
    assert found == {
        id(backbone.weight): (0.01, 0.5),
        id(backbone.bias): (0.01, 0.0),
        id(towers.unit.weight): (0.1, 0.5),
        id(towers.unit.bias): (0.1, 0.0),
    }


def test_the_published_rule_spares_biases_alone() -> None:
    module = nn.ModuleDict({"norm": nn.LayerNorm(2), "attention": nn.MultiheadAttention(2, 1)})
    published = OptimizerConfig(betas=(0.8, 0.9), eps=1e-4, decay="all_but_biases")
    config = TrainConfig(learning_rate=0.1, weight_decay=0.5, optimizer=published)
    optimizer = build_optimizer(module, config)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    spared = {name for name, parameter in module.named_parameters() if decays[id(parameter)] == 0.0}
    assert spared == {"norm.bias", "attention.in_proj_bias", "attention.out_proj.bias"}
    assert all((group["betas"], group["eps"]) == ((0.8, 0.9), 1e-4) for group in optimizer.param_groups)
