"""Weights of a Hugging Face `SiglipModel` (SigLIP, SigLIP 2) under open_clip's names, with timm's vision tower.

Attention maps are three tensors or one, and the head that pools a picture splits its one map into two.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from dsmip.encoders.formats.hugging_face_blocks import BLOCK, POSITION_NUMBERS, QUERY_KEY_VALUE, joined
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
_POOL_MAP = re.compile(r"vision_model\.head\.attention\.in_proj_(weight|bias)")


def open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with open_clip's names and layout.

    Raises:
        UserError: A tensor that is not part of a SiglipModel, or a block without one of its query, key and value maps.
    """
    converted: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if name in POSITION_NUMBERS:
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
        elif (block := BLOCK.fullmatch(name)) and block[3] in QUERY_KEY_VALUE:
            together = f"{_BLOCKS[block[1]]}.{block[2]}.{_JOINED[block[1]]}{block[4]}"
            attention.setdefault(together, {})[block[3]] = tensor
        elif block and block[3] in _IN_BLOCK[block[1]]:
            converted[f"{_BLOCKS[block[1]]}.{block[2]}.{_IN_BLOCK[block[1]][block[3]]}.{block[4]}"] = tensor
        elif module in _MODULES:
            converted[f"{_MODULES[module]}.{kind}"] = tensor
        else:
            raise UserError(f"{name} is not a tensor of a Hugging Face SiglipModel")
    return converted | joined(attention)
