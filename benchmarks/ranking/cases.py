"""Cases of the ranking benchmark: systems with random weights on random features, the same in every run.

Sizes are those of ViT-B/32 with the papers' units: text 512, picture 768, pooled 512, unit width 96.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsmip.config import ExperimentConfig
from dsmip.data.collate import Modality
from dsmip.data.table import Column, Ragged, Table
from dsmip.encoders.base import FeatureSizes, feature_sizes
from dsmip.encoders.image_networks import find_network
from dsmip.models import find_system
from dsmip.models.dsmip import GATE, DsmipMatcher
from dsmip.runs.load_config import parse_config
from dsmip.units.expert import READS
from dsmip.units.matcher import Matcher

IMAGE_TOKENS = 50  # 7 x 7 patches and the class token
FEWEST_TOKENS, MEAN_TOKENS = 4, 22
BLOCK = 512
Side = Literal["mentions", "entities"]


@dataclass(frozen=True)
class Case:
    """masked: texts are of different lengths (mean 22) and padding is masked. The published logic attends over padding,
    so that is another function than the one it computes.

    scoring: of DSMIP; `mixture` is fused from all experts' distributions, by a gate that sees how sure they are.
    architecture: a name or a JSON file. width: of the units.
    """

    name: str
    model: Literal["mimic", "dsmip", "mmoe"]
    num_tokens: int
    masked: bool = False
    scoring: Literal["choice", "mixture"] = "choice"
    architecture: str = "ViT-B-32"
    width: int = 96

    @property
    def config(self) -> ExperimentConfig:
        system: dict[str, Any] = {"width": self.width}
        if self.model != "mmoe":
            system["mask_padding"] = self.masked
        if self.model != "dsmip":
            system["num_tokens"] = self.num_tokens
        if self.scoring == "mixture":
            system["gate"] = {"preset": "confidence", "picture": "clip"}
        return parse_config({"model": self.model, "backbone": {"architecture": self.architecture}, "system": system})

    @property
    def sizes(self) -> FeatureSizes:
        return feature_sizes(self.architecture)

    @property
    def choices(self) -> tuple[str, ...]:
        """Names of the experts that the gate chooses from or fuses; none of a system without a gate."""
        return find_system(self.model).choices(self.config.system)


CASES = {
    case.name: case
    for case in (
        Case("mimic-40", "mimic", 40),
        Case("mimic-77", "mimic", 77),
        Case("dsmip-padded", "dsmip", 77),
        Case("dsmip-ragged", "dsmip", 77, masked=True),
    )
}


def build_matcher(case: Case, device: torch.device) -> Matcher:
    """The system without towers. Norms are moved off 1 and 0; the gate is centred, else one expert gets every pair."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        matcher = find_system(case.model).build_whole(case.config)
        with torch.no_grad():
            for module in matcher.modules():
                if isinstance(module, nn.LayerNorm):
                    module.weight.add_(0.1 * torch.randn_like(module.weight))
                    module.bias.add_(0.1 * torch.randn_like(module.bias))
    matcher = matcher.to(device).eval()
    if isinstance(matcher, DsmipMatcher):
        _centre_gate(matcher, case)
    return matcher


def feature_blocks(case: Case, side: Side, count: int, device: torch.device) -> Iterator[tuple[Table, Table]]:
    """Features of `count` items in blocks of up to 512: with all token places, and with each text's own length.

    Both share their tensors; they are the same table unless the case is masked.
    """
    for start in range(0, count, BLOCK):
        generator = torch.Generator(device).manual_seed(2 * start + (side == "entities"))
        size = min(BLOCK, count - start)
        full = _features(case, size, generator)
        yield full, _shortened(full, _lengths(size, case.num_tokens, generator)) if case.masked else full


def _features(case: Case, count: int, generator: torch.Generator) -> Table:
    if case.model != "dsmip":
        return _expert_features(case, ("text", "image"), count, generator)
    sees_items = case.config.system.gate.sees_items
    features = _gate_features(case, count, generator).prefixed(GATE) if sees_items else Table({})
    for name in case.choices:
        expert = _expert_features(case, READS[name].mentions, count, generator)
        features = features.merged(expert.prefixed(name))
    return features


def _expert_features(case: Case, modalities: Sequence[Modality], count: int, generator: torch.Generator) -> Table:
    sizes = case.sizes
    columns: dict[str, Column] = {}
    for modality in modalities:
        tokens, width = (
            (case.num_tokens, sizes.text_width) if modality == "text" else (IMAGE_TOKENS, sizes.vision_width)
        )
        columns[f"{modality}_global"] = _normal(generator, count, sizes.embed_width)
        columns[f"{modality}_tokens"] = Ragged.from_padded(_normal(generator, count, tokens, width))
    return Table(columns)


def _gate_features(case: Case, count: int, generator: torch.Generator) -> Table:
    sizes = case.sizes
    image_width = find_network(case.config.system.gate.picture).width(sizes)
    return Table(
        {"text": _normal(generator, count, sizes.text_width), "picture": _normal(generator, count, image_width)}
    )


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _lengths(count: int, longest: int, generator: torch.Generator) -> Tensor:
    """int64 [N] with a mean of about 22: most texts are short, few fill the context."""
    extra_N = torch.empty(count, device=generator.device).exponential_(generator=generator)
    return (FEWEST_TOKENS + (MEAN_TOKENS - FEWEST_TOKENS) * extra_N).round().long().clamp(max=longest)


def _shortened(features: Table, lengths_N: Tensor) -> Table:
    columns = dict(features.columns)
    for name, column in columns.items():
        if isinstance(column, Ragged) and name.endswith("text_tokens"):
            columns[name] = Ragged(column.values, column.starts, lengths_N)
    return Table(columns)


@torch.no_grad()
def _centre_gate(matcher: DsmipMatcher, case: Case) -> None:
    """Shifts the logits' bias so that over random items no expert is ahead of another on average."""
    gate = matcher.gate
    bias_B = gate.mention_logits.bias
    inputs = _gate_features(case, BLOCK, torch.Generator(bias_B.device).manual_seed(1))
    for prepare in (gate.prepare_mentions, gate.prepare_entities):
        bias_B.sub_(prepare(inputs).dense("logits").mean(dim=0))
