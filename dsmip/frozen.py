"""Validated frozen data: the base of all configuration classes; errors name the key and the nearest valid one."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from dsmip.errors import UserError


class Frozen(BaseModel):
    """Base of every configuration class: immutable, unknown keys are errors, defaults are validated too.

    added: fields that came after results had been stored, each with the value (as in YAML) that means what was before:
    with it, keys stay what they were (`dsmip.keys.key_tree`).
    """

    added: ClassVar[Mapping[str, Any]] = {}

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


Config = TypeVar("Config", bound=BaseModel)


def validated(config_class: type[Config], tree: Any, source: str, prefix: str) -> Config:
    """A validated object of `tree`; UserError names each wrong key below `prefix`."""
    try:
        return config_class.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_explain(detail, config_class, prefix) for detail in error.errors())
        raise UserError(f"{source}: {problems}") from error


def _explain(detail: ErrorDetails, root: type[BaseModel], prefix: str) -> str:
    place = prefix + ".".join(str(part) for part in detail["loc"])
    if detail["type"] != "extra_forbidden":
        return f"{place.rstrip('.')}: {detail['msg'].removeprefix('Value error, ')}"
    valid = _keys_at(root, detail["loc"][:-1])
    near = difflib.get_close_matches(str(detail["loc"][-1]), valid, n=1, cutoff=0.0)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"unknown key '{place}'{hint} (valid here: {', '.join(valid)})"


def _keys_at(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    for step in path:
        field = model.model_fields.get(str(step))
        inner = _model_in(field.annotation) if field else None
        if inner is None:
            continue
        model = inner
    return sorted(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        if (found := _model_in(argument)) is not None:
            return found
    return None
