"""Vision towers made of a timm network with a projection, as in open_clip's `TimmModel` (SigLIP, EVA, ConvNeXt)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dsmip.encoders.towers.base import TokenFeatures, TrunkFeatures, VisionTower, channels_last, inserted, replaced


class TimmVision(VisionTower):
    """A `trunk` and a `head`: tokens are the trunk's features, the places of a feature map one after the other.

    Prompts go into trunks that are plain transformers: behind all tokens, without a position, unseen by the pooling.
    """

    def __init__(self, visual: Any) -> None:
        from timm.models.eva import Eva
        from timm.models.vision_transformer import VisionTransformer

        self._visual = visual
        trunk = visual.trunk
        self.width = int(trunk.num_features)
        self.image_size = int(visual.image_size[0])
        if isinstance(trunk, VisionTransformer | Eva):
            self.layers = list(trunk.blocks)
        elif hasattr(trunk, "rel_pos_bias") or hasattr(trunk, "shared_rel_pos"):
            self.no_prompts = "its attention knows positions of patches only"
        else:
            self.no_prompts = f"{type(trunk).__name__} has no one sequence of tokens through its layers"

    @property
    def projection(self) -> list[nn.Parameter]:
        return list(self._visual.head.parameters())

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._visual.parameters())

    def trunk(self, pixels: Tensor, prompts: Sequence[Tensor]) -> TrunkFeatures:
        """See `VisionTower.trunk`."""
        trunk = self._visual.trunk
        if prompts:
            with _prompted(self.layers, prompts) as after:
                features = trunk.forward_features(pixels)
            tokens = torch.cat([features, trunk.norm(after[0])], dim=1)
        else:
            features = trunk.forward_features(pixels if self.layers else channels_last(pixels))
            tokens = _tokens(features, self.width)
        return TrunkFeatures(trunk.forward_head(features), tokens)

    def project(self, features: TrunkFeatures) -> TokenFeatures:
        """See `Tower.project`."""
        return TokenFeatures.of(self._visual.head(features.unprojected), features.tokens)


def _tokens(features: Tensor, width: int) -> Tensor:
    """[N, T, d] of a sequence, or of a feature map with its channels first or last."""
    if features.ndim == 3:
        return features
    if features.shape[-1] == width and features.shape[1] != width:
        return features.flatten(1, 2)
    return features.flatten(2).transpose(1, 2)


@contextmanager
def _prompted(layers: Sequence[nn.Module], prompts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The layers with prompts behind their tokens; after a pass the list holds what the last layer made of these."""
    after: list[Tensor] = []
    num_prompts = len(prompts[0])

    def before(layer: int) -> Any:
        def put(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
            x = arguments[0]
            if layer == 0:
                x = inserted(x, prompts[0], x.shape[1])
            elif layer < len(prompts):
                x = replaced(x, prompts[layer], x.shape[1] - num_prompts)
            if options.get("rope") is not None:
                options = options | {"rope": _without_position(options["rope"], num_prompts)}
            return (x, *arguments[1:]), options

        return put

    def take(_: nn.Module, __: Any, x: Tensor) -> Tensor:
        after[:] = [x[:, -num_prompts:]]
        return x[:, :-num_prompts]

    hooks = [block.register_forward_pre_hook(before(n), with_kwargs=True) for n, block in enumerate(layers)]
    hooks.append(layers[-1].register_forward_hook(take))
    try:
        yield after
    finally:
        for hook in hooks:
            hook.remove()


def _without_position(rope: Tensor, count: int) -> Tensor:
    """Rotary embeddings (sines, then cosines, of each place) with `count` more places that rotate nothing."""
    half = rope.shape[-1] // 2
    still = torch.cat([rope.new_zeros(half), rope.new_ones(half)])
    return torch.cat([rope, still.expand(*rope.shape[:-2], count, -1)], dim=-2)
