"""Every system in a small form for small encoders of every kind, and which of them cannot be had together."""

from typing import Any

SMALL_FORMS: dict[str, dict[str, Any]] = {
    "albef": {"layers": 1, "heads": 2, "num_tokens": 24, "masked_weight": 0.0, "candidates": 2},
    "blink": {"num_tokens": 12, "candidates": 2},
    "dsmip": {
        "experts": {"text": {}, "visual": {}, "multimodal": {"prompt_length": 2, "prompt_depth": 2}},
        "width": 8,
        "gate": {"picture": "clip", "width": 8},
    },
    "dzmned": {"width": 8},
    "ghmfc": {"width": 8, "heads": 2, "layers": 1},
    "jmel": {"width": 8},
    "m3el": {"width": 8, "num_tokens": 24},
    "mimic": {"width": 8, "num_tokens": 24},
    "mmoe": {"width": 8, "num_tokens": 24},
}
BERTS_VOCABULARY = ("BERT", "separate towers", "texts alone")
CONVOLUTIONAL = ("ResNet", "timm ConvNet", "separate towers")
_TEXT_ALONE = ("bert", "blink")
_NO_PICTURES = r"reads pictures, and backbone .* has no vision tower"
_NO_TEXTS = r"reads texts, and .* has no text tower"
_CLIPS_WORDS = r"has CLIP's vocabulary, without \["


def refusal(name: str, kind: str) -> str | None:
    """Why a system's small form cannot be had with an encoder, as a pattern of the message; None: it can."""
    if name == "dsmip" and kind in CONVOLUTIONAL:
        return r"multimodal.prompt_depth: prompts have no place in the vision tower: .*; .*prompts_in: text puts them"
    return _lacking(name, kind)


def form_with(name: str, kind: str) -> dict[str, Any] | None:
    """A system's form that an encoder can hold: prompts go where there are layers; None: there is no such form."""
    if _lacking(name, kind) is not None:
        return None
    form = SMALL_FORMS.get(name, {})
    if name == "dsmip" and kind in CONVOLUTIONAL:
        experts = form["experts"]
        return {**form, "experts": {**experts, "multimodal": {**experts["multimodal"], "prompts_in": "text"}}}
    return form


def _lacking(name: str, kind: str) -> str | None:
    if kind == "pictures alone":
        return _NO_TEXTS
    if name in _TEXT_ALONE:
        return None if kind in BERTS_VOCABULARY else _CLIPS_WORDS
    return _NO_PICTURES if kind == "texts alone" else None
