"""Weights of a Hugging Face `SiglipModel` (SigLIP, SigLIP 2) under open_clip's names, with timm's vision tower.

Attention maps are three tensors or one, and the head that pools a picture splits its one map into two.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dsmip.errors import UserError

_TEXT, _VISION, _POOL = "text.", "visual.trunk.", "visual.trunk.attn_pool."
_TENSORS = {
    "text_model.embeddings.token_embedding.weight": f"{_TEXT}token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": f"{_TEXT}positional_embedding",
    "vision_model.head.probe": f"{_POOL}latent",
}
_MODULES = {
    "text_model.final_layer_norm": f"{_TEXT}ln_final",
    "text_model.head": f"{_TEXT}text_projection",
    "vision_model.embeddings.patch_embedding": f"{_VISION}patch_embed.proj",
    "vision_model.post_layernorm": f"{_VISION}norm",
    "vision_model.head.attention.out_proj": f"{_POOL}proj",
    "vision_model.head.layernorm": f"{_POOL}norm",
    "vision_model.head.mlp.fc1": f"{_POOL}mlp.fc1",
    "vision_model.head.mlp.fc2": f"{_POOL}mlp.fc2",
}
_BLOCKS = {"text_model": f"{_TEXT}transformer.resblocks", "vision_model": f"{_VISION}blocks"}
_IN_BLOCK = {
    "text_model": {
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    },
    "vision_model": {
        "self_attn.out_proj": "attn.proj",
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
}
_JOINED = {"text_model": "attn.in_proj_", "vision_model": "attn.qkv."}
_QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_BLOCK = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_POOL_MAP = re.compile(r"vision_model\.head\.attention\.in_proj_(weight|bias)")
_POSITION_NUMBERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


def open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with open_clip's names and layout.

    Raises:
        UserError: A tensor that is not part of a SiglipModel, or a block without one of its query, key and value maps.
    """
    converted: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if name in _POSITION_NUMBERS:
            continue
        if name in ("logit_scale", "logit_bias"):
            converted[name] = tensor.reshape(())
        elif name in _TENSORS:
            converted[_TENSORS[name]] = tensor
        elif name == "vision_model.embeddings.position_embedding.weight":
            converted[f"{_VISION}pos_embed"] = tensor[None]
        elif found := _POOL_MAP.fullmatch(name):
            width = len(tensor) // 3
            converted[f"{_POOL}q.{found[1]}"], converted[f"{_POOL}kv.{found[1]}"] = tensor[:width], tensor[width:]
        elif (block := _BLOCK.fullmatch(name)) and block[3] in _QUERY_KEY_VALUE:
            joined = f"{_BLOCKS[block[1]]}.{block[2]}.{_JOINED[block[1]]}{block[4]}"
            attention.setdefault(joined, {})[block[3]] = tensor
        elif block and block[3] in _IN_BLOCK[block[1]]:
            converted[f"{_BLOCKS[block[1]]}.{block[2]}.{_IN_BLOCK[block[1]][block[3]]}.{block[4]}"] = tensor
        elif module in _MODULES:
            converted[f"{_MODULES[module]}.{kind}"] = tensor
        else:
            raise UserError(f"{name} is not a tensor of a Hugging Face SiglipModel")
    for joined, maps in attention.items():
        if missing := [name for name in _QUERY_KEY_VALUE if name not in maps]:
            raise UserError(f"weights have no {missing[0]} for {joined}")
        converted[joined] = torch.cat([maps[name] for name in _QUERY_KEY_VALUE])
    return converted
