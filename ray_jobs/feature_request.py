"""What `dsmip features` is asked to compute: the network, the size of its pictures and the precision to keep."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsmip.encoders.clip import Backbone
from dsmip.encoders.image_networks import Kind, NetworkChoice
from dsmip.encoders.vgg import BY_HASH, SIDE, TORCHVISION
from dsmip.errors import UserError
from dsmip.image_features import DTypeName
from dsmip.load_config import job_config
from dsmip.models.dsmip import DsmipConfig


@dataclass(frozen=True, slots=True)
class FeatureRequest:
    """size: side that pictures are fitted to before the network, as a run's gate does it."""

    choice: NetworkChoice
    size: int
    dtype: DTypeName


def feature_request(
    kind: Kind, config: str | None, overrides: Sequence[str], weights: str | None, random_seed: int | None
) -> FeatureRequest:
    """From the command line; what is not said there is the configuration's. UserError for what does not go together."""
    if weights is not None and random_seed is not None:
        raise UserError("--weights and --random-weights exclude each other")
    if kind == "clip":
        return _clip(config, overrides, weights, random_seed)
    size, named = SIDE, TORCHVISION
    dtype: DTypeName = "float32"
    if config is not None:
        settings = job_config(config, overrides)
        size, dtype = _image_size(settings.backbone.architecture), settings.cache_dtype
        if isinstance(settings.system, DsmipConfig):
            named = settings.system.gate.vgg_weights
    elif overrides:
        raise UserError("--set changes a configuration: name one by --config")
    if random_seed is not None:
        return FeatureRequest(NetworkChoice("vgg16", None, seed=random_seed), size, dtype)
    named = weights or named
    if named.startswith(BY_HASH):
        raise UserError(f"the configuration names VGG-16's weights by their hash ({named}); say where by --weights")
    return FeatureRequest(NetworkChoice("vgg16", _absolute(named)), size, dtype)


def _clip(config: str | None, overrides: Sequence[str], weights: str | None, random_seed: int | None) -> FeatureRequest:
    if config is None:
        raise UserError("--kind clip takes the backbone of a configuration: name one by --config")
    if weights is not None:
        raise UserError("--weights are VGG-16's; for --kind clip say --set backbone.pretrained=...")
    settings = job_config(config, overrides)
    backbone = settings.backbone
    if backbone.pretrained is None and random_seed is None:
        raise UserError(
            f"the backbone of {config} has no weights: say --set backbone.pretrained=FILE (a tag, an hf-hub: id),"
            " or --random-weights 0 for what a run with random weights has"
        )
    if backbone.pretrained is not None and random_seed is not None:
        raise UserError(f"the backbone of {config} has weights ({backbone.pretrained}): leave out --random-weights")
    architecture = _absolute(backbone.architecture)
    choice = NetworkChoice("clip", backbone.pretrained, architecture, random_seed or 0)
    return FeatureRequest(choice, _image_size(architecture), settings.cache_dtype)


def _image_size(architecture: str) -> int:
    return Backbone.build(architecture, None, device="meta").image_size


def _absolute(name: str) -> str:
    """File names as workers need them, which live in another folder."""
    return str(Path(name).resolve()) if Path(name).is_file() else name
