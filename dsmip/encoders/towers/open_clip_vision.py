"""Vision towers of open_clip's own: its `VisionTransformer` (CLIP's, CLIPA's, CoCa's) and CLIP's ResNets."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dsmip.encoders.towers.base import TokenFeatures, TrunkFeatures, VisionTower, channels_last, inserted, replaced


class OpenClipVision(VisionTower):
    """A `VisionTransformer`: tokens before the last norm, first the class token, then patches, then prompts (eq. 8).

    Whatever pools the tokens does not see the prompts' own places; a class token has seen them in every layer.
    """

    def __init__(self, visual: Any) -> None:
        self._visual = visual
        self.layers = list(visual.transformer.resblocks)
        self.width = int(visual.class_embedding.shape[0])
        self.image_size = _side(visual.image_size)

    @property
    def projection(self) -> list[nn.Parameter]:
        return [] if self._visual.proj is None else [self._visual.proj]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._visual.parameters())

    def trunk(self, pixels: Tensor, prompts: Sequence[Tensor]) -> TrunkFeatures:
        """See `VisionTower.trunk`."""
        visual = self._visual
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = inserted(x, visual.class_embedding[None], 0) + visual.positional_embedding.to(x.dtype)
        num_own = x.shape[1]
        if prompts:
            x = inserted(x, prompts[0], num_own)
        x = visual.ln_pre(x)
        for layer, block in enumerate(self.layers):
            if 0 < layer < len(prompts):
                x = replaced(x, prompts[layer], num_own)
            x = block(x)
        if visual.attn_pool is None and visual.pool_type == "tok":
            pooled = visual.ln_post(x[:, 0])  # a backward pass then keeps one token, not all
        else:
            pooled, _ = visual._pool(x[:, :num_own])
        return TrunkFeatures(pooled, x)

    def project(self, features: TrunkFeatures) -> TokenFeatures:
        """See `Tower.project`."""
        pooled, projection = features.unprojected, self._visual.proj
        return TokenFeatures.of(pooled if projection is None else pooled @ projection, features.tokens)


class ResNetVision(VisionTower):
    """CLIP's `ModifiedResNet`: tokens are the places of the last feature map, pooled by its attention."""

    no_prompts = "it is a convolutional network, which has no tokens between its layers"

    def __init__(self, visual: Any) -> None:
        self._visual = visual
        self.width = int(visual.attnpool.c_proj.in_features)
        self.image_size = _side(visual.image_size)

    @property
    def projection(self) -> list[nn.Parameter]:
        return list(self._visual.attnpool.c_proj.parameters())

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._visual.parameters())

    def trunk(self, pixels: Tensor, prompts: Sequence[Tensor]) -> TrunkFeatures:
        """See `VisionTower.trunk`: the whole map goes to the projection, which is the attention's own."""
        visual = self._visual
        x = visual.stem(channels_last(pixels))
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = stage(x)
        return TrunkFeatures(x, x.flatten(2).transpose(1, 2))

    def project(self, features: TrunkFeatures) -> TokenFeatures:
        """See `Tower.project`."""
        return TokenFeatures.of(self._visual.attnpool(features.unprojected), features.tokens)


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, tuple) else size)
