"""Configurations from text and to text: YAML files, `--set key=value`, the values of a search.

The one place that turns a configuration's text into a validated object, with the section of its system.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from dsmip.config import ExperimentConfig, TrainConfig, deep_merged, flat, validated
from dsmip.encoders.weights import weights_in
from dsmip.errors import UserError, refuse_secret
from dsmip.keys import key_tree
from dsmip.models import find_system
from dsmip.storage.parsing import parse_yaml

_log = logging.getLogger(__name__)
_MAX_DEPTH = 20  # of keys in one another
_TOWERS = ("hf:", "timm:")
_TOWER_FILE = re.compile(r"(hf:|timm:[^@\s]+@)(\S.*?)(?= \+ |$)")  # what a pair of towers names; a name is its own file
_FILES = {".bin", ".json", ".pt", ".pth", ".safetensors"}


class _Loader(yaml.SafeLoader):
    """YAML in which 5e-4 is a number (YAML 1.1 wants a dot, and reads text)."""


class _Dumper(yaml.SafeDumper):
    """Writes for `_Loader`: text that it would take for a number is quoted."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(  # type: ignore[no-untyped-call]
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def shipped_configs() -> list[str]:
    """Names of the YAMLs that come with the package."""
    folder = resources.files("dsmip") / "configs"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads a shipped configuration (by name) or a YAML file, applies `key=value` overrides and validates.

    Raises:
        UserError: an unknown name, wrong YAML, an unknown key or a value out of range.
    """
    text, source = _read_text(name_or_path), f"config {name_or_path}"
    return _of_text(text, source) if not overrides else parse_config(_tree(text, source, overrides), source)


def job_config(name_or_path: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """As `load_config`, with absolute file names: workers live in other folders than the command line."""
    text, source = _read_text(name_or_path), f"config {name_or_path}"
    return parse_config(_absolute(_tree(text, source, overrides)), source)


def overridden(config: ExperimentConfig, overrides: Sequence[str], source: str) -> ExperimentConfig:
    """A parsed configuration with `key=value` overrides and absolute file names; itself where that changes nothing.

    Raises:
        UserError: an unknown key or a value out of range; the message begins with `source`.
    """
    before = config.model_dump(mode="json")
    after = _absolute(_with_overrides(before, overrides))
    return config if after == before else parse_config(after, source)


def read_config(text: str) -> ExperimentConfig:
    """The configuration that `to_yaml` wrote."""
    return _of_text(text, "configuration")


def to_yaml(config: ExperimentConfig) -> str:
    """The whole configuration as YAML text that `load_config` reads back to an equal object."""
    return _yaml(config.model_dump(mode="json"))


def key_text(config: ExperimentConfig, names: Mapping[str, str] | None = None) -> str:
    """What stands for the configuration in a key (`dsmip.keys.key_tree`), as YAML text.

    Args:
        names: Other ones of the files in it.
    """
    tree = key_tree(config)
    return _yaml(with_files(tree, lambda name: names.get(name, name)) if names else tree)


def _yaml(tree: Mapping[str, Any]) -> str:
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False))


def changed(config: ExperimentConfig, overrides: Mapping[str, Any]) -> ExperimentConfig:
    """A copy with some keys replaced (nested mappings are merged), validated again."""
    return parse_config(deep_merged(config.model_dump(mode="json"), overrides))


def _of_text(text: str, source: str) -> ExperimentConfig:
    try:
        return _parsed(text)
    except UserError:
        return parse_config(_tree(text, source), source)  # for a message that names the source


@lru_cache(maxsize=64)
def _parsed(text: str) -> ExperimentConfig:
    """A worker gets as text what its run has as a file: the same text is parsed once in a process."""
    return parse_config(_tree(text, "configuration"))


def _read_text(name_or_path: str) -> str:
    if name_or_path in shipped_configs():
        return (resources.files("dsmip") / "configs" / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    path = _in_home(name_or_path)
    if not path.is_file():
        raise UserError(
            f"config '{name_or_path}' is neither a file nor a shipped name; shipped: {', '.join(shipped_configs())}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {name_or_path} cannot be read as text: {error}") from error


def _tree(text: str, source: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    tree = parse_yaml(text, source, _Loader)
    if not isinstance(tree, dict):
        raise UserError(f"{source} must be a mapping of keys, not {type(tree).__name__}")
    return _with_overrides(tree, overrides)


def _with_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        tree = deep_merged(tree, _parse_override(override))
    return tree


def _absolute(tree: Any) -> Any:
    """The tree with absolute names of the weight and model files in it that exist; `~` is a home folder in all.

    A folder of a Hugging Face model that was named as weights becomes the file in it.
    """
    backbone = tree.get("backbone") if isinstance(tree, dict) else None
    if isinstance(backbone, dict) and isinstance(name := backbone.get("pretrained"), str) and _in_home(name).is_dir():
        tree = {**tree, "backbone": {**backbone, "pretrained": str(weights_in(_in_home(name)))}}
    return with_files(tree, _absolute_name)


def _absolute_name(name: str) -> str:
    path = _in_home(name)
    if path.exists():
        return str(path.resolve())
    return str(path) if name.startswith("~") else name  # ./model, which a Path takes for a name of the hub


def with_files(tree: Any, rename: Callable[[str], str]) -> Any:
    """A configuration's tree with other names of the weight and model files in it."""
    if isinstance(tree, dict):
        return {key: with_files(value, rename) for key, value in tree.items()}
    if isinstance(tree, list):
        return [with_files(value, rename) for value in tree]
    if isinstance(tree, str) and tree.startswith(_TOWERS):
        return _TOWER_FILE.sub(lambda found: found[1] + rename(found[2]), tree)
    return rename(tree) if isinstance(tree, str) and Path(tree).suffix in _FILES else tree


