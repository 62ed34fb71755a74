"""Weights of a Hugging Face `CLIPModel` under open_clip's names.

The two write the same network differently: query, key and value maps are three tensors or one, and projections are
applied from the other side.
"""

from collections.abc import Mapping

from torch import Tensor

from dsmip.encoders.formats.hugging_face_blocks import BLOCK, POSITION_NUMBERS, QUERY_KEY_VALUE, joined
from dsmip.errors import UserError

# Whole names, and (for weight and bias) modules.
_TENSORS = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "visual_projection.weight": "visual.proj",
}
_NORMS = {
    "text_model.final_layer_norm": "ln_final",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # Hugging Face's spelling
    "vision_model.post_layernorm": "visual.ln_post",
}
_IN_BLOCK = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_BLOCKS = {"text_model": "transformer.resblocks", "vision_model": "visual.transformer.resblocks"}
_TRANSPOSED = ("text_projection.weight", "visual_projection.weight")


def open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with open_clip's names and layout, for `dsmip.encoders.weights.load_weights`.

    Raises:
        UserError: a tensor that is not part of a CLIPModel, or a block without one of its query, key and value maps.
    """
    converted: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        block = BLOCK.fullmatch(name)
        if name in POSITION_NUMBERS:
            continue
        if name in _TENSORS:
            converted[_TENSORS[name]] = tensor.T if name in _TRANSPOSED else tensor
        elif block and block[3] in QUERY_KEY_VALUE:
            together = f"{_BLOCKS[block[1]]}.{block[2]}.attn.in_proj_{block[4]}"
            attention.setdefault(together, {})[block[3]] = tensor
        elif block and block[3] in _IN_BLOCK:
            converted[f"{_BLOCKS[block[1]]}.{block[2]}.{_IN_BLOCK[block[3]]}.{block[4]}"] = tensor
        elif name.rpartition(".")[0] in _NORMS:
            module, _, kind = name.rpartition(".")
            converted[f"{_NORMS[module]}.{kind}"] = tensor
        else:
            raise UserError(f"{name} is not a tensor of a Hugging Face CLIPModel")
    return converted | joined(attention)
