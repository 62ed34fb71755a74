"""Text towers made of a Hugging Face encoder (BERT, RoBERTa, XLM-R, T5, NLLB), as in open_clip's `HFTextEncoder`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dsmip.encoders.towers.base import TextTower, TokenFeatures, TrunkFeatures, inserted, mask_with_prompts, replaced

_LAYERS = ("layer", "layers", "block")  # of an encoder, in the library's families


class HuggingFaceText(TextTower):
    """An encoder with a pooler and a projection (`transformer`, `pooler`, `proj`).

    Padding is hidden from attention. Prompts are embeddings after the first token; positions go on behind them.

    Args:
        text: The network's text side.
        context_length: Places that texts may take.
    """

    def __init__(self, text: Any, context_length: int) -> None:
        self._text = text
        self.context_length = context_length
        self.layers = list(_encoder_layers(text.transformer))
        self.width = int(self.embedding.embedding_dim)

    @property
    def embedding(self) -> Any:
        return self._text.transformer.get_input_embeddings()

    @property
    def projection(self) -> list[nn.Parameter]:
        return list(self._text.proj.parameters())

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._text.parameters())

    def trunk(
        self, token_ids: Tensor, mask: Tensor, prompts: Sequence[Tensor], *, hide_padding: bool = False
    ) -> TrunkFeatures:
        """See `TextTower.trunk`.

        Raises:
            ValueError: As `check_length`.
        """
        num_prompts = len(prompts[0]) if prompts else 0
        self.check_length(token_ids.shape[1], num_prompts)
        if not prompts:
            found = self._text.transformer(input_ids=token_ids, attention_mask=mask.long())
        else:
            mask = mask_with_prompts(mask, num_prompts)
            x = inserted(self.embedding(token_ids), prompts[0], 1)
            with _deeper_prompts(self.layers, prompts):
                found = self._text.transformer(inputs_embeds=x, attention_mask=mask.long())
        return TrunkFeatures(self._text.pooler(found, mask.long()), found.last_hidden_state, mask)

    def project(self, features: TrunkFeatures) -> TokenFeatures:
        """See `Tower.project`."""
        return TokenFeatures.of(self._text.proj(features.unprojected), features.tokens, features.mask)


def _encoder_layers(transformer: Any) -> Any:
    encoder = getattr(transformer, "encoder", transformer)
    return next(getattr(encoder, name) for name in _LAYERS if hasattr(encoder, name))


@contextmanager
def _deeper_prompts(layers: Sequence[nn.Module], prompts: Sequence[Tensor]) -> Iterator[None]:
    """Layers 1 .. J-1 find their own prompts in the places after the first token (DSMIP eq. 7)."""

    def own_prompts(prompts_rd: Tensor) -> Any:
        def replace(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return replaced(arguments[0], prompts_rd, 1), *arguments[1:]

        return replace

    hooks = [
        block.register_forward_pre_hook(own_prompts(prompts_rd))
        for block, prompts_rd in zip(layers[1:], prompts[1:], strict=False)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