def _in_home(name: str) -> Path:
    """The path with `~` and `~user` expanded; as it is where there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def shadowed(config: ExperimentConfig, overrides: Sequence[str]) -> list[str]:
    """Warnings about `--set` of what something else decides: a part's own settings, or the search space.

    Args:
        config: With the overrides applied.
        overrides: As on the command line.
    """
    owners = {f"parts.{name}.train": part.train for name, part in config.parts.items()}
    given = {key: value for override in overrides for key, value in flat(_parse_override(override)).items()}
    warnings = []
    for key in sorted(name.removeprefix("train.") for name in given if name.startswith("train.")):
        stay = [
            f"{owner}.{key}={value}"
            for owner, train in owners.items()
            if (value := flat(train).get(key)) is not None and f"{owner}.{key}" not in given
        ]
        if stay:
            warnings.append(f"warning: --set train.{key} does not reach {', '.join(stay)}; set these as well")
    for key, choice in config.tune.space.items():
        name = f"tune.{key}" if key.startswith("train.") else key
        if name in given and not (choice.values and len(choice.values) == 1 and choice.example == given[name]):
            warnings.append(
                f"warning: --set {name} counts for the first trial of 'dsmip tune' alone: tune.space draws {key} for "
                "the others; set it there too"
            )
    return warnings


def parse_config(tree: Mapping[str, Any], source: str = "configuration") -> ExperimentConfig:
    """Validates a mapping, the search space with a value of each key included.

    Raises:
        UserError: Keys are wrong; each is named.
    """
    _log.debug("%s is parsed", source)
    config = _parse(tree, source)
    for key, choice in config.tune.space.items():
        swept(config, {key: choice.example}, f"{source}, tune.space")
    return config


def swept(config: ExperimentConfig, changes: Mapping[str, Any], source: str = "tune.space") -> ExperimentConfig:
    """The configuration of a trial: `changes` by dotted key, of `system` or of the stage-two training (`train.<name>`).

    Raises:
        UserError: Another key: stage one is over when a sweep starts.
    """
    tree = config.model_dump(mode="json")
    for key, value in changes.items():
        path = key.split(".")
        if path[0] not in ("system", "train") or len(path) == 1:
            raise UserError(
                f"{source}: '{key}' cannot be searched; keys are train.<name> (of stage two) and system.<name>"
            )
        section = tree["tune"] if path[0] == "train" else tree
        for step in path[:-1]:
            section = section.setdefault(step, {})
            if not isinstance(section, dict):
                raise UserError(f"{source}: '{key}' is no key of the configuration: '{step}' has no keys below it")
        section[path[-1]] = value
    return _parse(tree, source)


def _parse(tree: Mapping[str, Any], source: str) -> ExperimentConfig:
    model = tree.get("model")
    if not isinstance(model, str):
        raise UserError(f"{source}: the key 'model' must name a system")
    for key, value in flat(tree).items():
        refuse_secret(str(value), f"{source}: {key}")
    system = find_system(model)
    section = validated(system.config_class, tree.get("system") or {}, source, "system.")
    config = validated(ExperimentConfig, {**tree, "system": section}, source, "")
    names = system.part_names(section)
    for name, part in config.parts.items():
        if name not in names:
            raise UserError(f"{source}: unknown part 'parts.{name}'; {model} has {', '.join(names)}")
        validated(TrainConfig, deep_merged(config.train.model_dump(), part.train), source, f"parts.{name}.train.")
    validated(TrainConfig, deep_merged(config.train.model_dump(), config.tune.train), source, "tune.train.")
    return config


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set takes key=value (for example train.epochs=5), got '{text}'")
    parsed = parse_yaml(value, f"--set {key}: the value", _Loader)
    names = key.split(".")
    if len(names) > _MAX_DEPTH:
        raise UserError(f"--set {key[:40]}...: {len(names)} names in one another; no key is so deep")
    for name in reversed(names):
        parsed = {name: parsed}
    return dict(parsed)
