"""A backbone of separate towers, as a configuration names it: an `hf:` and a `timm:` name, or one of them alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

TOWER_KEYS = ("text", "vision", "embed_dim", "image_size")
"""Keys of a configuration's `backbone` that stand in place of `architecture`."""
EMBED_DIM = 256
_TEXT, _VISION = re.compile(r"hf:(\S.*)"), re.compile(r"timm:([^@\s]+)(?:@(\S.*))?")
_PAIR = re.compile(r"(hf:\S.*) \+ (timm:\S.*) \+ ([1-9]\d*)")
_SIZED = re.compile(r"(.*timm:.*) \+ ([1-9]\d*)px")


@dataclass(frozen=True, slots=True)
class SeparateTowers:
    """Two towers and what joins them, or one. Its text stands wherever an architecture has a name.

    Attributes:
        text: A model of Hugging Face's hub, or a folder; None: there are pictures alone.
        vision: A network of timm's list; None: there are texts alone.
        vision_file: Its weights, where they are not timm's own.
        embed_dim: Width of the shared space; None: one tower has the space that it was trained in.
        image_size: Side of the pictures that the vision tower is given; None: that of its weights.

    >>> pair = SeparateTowers("models/minilm", "resnet18", None, 256)
    >>> str(pair)
    'hf:models/minilm + timm:resnet18 + 256'
    >>> SeparateTowers.parsed(str(pair)) == pair
    True
    >>> SeparateTowers.parsed("hf:bert-base-uncased").vision is None
    True
    """

    text: str | None
    vision: str | None = None
    vision_file: str | None = None
    embed_dim: int | None = None
    image_size: int | None = None

    def __str__(self) -> str:
        file = f"@{self.vision_file}" if self.vision_file else ""
        text = f"hf:{self.text}" if self.text else None
        vision = f"timm:{self.vision}{file}" if self.vision else None
        size = f"{self.image_size}px" if self.image_size else None
        return " + ".join(str(each) for each in (text, vision, self.embed_dim, size) if each)

    @staticmethod
    def parsed(text: str) -> "SeparateTowers | None":
        """The towers that a text stands for; None where it stands for none."""
        if sized := _SIZED.fullmatch(text):
            towers = SeparateTowers.parsed(sized[1])
            return towers and replace(towers, image_size=int(sized[2]))
        if found := _PAIR.fullmatch(text):
            return SeparateTowers._of(found[1], found[2], int(found[3]))
        if _TEXT.fullmatch(text):
            return SeparateTowers._of(text, None, None)
        return SeparateTowers._of(None, text, None) if _VISION.fullmatch(text) else None

    @staticmethod
    def _of(text: str | None, vision: str | None, embed_dim: int | None) -> "SeparateTowers":
        text_tower = _TEXT.fullmatch(text) if text else None
        network = _VISION.fullmatch(vision) if vision else None
        return SeparateTowers(
            text_tower[1] if text_tower else None,
            network[1] if network else None,
            network[2] if network else None,
            embed_dim,
        )

    @staticmethod
    def of_keys(keys: Mapping[str, Any]) -> "SeparateTowers":
        """The towers of a configuration's keys.

        Raises:
            ValueError: One is not of its form, or a width is asked of one tower.
        """
        text, vision, width = keys.get("text"), keys.get("vision"), keys.get("embed_dim")
        if text is not None and not (isinstance(text, str) and _TEXT.fullmatch(text)):
            raise ValueError(f"text is hf:<name or folder>, such as hf:bert-base-uncased, not {text!r}")
        if vision is not None and not (isinstance(vision, str) and _VISION.fullmatch(vision)):
            raise ValueError(f"vision is timm:<name> or timm:<name>@<file of weights>, not {vision!r}")
        if text is None and vision is None:
            raise ValueError("embed_dim and image_size are of towers: give text and vision, or one of them")
        size = keys.get("image_size")
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"image_size is the side of the pictures that vision is given, not {size!r}")
        if size is not None and vision is None:
            raise ValueError("image_size is of the tower vision: there is none")
        if text is None or vision is None:
            if width is not None:
                raise ValueError("embed_dim is the width that two towers are mapped to: one tower has its own")
        else:
            width = EMBED_DIM if width is None else width
            if type(width) is not int or width < 1:
                raise ValueError(f"embed_dim is the width that both towers are mapped to, not {width!r}")
        return replace(SeparateTowers._of(text, vision, width), image_size=size)


def with_architecture(backbone: Any) -> Any:
    """The `backbone` of a configuration with its towers' text as its architecture, where it names them.

    Raises:
        ValueError: It names an architecture too, or the towers are not of their form.
    """
    if not isinstance(backbone, Mapping):
        return backbone
    rest = {key: value for key, value in backbone.items() if key not in TOWER_KEYS}
    if not any(backbone.get(key) is not None for key in TOWER_KEYS):
        return rest  # null takes away what a configuration names, so that an architecture can be set
    if backbone.get("architecture") is not None:
        raise ValueError("give architecture, or text and vision (separate towers), not both")
    return {**rest, "architecture": str(SeparateTowers.of_keys(backbone))}
