"""A backbone: two towers that share a space, or one, with weights; prompts, what trains, how pixels are normalised.

Shapes: N items, L text tokens, T tokens that a tower returns, r prompts per layer, S picture side; d_t text width, d_v
vision width, d_z projection width.
"""

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dsmip.encoders.architecture import Architecture, resolve_architecture
from dsmip.encoders.networks import build_network
from dsmip.encoders.tower_weights import load_towers
from dsmip.encoders.towers.base import (
    TextTower,
    TokenFeatures,
    Tower,
    TrunkFeatures,
    TrunkKeeper,
    VisionTower,
    at_least_float32,
)
from dsmip.encoders.towers.lengths import by_length
from dsmip.encoders.towers.prompts import InteractivePrompts
from dsmip.encoders.towers.select import text_tower, vision_tower
from dsmip.encoders.weights import check_weights, described, load_weights, locate_weights, read_weights
from dsmip.errors import UserError
from dsmip.private import private_folder, user_cache_folder
from dsmip.storage.atomic import atomic_path

Tuning = Literal["frozen", "projection", "text", "full"]
"""What trains of a backbone: nothing, what maps into the shared space, this and the whole text tower, or all."""
TowerName = Literal["text", "vision"]
_NO_SETTINGS = ("transformers_version", "architectures", "dtype", "torch_dtype")
_COMPILED = "TORCHINDUCTOR_CACHE_DIR"
_SHARED = "torchinductor_"  # what PyTorch writes into it when it is imported begins so, in the temporary folder


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
    """A network whose two towers share a projection space, or one tower alone. Make one with `Backbone.build`.

    Attributes:
        clip: The network, with all weights.
        text: Its text tower.
        vision: Its vision tower.
        embed_width: d_z.
        keeper: What is asked for what a trunk that does not train says; None: trunks always run.
        keeps_statistics: Those of batch norms stay as they are while it trains: they came with its weights, and every
            worker would have its own.
    """

    keeper: TrunkKeeper | None = None
    keeps_statistics: bool = False
    mean: Tensor
    std: Tensor

    def __init__(self, clip: nn.Module, network: Architecture, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.clip = clip
        self.text: TextTower = text_tower(clip, network.context_length)
        self.vision: VisionTower = vision_tower(clip)
        self.embed_width = network.embed_width
        self._network = network
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @staticmethod
    def build(
        architecture: str, pretrained: str | None, *, device: torch.device | str | None = None, seed: int = 0
    ) -> "Backbone":
        """Builds the network and loads its weights; it starts frozen and in eval mode.

        Args:
            architecture: open_clip name, name of a shipped JSON, or path of a JSON (see `resolve_architecture`).
            pretrained: see `dsmip.encoders.weights.locate_weights`; None: random weights, of a pair the towers' own.
            device: where it goes (None: torch's default device); on meta no weights are read.
            seed: of the random weights; the same seed gives the same weights.

        Raises:
            UserError: unknown or unsupported architecture, weights not found, not readable or not fitting.
        """
        network = resolve_architecture(architecture)
        weights = locate_weights(network, pretrained) if pretrained is not None else None
        mean = (weights and weights.mean) or network.mean
        std = (weights and weights.std) or network.std
        device = torch.get_default_device() if device is None else torch.device(device)
        on_meta = device.type == "meta"
        with torch.random.fork_rng(devices=[]), torch.device("meta" if on_meta else "cpu"):
            torch.default_generator.manual_seed(seed)
            backbone = Backbone(build_network(network), network, mean, std)
        if weights is not None and not on_meta:
            load_weights(backbone.clip, read_weights(weights.path), f"{pretrained} ({architecture})")
        elif network.separate is not None and not on_meta:
            load_towers(backbone.clip, network.separate)
        backbone.keeps_statistics = weights is not None or network.separate is not None
        backbone.tune("frozen")
        return backbone.to(device).eval()

    @staticmethod
    def checked(architecture: str, pretrained: str | None) -> "Backbone":
        """The network without weights, on the device meta, once the weights are found to fit it.

        Raises:
            UserError: as `build`.
        """
        backbone, network = Backbone.build(architecture, pretrained, device="meta"), resolve_architecture(architecture)
        if pretrained is not None:
            check_weights(backbone.clip, network, pretrained)
        elif network.separate is not None:
            Backbone.build(architecture, None)
        return backbone

    @property
    def form(self) -> str:
        """What its features depend on besides its tensors, as a text of keys: the settings of its layers."""
        config = {**self._network.config, "text_cfg": dict(self._network.config["text_cfg"])}
        if self._network.is_hugging_face:  # its names are of folders that may move
            text: Any = self.clip.text
            settings: dict[str, Any] = text.transformer.config.to_diff_dict()
            said = {name: value for name, value in settings.items() if name[0] != "_" and name not in _NO_SETTINGS}
            named = {name: said for name in config["text_cfg"] if name.endswith("_name")}
            config["text_cfg"] |= named
        statistics = [value.flatten().tolist() for value in (self.mean, self.std)]
        return json.dumps([config, statistics], sort_keys=True, default=str)

    @property
    def text_width(self) -> int:
        """d_t."""
        return self.text.width

    @property
    def vision_width(self) -> int:
        """d_v."""
        return self.vision.width

    @property
    def context_length(self) -> int:
        return self.text.context_length

    @property
    def image_size(self) -> int:
        """S, side of the square pictures."""
        return self.vision.image_size

    @property
    def logit_scale(self) -> nn.Parameter:
        """Scalar: log of the inverse temperature of CLIP's own contrastive loss."""
        scale: nn.Parameter = self.clip.get_parameter("logit_scale")
        return scale

    def encode_text(
        self, token_ids: Tensor, mask: Tensor, prompts: InteractivePrompts | None = None, *, hide_padding: bool = False
    ) -> TokenFeatures:
        """Text tower (eqs. 3, 6, 7): tokens [N, L (+r), d_t], prompts right after the first token.

        Args:
            token_ids: int64 [N, L] as `dsmip.data.text.Tokenizer` makes them, with L + r <= context length.
            mask: bool [N, L], False at padding.
            hide_padding: no place attends to padding, as Hugging Face's towers do with an attention mask, and places of
                padding have outputs, too. Of causal towers only these change: the causal mask hides padding from all
                others.

        Raises:
            ValueError: L + r above the context length (tokenize with reserve=r).
            UserError: prompts deeper than the tower, or where it has no place for any.
        """
        own = _per_layer(self.text, prompts, InteractivePrompts.text_prompts)
        if not len(token_ids):  # of a worker's empty share; libraries' layers take no empty batch
            one = token_ids.new_zeros(1, token_ids.shape[1])
            return self.text.encode(one, torch.ones_like(one, dtype=torch.bool), own, hide_padding=hide_padding).none()

        def trunk(ids: Tensor, seen: Tensor) -> TrunkFeatures:
            return self.text.trunk(ids, seen, own, hide_padding=hide_padding)

        def said() -> TrunkFeatures:
            if hide_padding or self.text.reads_padding:  # places of padding may be used
                return trunk(token_ids, mask)
            return by_length(trunk, token_ids, mask, places=len(own[0]) if own else 0)

        return self.text.project(self._said(self.text, prompts, said))

    def encode_padded_text(
        self, token_ids: Tensor, mask: Tensor, length: int, prompts: InteractivePrompts | None = None
    ) -> TokenFeatures:
        """As `encode_text`, with features at every one of `length` places, for systems that attend over padding.

        Padding is the text's last token and hidden from attention, as MIMIC was published; where the tower reads
        padding, it stays its tokenizer's.

        Raises:
            ValueError: a text of more than `length` tokens.
        """
        if not self.text.reads_padding:
            token_ids, mask = padded_with_end(token_ids, mask, length)
        return self.encode_text(token_ids, mask, prompts, hide_padding=True)

    def encode_image(self, pixels: Tensor, prompts: InteractivePrompts | None = None) -> TokenFeatures:
        """Vision tower (eqs. 4, 5, 8): tokens [N, T (+r), d_v], prompts last.

        Args:
            pixels: float [N, 3, S, S] from `normalise`.

        Raises:
            UserError: prompts deeper than the tower, or where it has no place for any.
        """
        own = _per_layer(self.vision, prompts, InteractivePrompts.image_prompts)
        if not len(pixels):
            return self.vision.encode(pixels.new_zeros(1, *pixels.shape[1:]), own).none()
        return self.vision.project(self._said(self.vision, prompts, lambda: self.vision.trunk(pixels, own)))

    def _said(
        self, tower: Tower, prompts: InteractivePrompts | None, trunk: Callable[[], TrunkFeatures]
    ) -> TrunkFeatures:
        """What a trunk says, from the keeper where nothing of it trains."""
        trains = tower.trunk_trains or (prompts is not None and any(p.requires_grad for p in prompts.parameters()))
        return trunk() if trains or self.keeper is None else self.keeper(tower.name, trunk)

    def normalise(self, images: Tensor, has_image: Tensor) -> Tensor:
        """float32 [N, 3, S, S] from uint8 [N, 3, S, S]: the backbone's pixel statistics; zeros where no picture is.

        Raises:
            ValueError: pictures of another size than the backbone's.
        """
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"pictures {tuple(images.shape)}, expected [N, 3, {self.image_size}, {self.image_size}]")
        if self.keeper is not None and self.keeper.has_no_images:
            return self.mean.new_full((), torch.nan).expand(images.shape)
        pixels = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return pixels.masked_fill(~has_image[:, None, None, None], 0.0)

    def token_embedding_mean(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """[N, d_t]: mean of the input embeddings of all tokens that are not padding (the f of eq. 15)."""
        embeddings: Tensor = self.text.embedding(token_ids)
        return at_least_float32((embeddings * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))

    def tune(self, mode: Tuning, towers: Collection[TowerName] = ("text", "vision")) -> None:
        """Sets which parameters train, of `towers` alone.

        The logit scale belongs to neither tower and stays frozen; contrastive pretraining sets its requires_grad.

        Raises:
            UserError: There is no projection to train.
        """
        self.clip.requires_grad_(False)
        if mode == "frozen":
            return
        for tower in (self.text, self.vision):
            if tower.name not in towers or tower.is_absent:
                continue
            parameters = tower.parameters if mode in ("full", tower.name) else tower.projection
            if not parameters:
                raise UserError(f"tune: {mode}: the {tower.name} tower of this backbone has no projection")
            for parameter in parameters:
                parameter.requires_grad_(True)

    def train(self, mode: bool = True) -> "Backbone":
        """What has nothing to train stays in eval mode, without dropout, and so do batch norms that keep statistics."""
        super().train(mode)
        _rest(self.clip)
        if self.keeps_statistics:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def compile_layers(self) -> None:
        """Has the towers' layers compiled when they first run; the same values up to rounding, the same state.

        All layers of a tower share a compilation, for any text length; training, validation and batches of one have one
        each. It needs a C++ compiler.
        """
        for tower in (self.text, self.vision):
            for block in tower.layers:
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


def _rest(module: nn.Module) -> None:
    """Puts into eval mode the modules in it that have parameters, of which none trains."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for inner in module.children():
        _rest(inner)


def _per_layer(
    tower: Tower, prompts: InteractivePrompts | None, of_layer: Callable[[InteractivePrompts, int], Tensor]
) -> list[Tensor]:
    if prompts is None:
        return []
    if fault := tower.prompt_fault(prompts.depth):
        raise UserError(fault)
    return [of_layer(prompts, layer) for layer in range(prompts.depth)]


def compile_towers(module: nn.Module) -> None:
    """Compiles the layers of every backbone in a module (`Backbone.compile_layers`).

    PyTorch keeps what is compiled, libraries among it, in a folder of a predictable name in the temporary one, and
    loads what it finds there: unless a user has named another, it is one in the user's cache folder.

    Raises:
        UserError: There is no compiler, or the cache folder may be another user's.
    """
    given = os.environ.get("CXX", "g++")
    try:
        compiler = next(iter(shlex.split(given)), given)
    except ValueError:  # no words of a shell
        compiler = given
    if shutil.which(compiler) is None:
        raise UserError(f"train.compile: no C++ compiler named {compiler!r} (set CXX to one, or leave compile out)")
    named = Path(os.environ.get(_COMPILED, _SHARED))
    if named.name.startswith(_SHARED) and named.parent in (Path(), Path(tempfile.gettempdir())):
        instead = "set XDG_CACHE_HOME to another folder"
        os.environ[_COMPILED] = str(private_folder(private_folder(user_cache_folder(), instead) / "compiled", instead))
    for backbone in module.modules():
        if isinstance(backbone, Backbone):
            backbone.compile_layers()
