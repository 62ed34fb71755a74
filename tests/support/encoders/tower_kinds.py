"""A small backbone of every kind of tower, with random weights: the model config that a user would write."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SIZE = 32  # side of pictures, where a network leaves the choice
CLIP_TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
CLIP_VISION = {"image_size": SIZE, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}


def _clip(text: Mapping[str, Any] = {}, vision: Mapping[str, Any] = {}, **top: Any) -> dict[str, Any]:
    return {"embed_dim": 24, "vision_cfg": CLIP_VISION | vision, "text_cfg": CLIP_TEXT | text, **top}


def _timm(name: str, size: int, **vision: Any) -> dict[str, Any]:
    own = {"image_size": size, "timm_model_name": name, "timm_pool": "", "timm_proj": "linear"}
    return {"embed_dim": 24, "vision_cfg": own | vision, "text_cfg": CLIP_TEXT}


def _hugging_face(config: Any, **text: Any) -> Callable[[Path], dict[str, Any]]:
    def written(folder: Path) -> dict[str, Any]:
        config.save_pretrained(folder / config.model_type)
        own = {"hf_model_name": str(folder / config.model_type), "context_length": 12, "hf_proj_type": "linear"}
        return {"embed_dim": 24, "vision_cfg": CLIP_VISION, "text_cfg": own | text}

    return written


def tower_kinds() -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Configurations by kind; a folder for what they refer to comes in."""
    from transformers import BertConfig, MT5Config, XLMRobertaConfig

    small: dict[str, Any] = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return {
        "clip": lambda _: _clip(),
        "siglip": lambda _: _clip(
            {"pool_type": "last", "no_causal_mask": True, "proj_bias": True},
            {
                "timm_model_name": "vit_pe_core_tiny_patch16_384",
                "timm_pool": "map",
                "timm_proj": "linear",
                "image_size": 384,
            },
            custom_text=True,
            init_logit_bias=-10,
        ),
        "clipa": lambda _: _clip(
            {"pool_type": "last", "no_causal_mask": True},
            {"pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True},
        ),
        "mobileclip": lambda _: _clip({"no_causal_mask": True}, custom_text=True),
        "coca": lambda _: _clip(
            {"embed_cls": True, "output_tokens": True},
            {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5, "output_tokens": True},
            multimodal_cfg={"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
            custom_text=True,
        ),
        "resnet": lambda _: _clip({}, {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "patch_size": None}),
        "timm transformer": lambda _: _timm("test_vit", 160),
        "eva": lambda _: _timm("eva02_tiny_patch14_224", 224),
        "convnext": lambda _: _timm("test_convnext", 160, timm_pool="avg"),
        "efficientnet": lambda _: _timm("test_efficientnet", 160, timm_pool="avg"),
        "swin": lambda _: _timm("swin_tiny_patch4_window7_224", 224),
        "bert": _hugging_face(BertConfig(**small, intermediate_size=32), hf_pooler_type="cls_pooler"),
        "xlm-roberta": _hugging_face(XLMRobertaConfig(**small, intermediate_size=32), hf_pooler_type="mean_pooler"),
        "mt5": _hugging_face(
            MT5Config(vocab_size=300, d_model=16, num_layers=3, num_heads=2, d_ff=32, d_kv=8),
            hf_pooler_type="mean_pooler",
        ),
    }
