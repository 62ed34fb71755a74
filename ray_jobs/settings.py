"""The experiment configuration of a job: read on the command line, sent to workers as text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dsmip.config import ExperimentConfig, load_config, parse_config

_FILES = {".json", ".pt", ".pth", ".safetensors"}


def job_config(name_or_path: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """A configuration whose file names are absolute: workers live in other folders than the command line.

    Raises UserError as `load_config` does.
    """
    config = load_config(name_or_path, overrides)
    return parse_config(_absolute(config.model_dump(mode="json")))


def read_config(text: str) -> ExperimentConfig:
    """The configuration that `ExperimentConfig.to_yaml` wrote."""
    return parse_config(yaml.safe_load(text))


def _absolute(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _absolute(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_absolute(value) for value in tree]
    if isinstance(tree, str) and Path(tree).suffix in _FILES and Path(tree).is_file():
        return str(Path(tree).resolve())
    return tree
