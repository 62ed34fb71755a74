"""The contract of towers: what every text tower and every vision tower gives, whichever library its layers are from.

Shapes: N items, L text tokens, T tokens that a tower returns, r prompts per layer, S picture side; d_t text width, d_v
vision width, d_z projection width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class TokenFeatures:
    """Features of N texts or pictures, at least float32.

    Attributes:
        pooled: [N, d_z], as the network's own contrastive loss takes it.
        tokens: [N, T, width] of the last layer.
        mask: bool [N, T], True where a token is not padding.
    """

    pooled: Tensor
    tokens: Tensor
    mask: Tensor

    @staticmethod
    def of(pooled: Tensor, tokens: Tensor, mask: Tensor | None = None) -> "TokenFeatures":
        """Half-precision features are widened; without a mask every token is real."""
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return TokenFeatures(at_least_float32(pooled), at_least_float32(tokens), mask)

    def none(self) -> "TokenFeatures":
        """Of no item, in the form and with the graph of these."""
        return TokenFeatures(self.pooled[:0], self.tokens[:0], self.mask[:0])


@dataclass(frozen=True, slots=True)
class TrunkFeatures:
    """What a tower says of N texts or pictures before its projection.

    Attributes:
        unprojected: [N, ...], what the projection takes.
        tokens: [N, T, width] of the last layer.
        mask: bool [N, T], as in `TokenFeatures`; None: every token is real.
    """

    unprojected: Tensor
    tokens: Tensor
    mask: Tensor | None = None


class TrunkKeeper(Protocol):
    """What knows what trunks that do not train say of a batch (`dsmip.training.validation.kept_trunks`).

    Attributes:
        has_no_images: The batch was made without its pictures: what vision trunks say of them is kept.
    """

    has_no_images: bool

    def __call__(self, tower: str, trunk: Callable[[], TrunkFeatures]) -> TrunkFeatures:
        """What is kept of a tower's trunk, or what it says now.

        Args:
            tower: Its name.
            trunk: Runs it.
        """


class Tower(ABC):
    """One side of a network. It owns no weights: it knows where they are in the network, and in which order they run.

    Attributes:
        name: In messages.
        width: Of its tokens.
        layers: Those that prompts can be put into; none where prompts have no place.
        no_prompts: Why prompts have no place in it; empty where they have.
        is_absent: The network has no such side.
    """

    name: ClassVar[str]
    is_absent: ClassVar[bool] = False
    width: int
    layers: Sequence[nn.Module] = ()
    no_prompts: str = ""

    @property
    @abstractmethod
    def projection(self) -> list[nn.Parameter]:
        """What maps its pooled vector to the shared space; empty where nothing does."""

    @property
    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """All of its own, the projection too."""

    @property
    def trunk_trains(self) -> bool:
        """Whether a parameter besides the projection's does."""
        projection = {id(parameter) for parameter in self.projection}
        return any(each.requires_grad for each in self.parameters if id(each) not in projection)

    @abstractmethod
    def project(self, features: TrunkFeatures) -> TokenFeatures:
        """What the projection makes of the trunk's features."""

    def prompt_fault(self, depth: int) -> str | None:
        """Why prompts in so many layers have no place in it."""
        if depth and self.no_prompts:
            return f"prompts have no place in the {self.name} tower: {self.no_prompts}"
        if depth > len(self.layers):
            return f"prompt depth {depth} exceeds the {len(self.layers)} layers of the {self.name} tower"
        return None


class TextTower(Tower):
    """A text tower.

    Attributes:
        context_length: Places that tokens and prompts share.
        reads_padding: Padding changes what it says of a text (no causal mask hides it, or the last place is pooled): a
            text must fill the context, as in its training.
        is_causal: A place sees those before it alone: the first one says nothing of a text.
    """

    name = "text"
    context_length: int
    reads_padding: bool = False
    is_causal: bool = False

    def encode(
        self, token_ids: Tensor, mask: Tensor, prompts: Sequence[Tensor], *, hide_padding: bool = False
    ) -> TokenFeatures:
        """`project` of `trunk`."""
        return self.project(self.trunk(token_ids, mask, prompts, hide_padding=hide_padding))

    @abstractmethod
    def trunk(
        self, token_ids: Tensor, mask: Tensor, prompts: Sequence[Tensor], *, hide_padding: bool = False
    ) -> TrunkFeatures:
        """Features of texts before the projection; prompts stand right after the first token.

        Args:
            token_ids: int64 [N, L], padding as the network's tokenizer writes it.
            mask: bool [N, L], False at padding.
            prompts: [r, d_t] for each of the first layers.
            hide_padding: No place attends to padding; towers that cannot read it otherwise ignore this.
        """

    @property
    @abstractmethod
    def embedding(self) -> nn.Module:
        """Its input embeddings: int64 [...] to [..., d_t]."""

    def check_length(self, num_tokens: int, num_prompts: int) -> None:
        """Checks the places that a text takes.

        Raises:
            ValueError: Tokens and prompts exceed the context, or do not fill one that must be full.
        """
        if num_tokens + num_prompts > self.context_length:
            raise ValueError(
                f"{num_tokens} tokens and {num_prompts} prompts exceed the context length {self.context_length}: "
                f"tokenize with reserve={num_prompts}"
            )
        if self.reads_padding and num_tokens + num_prompts < self.context_length:
            raise ValueError(
                f"{num_tokens} tokens and {num_prompts} prompts do not fill the context of {self.context_length}, which"
                " this tower reads whole: leave padding in place"
            )


class VisionTower(Tower):
    """A vision tower.

    Attributes:
        image_size: S, side of the square pictures.
    """

    name = "vision"
    image_size: int

    def encode(self, pixels: Tensor, prompts: Sequence[Tensor]) -> TokenFeatures:
        """`project` of `trunk`."""
        return self.project(self.trunk(pixels, prompts))

    @abstractmethod
    def trunk(self, pixels: Tensor, prompts: Sequence[Tensor]) -> TrunkFeatures:
        """Features of pictures before the projection; prompts stand after all other tokens.

        Args:
            pixels: float [N, 3, S, S], normalised.
            prompts: [r, d_v] for each of the first layers.
        """


def inserted(x: Tensor, prompts_rd: Tensor, slot: int) -> Tensor:
    """[N, T + r, d]: `x` [N, T, d] with prompts [r, d] from place `slot` on."""
    return torch.cat([x[:, :slot], _batched(prompts_rd, x), x[:, slot:]], dim=1)


def replaced(x: Tensor, prompts_rd: Tensor, slot: int) -> Tensor:
    """[N, T, d]: `x` with the prompts of another layer in place of those from `slot` on (DSMIP eq. 7)."""
    return torch.cat([x[:, :slot], _batched(prompts_rd, x), x[:, slot + len(prompts_rd) :]], dim=1)


def _batched(prompts_rd: Tensor, x: Tensor) -> Tensor:
    return prompts_rd.to(x.dtype).expand(len(x), -1, -1)


def channels_last(pixels: Tensor) -> Tensor:
    """The same pictures, laid out as convolutional networks read them fastest: each place's channels side by side."""
    return pixels.contiguous(memory_format=torch.channels_last)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision widened, all else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mask_with_prompts(mask: Tensor, num_prompts: int) -> Tensor:
    """bool [N, L + r]: prompts, which stand after the first token, are real."""
    return torch.cat([mask.new_ones(len(mask), num_prompts), mask], dim=1)
