"""Towers that a network does not have: a text encoder alone sees no pictures, a picture network reads no texts.

Whatever asks for their features is a mistake of the program: configurations that need them are refused.
"""

from collections.abc import Sequence
from typing import ClassVar, NoReturn

from torch import Tensor, nn

from dsmip.encoders.towers.base import TextTower, TrunkFeatures, VisionTower


class AbsentText(TextTower):
    """No text tower. Texts of items are empty then, and are read by nothing."""

    is_absent: ClassVar[bool] = True
    no_prompts = "the backbone has no such tower"
    width = 0
    context_length = 77

    @property
    def projection(self) -> list[nn.Parameter]:
        return []

    @property
    def parameters(self) -> list[nn.Parameter]:
        return []

    @property
    def embedding(self) -> nn.Module:
        raise RuntimeError("this backbone has no text tower")

    def trunk(
        self, token_ids: Tensor, mask: Tensor, prompts: Sequence[Tensor], *, hide_padding: bool = False
    ) -> NoReturn:
        """There is nothing to give.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("this backbone has no text tower")

    def project(self, features: TrunkFeatures) -> NoReturn:
        """As `trunk`."""
        raise RuntimeError("this backbone has no text tower")


class AbsentVision(VisionTower):
    """No vision tower. Pictures of items are single pixels then, and are seen by nothing."""

    is_absent: ClassVar[bool] = True
    no_prompts = "the backbone has no such tower"
    width = 0
    image_size = 1

    @property
    def projection(self) -> list[nn.Parameter]:
        return []

    @property
    def parameters(self) -> list[nn.Parameter]:
        return []

    def trunk(self, pixels: Tensor, prompts: Sequence[Tensor]) -> NoReturn:
        """There is nothing to give.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("this backbone has no vision tower")

    def project(self, features: TrunkFeatures) -> NoReturn:
        """As `trunk`."""
        raise RuntimeError("this backbone has no vision tower")
