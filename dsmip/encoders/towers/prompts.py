"""Interactive prompts: learned text prompts per layer, and visual prompts made from them (DSMIP eqs. 6-8).

r prompts per layer, J layers, d_t text width, d_v vision width. Layers are counted from 0 here (the paper: from 1).
"""

import math

import torch
from torch import Tensor, nn


class InteractivePrompts(nn.Module):
    """One set of prompts: J tables of r x d_t and J couplings d_t -> d_v with bias.

    A set belongs to one side: mentions and entities have one each. With r = 0 or J = 0 it is empty, and the towers
    then compute exactly what they compute without prompts.

    Args:
        num_prompts: r, prompts per layer.
        depth: J, number of layers whose inputs get prompts of their own.
        text_width: d_t.
        vision_width: d_v; None: there are text prompts alone, and nothing couples.
        generator: source of the initial values (None: torch's global one).

    Raises:
        ValueError: negative number or depth.
    """

    def __init__(
        self,
        num_prompts: int,
        depth: int,
        text_width: int,
        vision_width: int | None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_prompts < 0 or depth < 0:
            raise ValueError(f"num_prompts {num_prompts} and depth {depth} must not be negative")
        empty = num_prompts == 0 or depth == 0
        self.num_prompts = 0 if empty else num_prompts
        self.depth = 0 if empty else depth
        self.tables_Jrt = nn.Parameter(torch.empty(self.depth, self.num_prompts, text_width), requires_grad=not empty)
        coupled = () if vision_width is None else (vision_width,) * self.depth
        self.couplings = nn.ModuleList(nn.Linear(text_width, width) for width in coupled)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Prompts from N(0, 0.02); couplings uniform in +-1/sqrt(d_t), as a linear layer starts."""
        self.tables_Jrt.normal_(0.0, 0.02, generator=generator)
        bound = 1.0 / math.sqrt(max(self.tables_Jrt.shape[2], 1))
        for parameter in self.couplings.parameters():
            parameter.uniform_(-bound, bound, generator=generator)

    @property
    def has_image_prompts(self) -> bool:
        return len(self.couplings) > 0

    def text_prompts(self, layer: int) -> Tensor:
        """[r, d_t] prompts for the text tower's layer `layer` (0 .. J-1)."""
        return self.tables_Jrt[layer]

    def image_prompts(self, layer: int) -> Tensor:
        """[r, d_v] prompts for the vision tower's layer `layer`: that layer's text prompts, coupled (eq. 8)."""
        prompts: Tensor = self.couplings[layer](self.text_prompts(layer))
        return prompts
