"""CLIP towers that return pooled and token features, with prompts in their layers (DSMIP eqs. 2-8).

Shapes: N items, L text tokens, P patches, r prompts per layer, S picture side; d_t text width, d_v vision width,
d_z projection width. Layers are open_clip's own blocks, called one by one.
"""

import os
import shlex
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dsmip.encoders.architecture import Architecture, resolve_architecture
from dsmip.encoders.prompts import InteractivePrompts
from dsmip.encoders.stem import STEM, conv_stem
from dsmip.encoders.weights import check_weights, described, load_weights, locate_weights, read_weights
from dsmip.errors import UserError
from dsmip.storage.atomic import atomic_path

Tuning = Literal["frozen", "projection", "full"]
Tower = Literal["text", "vision"]


@dataclass(frozen=True, slots=True)
class TokenFeatures:
    """Features of N texts or pictures, at least float32.

    Attributes:
        pooled: [N, d_z], projected end-of-text or class token.
        tokens: [N, T, width] of the last layer.
        mask: bool [N, T], True where a token is not padding.
    """

    pooled: Tensor
    tokens: Tensor
    mask: Tensor


def padded_with_end(token_ids_NL: Tensor, mask_NL: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """int64 and bool [N, length]: a text's last token at every place of padding (MIMIC's published form).

    Raises:
        ValueError: a text of more than `length` tokens.
    """
    if bool(mask_NL[:, length:].any()):
        raise ValueError(f"texts of more than {length} tokens: tokenize to {length}")
    missing = max(length - token_ids_NL.shape[1], 0)
    mask_NL = F.pad(mask_NL[:, :length], (0, missing))
    end_N1 = token_ids_NL.gather(1, mask_NL.sum(dim=1, keepdim=True) - 1)
    return F.pad(token_ids_NL[:, :length], (0, missing)).where(mask_NL, end_N1), mask_NL


class Backbone(nn.Module):
    """An open_clip model whose two towers share a projection space. Make one with `Backbone.build`."""

    mean: Tensor
    std: Tensor

    def __init__(self, clip: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @staticmethod
    def build(
        architecture: str, pretrained: str | None, *, device: torch.device | str = "cpu", seed: int = 0
    ) -> "Backbone":
        """Builds the network and loads its weights; it starts frozen and in eval mode.

        Args:
            architecture: open_clip name, name of a shipped JSON, or path of a JSON (see `resolve_architecture`).
            pretrained: open_clip tag, "hf-hub:<owner>/<model>", local .safetensors or .pt file; None: random weights.
            seed: of the random weights; the same seed gives the same weights.

        Raises:
            UserError: unknown or unsupported architecture, weights not found, not readable or not fitting.
        """
        network = resolve_architecture(architecture)
        weights = locate_weights(network, pretrained) if pretrained is not None else None
        mean = (weights and weights.mean) or network.mean
        std = (weights and weights.std) or network.std
        on_meta = torch.device(device).type == "meta"
        with torch.random.fork_rng(devices=[]), torch.device("meta" if on_meta else "cpu"):
            torch.default_generator.manual_seed(seed)
            backbone = Backbone(_network(network), mean, std)
        if weights is not None and not on_meta:
            load_weights(backbone.clip, read_weights(weights.path), f"{pretrained} ({architecture})")
        backbone.tune("frozen")
        return backbone.to(device).eval()

    @staticmethod
    def checked(architecture: str, pretrained: str | None) -> "Backbone":
        """The network without weights, on the device meta, once the weights are found to fit it.

        Raises:
            UserError: as `build`.
        """
        backbone = Backbone.build(architecture, pretrained, device="meta")
        if pretrained is not None:
            check_weights(backbone.clip, resolve_architecture(architecture), pretrained)
        return backbone

    @property
    def _text(self) -> Any:
        return getattr(self.clip, "text", self.clip)

    @property
    def _vision(self) -> Any:
        return self.clip.visual

    @property
    def text_width(self) -> int:
        """d_t."""
        return int(self._text.token_embedding.embedding_dim)

    @property
    def vision_width(self) -> int:
        """d_v."""
        return int(self._vision.class_embedding.shape[0])

    @property
    def embed_width(self) -> int:
        """d_z."""
        return int(self._vision.proj.shape[1])

    @property
    def text_layers(self) -> int:
        return len(self._text.transformer.resblocks)

    @property
    def vision_layers(self) -> int:
        return len(self._vision.transformer.resblocks)

    @property
    def context_length(self) -> int:
        return int(self._text.positional_embedding.shape[0])

    @property
    def image_size(self) -> int:
        """S, side of the square pictures."""
        size = self._vision.image_size
        return int(size[0] if isinstance(size, tuple) else size)

    @property
    def num_patches(self) -> int:
        """P; the vision tower returns 1 + P tokens, and r more with prompts."""
        return int(self._vision.positional_embedding.shape[0]) - 1

    @property
    def logit_scale(self) -> nn.Parameter:
        """Scalar: log of the inverse temperature of CLIP's own contrastive loss."""
        scale: nn.Parameter = self.clip.get_parameter("logit_scale")
        return scale

    def encode_text(
        self, token_ids: Tensor, mask: Tensor, prompts: InteractivePrompts | None = None, *, hide_padding: bool = False
    ) -> TokenFeatures:
        """Text tower (eqs. 3, 6, 7): tokens [N, L (+r), d_t] after the final norm, prompts right after start-of-text.

        Args:
            token_ids: int64 [N, L] as `dsmip.data.text.Tokenizer` makes them, with L + r <= context length.
            mask: bool [N, L], False at padding.
            hide_padding: no place attends to padding, as Hugging Face's towers do with an attention mask. Only the
                outputs at padding places change: the causal mask hides padding from all others.

        Raises:
            ValueError: L + r above the context length (tokenize with reserve=r).
            UserError: prompts deeper than the tower.
        """
        inserted = self._text_prompts(prompts)
        num_prompts = prompts.num_prompts if prompts is not None else 0
        length = token_ids.shape[1] + num_prompts
        if length > self.context_length:
            raise ValueError(
                f"{token_ids.shape[1]} tokens and {num_prompts} prompts exceed the context length"
                f" {self.context_length}: tokenize with reserve={num_prompts}"
            )
        text = self._text
        x = text.token_embedding(token_ids).to(text.transformer.get_cast_dtype())
        end = mask.sum(dim=1) - 1
        if inserted:
            x = torch.cat([x[:, :1], _batched(inserted[0], x), x[:, 1:]], dim=1)
            mask, end = (torch.cat([mask.new_ones(len(mask), num_prompts), mask], dim=1), end + num_prompts)
        x = x + text.positional_embedding[:length].to(x.dtype)
        attn_mask = text.attn_mask[:length, :length]
        if hide_padding:
            attn_mask = _hide_keys(attn_mask, mask, text.transformer.resblocks[0].attn.num_heads)
        x = _run_layers(text.transformer, x, attn_mask, inserted, first_slot=1)
        x = text.ln_final(x)
        pooled = x[torch.arange(len(x), device=x.device), end] @ text.text_projection
        return TokenFeatures(_at_least_float32(pooled), _at_least_float32(x), mask)

    def encode_image(self, pixels: Tensor, prompts: InteractivePrompts | None = None) -> TokenFeatures:
        """Vision tower (eqs. 4, 5, 8): tokens [N, 1 + P (+r), d_v] before the last norm: class, patches, prompts.

        Args:
            pixels: float [N, 3, S, S] from `normalise`.

        Raises:
            UserError: prompts deeper than the tower.
        """
        inserted = self._image_prompts(prompts)
        vision = self._vision
        x = vision.conv1(pixels).flatten(2).transpose(1, 2)
        class_token = vision.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([class_token, x], dim=1) + vision.positional_embedding.to(x.dtype)
        first_slot = x.shape[1]
        if inserted:
            x = torch.cat([x, _batched(inserted[0], x)], dim=1)
        x = _run_layers(vision.transformer, vision.ln_pre(x), None, inserted, first_slot)
        pooled = vision.ln_post(x[:, 0]) @ vision.proj
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return TokenFeatures(_at_least_float32(pooled), _at_least_float32(x), mask)

    def normalise(self, images: Tensor, has_image: Tensor) -> Tensor:
        """float32 [N, 3, S, S] from uint8 [N, 3, S, S]: the backbone's pixel statistics; zeros where no picture is.

        Raises:
            ValueError: pictures of another size than the backbone's.
        """
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"pictures {tuple(images.shape)}, expected [N, 3, {self.image_size}, {self.image_size}]")
        pixels = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return pixels.masked_fill(~has_image[:, None, None, None], 0.0)

    def token_embedding_mean(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """[N, d_t]: mean of the input embeddings of all tokens that are not padding (the f of eq. 15)."""
        embeddings: Tensor = self._text.token_embedding(token_ids)
        return _at_least_float32((embeddings * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))

    def tune(self, mode: Tuning, towers: Collection[Tower] = ("text", "vision")) -> None:
        """Sets which parameters train: none, the projections of `towers`, or all of `towers`.

        The logit scale belongs to neither tower and stays frozen; contrastive pretraining sets its requires_grad.
        """
        self.clip.requires_grad_(False)
        for tower in towers:
            for parameter in self._tower_parameters(tower, mode):
                parameter.requires_grad_(True)

    def compile_layers(self) -> None:
        """Has the towers' layers compiled when they first run; the same values up to rounding, the same state.

        All layers of a tower share a compilation, for any text length; training, validation and batches of one have one
        each. It needs a C++ compiler.
        """
        for tower in (self._text, self._vision):
            for block in tower.transformer.resblocks:
                block.compile(dynamic=True)

    def save_weights(self, path: Path) -> None:
        """Writes weights, pixel statistics and activation atomically as safetensors; `build` loads them, and open_clip
        too (weights without a convolutional stem)."""
        from open_clip.transformer import QuickGELU

        state = {key: value.detach().cpu().contiguous() for key, value in self.clip.state_dict().items()}
        quick_gelu = any(isinstance(module, QuickGELU) for module in self.clip.modules())
        metadata = described(self.mean.flatten().tolist(), self.std.flatten().tolist(), quick_gelu=quick_gelu)
        with atomic_path(path) as temporary:
            save_file(state, temporary, metadata=metadata)

    def _tower_parameters(self, tower: Tower, mode: Tuning) -> list[nn.Parameter]:
        if mode == "frozen":
            return []
        text, vision = self._text, self._vision
        projection: nn.Parameter = text.text_projection if tower == "text" else vision.proj
        if mode == "projection":
            return [projection]
        if tower == "vision":
            return list(vision.parameters())
        modules = (text.token_embedding, text.transformer, text.ln_final)
        inner = [parameter for module in modules for parameter in module.parameters()]
        return [text.positional_embedding, *inner, projection]

    def _text_prompts(self, prompts: InteractivePrompts | None) -> list[Tensor]:
        if prompts is None:
            return []
        _check_depth(prompts, self.text_layers, "text")
        return [prompts.text_prompts(layer) for layer in range(prompts.depth)]

    def _image_prompts(self, prompts: InteractivePrompts | None) -> list[Tensor]:
        if prompts is None:
            return []
        _check_depth(prompts, self.vision_layers, "vision")
        return [prompts.image_prompts(layer) for layer in range(prompts.depth)]


def compile_towers(module: nn.Module) -> None:
    """Compiles the layers of every backbone in a module (`Backbone.compile_layers`).

    Raises:
        UserError: There is no compiler.
    """
    compiler = shlex.split(os.environ.get("CXX", "g++"))[0]
    if shutil.which(compiler) is None:
        raise UserError(f"train.compile: no C++ compiler named {compiler} (set CXX to one, or leave compile out)")
    for backbone in module.modules():
        if isinstance(backbone, Backbone):
            backbone.compile_layers()


def _network(architecture: Architecture) -> nn.Module:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    config = dict(architecture.config)
    network = CustomTextCLIP if config.pop("custom_text", False) else CLIP
    vision_cfg = dict(config.pop("vision_cfg"))
    stem: list[int] | None = vision_cfg.pop(STEM, None)
    vision, text = (CLIPVisionCfg(**vision_cfg), CLIPTextCfg(**config.pop("text_cfg")))
    try:
        clip: nn.Module = network(vision_cfg=vision, text_cfg=text, **config)
    except (AssertionError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"backbone {architecture.name} cannot be built from its sizes: {error}") from None
    if stem is not None:
        tower: Any = clip.visual
        tower.conv1 = conv_stem(stem, vision.width)
    return clip


def _check_depth(prompts: InteractivePrompts, num_layers: int, tower: str) -> None:
    if prompts.depth > num_layers:
        raise UserError(f"prompt depth {prompts.depth} exceeds the {num_layers} layers of the {tower} tower")


def _run_layers(
    transformer: Any, x: Tensor, attn_mask: Tensor | None, prompts: Sequence[Tensor], first_slot: int
) -> Tensor:
    """All blocks; at the inputs of layers 1 .. J-1 the prompt slots are overwritten (eq. 7), later they flow on."""
    for layer, block in enumerate(transformer.resblocks):
        if 0 < layer < len(prompts):
            after = first_slot + len(prompts[layer])
            x = torch.cat([x[:, :first_slot], _batched(prompts[layer], x), x[:, after:]], dim=1)
        x = block(x, attn_mask=attn_mask)
    return x


def _hide_keys(attn_mask_LL: Tensor, key_mask_NL: Tensor, num_heads: int) -> Tensor:
    """Additive mask [N * heads, L, L]: `attn_mask_LL`, and -inf for keys that are False in `key_mask_NL`."""
    mask_NLL = attn_mask_LL.masked_fill(~key_mask_NL[:, None, :], -torch.inf)
    return mask_NLL.repeat_interleave(num_heads, dim=0)


def _batched(prompts_rd: Tensor, x: Tensor) -> Tensor:
    return prompts_rd.to(x.dtype).expand(len(x), -1, -1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
