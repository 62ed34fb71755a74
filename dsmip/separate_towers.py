"""A backbone of two separate towers, as a configuration names it: `hf:` and `timm:` names and the width they share."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PAIR_KEYS = ("text", "vision", "embed_dim")
"""Keys of a configuration's `backbone` that stand in place of `architecture`."""
EMBED_DIM = 256
_TEXT, _VISION = re.compile(r"hf:(\S.*)"), re.compile(r"timm:([^@\s]+)(?:@(\S.*))?")
_PAIR = re.compile(r"(hf:\S.*) \+ (timm:\S.*) \+ ([1-9]\d*)")


@dataclass(frozen=True, slots=True)
class TowerPair:
    """Two towers and what joins them. Its text stands wherever an architecture has a name.

    Attributes:
        text: A model of Hugging Face's hub, or a folder.
        vision: A network of timm's list.
        vision_file: Its weights, where they are not timm's own.
        embed_dim: Width of the shared space.

    >>> pair = TowerPair("models/minilm", "resnet18", None, 256)
    >>> str(pair)
    'hf:models/minilm + timm:resnet18 + 256'
    >>> TowerPair.parsed(str(pair)) == pair
    True
    """

    text: str
    vision: str
    vision_file: str | None
    embed_dim: int

    def __str__(self) -> str:
        file = f"@{self.vision_file}" if self.vision_file else ""
        return f"hf:{self.text} + timm:{self.vision}{file} + {self.embed_dim}"

    @staticmethod
    def parsed(text: str) -> "TowerPair | None":
        """The pair that a text stands for; None where it stands for none."""
        found = _PAIR.fullmatch(text)
        text_tower, vision = (_TEXT.fullmatch(found[1]), _VISION.fullmatch(found[2])) if found else (None, None)
        if found is None or text_tower is None or vision is None:
            return None
        return TowerPair(text_tower[1], vision[1], vision[2], int(found[3]))

    @staticmethod
    def of_keys(keys: Mapping[str, Any]) -> "TowerPair":
        """The pair of a configuration's keys.

        Raises:
            ValueError: One is missing, or not of its form.
        """
        text, vision, width = keys.get("text"), keys.get("vision"), keys.get("embed_dim", EMBED_DIM)
        text_tower = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if text_tower is None:
            raise ValueError(f"text is hf:<name or folder>, such as hf:bert-base-uncased, not {text!r}")
        found = _VISION.fullmatch(vision) if isinstance(vision, str) else None
        if found is None:
            raise ValueError(f"vision is timm:<name> or timm:<name>@<file of weights>, not {vision!r}")
        if type(width) is not int or width < 1:
            raise ValueError(f"embed_dim is the width that both towers are mapped to, not {width!r}")
        return TowerPair(text_tower[1], found[1], found[2], width)


def with_architecture(backbone: Any) -> Any:
    """The `backbone` of a configuration with the pair's text as its architecture, where it names a pair.

    Raises:
        ValueError: It names an architecture too, or the pair is not of its form.
    """
    if not isinstance(backbone, Mapping) or not any(backbone.get(key) is not None for key in PAIR_KEYS):
        return backbone
    if backbone.get("architecture") is not None:
        raise ValueError("give architecture, or text and vision (two separate towers), not both")
    rest = {key: value for key, value in backbone.items() if key not in PAIR_KEYS}
    return {**rest, "architecture": str(TowerPair.of_keys(backbone))}
