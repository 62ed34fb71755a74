"""Backbones so small that tests can train them, as open_clip writes them down."""

import json
from pathlib import Path
from typing import Any

from dsmip.encoders.architecture import SHIPPED

NARROW_BACKBONE = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def small_config(**changes: object) -> dict[str, Any]:
    """The shipped `tiny`, thinner, with some keys replaced."""
    config = json.loads((SHIPPED / "tiny.json").read_text())
    config["vision_cfg"] |= {"layers": 2, "width": 64}
    config["text_cfg"] |= {"layers": 2, "width": 32, "heads": 2}
    return config | changes


def write_config(folder: Path, **changes: object) -> str:
    """The file of a `small_config` in a folder, which is made."""
    folder.mkdir(exist_ok=True)
    path = folder / "small.json"
    path.write_text(json.dumps(small_config(**changes)))
    return str(path)
