"""Text towers made of open_clip's `TextTransformer`: CLIP's, SigLIP's, CLIPA's, MobileCLIP's, CoCa's and others'.

Layers are open_clip's own blocks, called one by one, so that prompts come between them (DSMIP eqs. 6, 7).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsmip.encoders.towers.base import TextTower, TokenFeatures, TrunkFeatures, inserted, mask_with_prompts, replaced


class OpenClipText(TextTower):
    """The transformer inside a network: of `CustomTextCLIP` its `text`, of `CLIP` (which has the parts) itself.

    Tokens are those after the final norm; where a class token is appended (CoCa), before it, as in open_clip.
    """

    def __init__(self, clip: Any) -> None:
        text = getattr(clip, "text", clip)
        self._text = text
        self.layers = list(text.transformer.resblocks)
        self.width = int(text.token_embedding.embedding_dim)
        self.context_length = int(text.context_length)
        self._pool: str = text.pool_type if hasattr(text, "pool_type") else text.text_pool_type
        self._class_token: nn.Parameter | None = getattr(text, "cls_emb", None)
        self._projection: nn.Parameter | nn.Linear | None = text.text_projection
        self.is_causal = text.attn_mask is not None
        self.reads_padding = text.attn_mask is None or self._pool == "last" or self._class_token is not None

    @property
    def embedding(self) -> nn.Module:
        embedding: nn.Module = self._text.token_embedding
        return embedding

    @property
    def projection(self) -> list[nn.Parameter]:
        if self._projection is None:
            return []
        return [self._projection] if isinstance(self._projection, nn.Parameter) else list(self._projection.parameters())

    @property
    def parameters(self) -> list[nn.Parameter]:
        text = self._text
        inner = [p for module in (text.token_embedding, text.transformer, text.ln_final) for p in module.parameters()]
        own = [text.positional_embedding, *([] if self._class_token is None else [self._class_token])]
        return [*own, *inner, *self.projection]

    def trunk(
        self, token_ids: Tensor, mask: Tensor, prompts: Sequence[Tensor], *, hide_padding: bool = False
    ) -> TrunkFeatures:
        """See `TextTower.trunk`.

        Raises:
            ValueError: As `check_length`.
        """
        text, num_prompts = self._text, len(prompts[0]) if prompts else 0
        self.check_length(token_ids.shape[1], num_prompts)
        x = text.token_embedding(token_ids).to(text.transformer.get_cast_dtype())
        if prompts:
            x, mask = inserted(x, prompts[0], 1), mask_with_prompts(mask, num_prompts)
        if self._class_token is not None:
            x = torch.cat([x, self._class_token.to(x.dtype).expand(len(x), 1, -1)], dim=1)
        x = x + text.positional_embedding[: x.shape[1]].to(x.dtype)
        attn_mask = self._attention_mask(mask, x, hide_padding)
        for layer, block in enumerate(self.layers):
            if 0 < layer < len(prompts):
                x = replaced(x, prompts[layer], 1)
            x = block(x, attn_mask=attn_mask)
        if self._class_token is not None:
            return TrunkFeatures(text.ln_final(x[:, -1]), x[:, :-1], mask)
        x = text.ln_final(x)
        return TrunkFeatures(self._pooled(x, mask), x, mask)

    def project(self, features: TrunkFeatures) -> TokenFeatures:
        """See `Tower.project`."""
        return TokenFeatures.of(self._projected(features.unprojected), features.tokens, features.mask)

    def _attention_mask(self, mask: Tensor, x: Tensor, hide_padding: bool) -> Tensor | None:
        """Additive: [T, T], or with hidden padding [N * heads, T, T]; None: all places see one another."""
        length, causal = x.shape[1], self._text.attn_mask
        if causal is not None:
            causal = causal[:length, :length]
        seen = mask
        if self._class_token is not None:
            # open_clip's published CoCa networks were trained with the class token's own place in front
            own = mask.new_ones(len(mask), 1)
            seen = torch.cat([mask, own] if self._text.correct_cls_mask else [own, mask], dim=1)
        elif not hide_padding or causal is None:
            return causal  # type: ignore[no-any-return]
        hidden_NLL = causal.masked_fill(~seen[:, None, :], -torch.inf)
        return hidden_NLL.to(x.dtype).repeat_interleave(self._text_heads(), dim=0)  # type: ignore[no-any-return]

    def _text_heads(self) -> int:
        block: Any = self.layers[0]
        return int(block.attn.num_heads)

    def _pooled(self, x: Tensor, mask: Tensor) -> Tensor:
        if self._pool == "first":
            return x[:, 0]
        if self._pool == "last":
            return x[:, -1]
        return x[torch.arange(len(x), device=x.device), mask.sum(dim=1) - 1]  # end of text, by its id or as the highest

    def _projected(self, pooled: Tensor) -> Tensor:
        if self._projection is None:
            return pooled
        projected: Tensor = (
            pooled @ self._projection if isinstance(self._projection, nn.Parameter) else self._projection(pooled)
        )
        return projected
