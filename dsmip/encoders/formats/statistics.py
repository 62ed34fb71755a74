"""Mean and standard deviation of pixels in [0, 1], as configurations beside weights state them."""

import math
from typing import Any

from dsmip.errors import UserError

Statistic = tuple[float, ...] | None


def pixel_statistics(stated: Any, source: str, keys: tuple[str, str] = ("mean", "std")) -> tuple[Statistic, Statistic]:
    """Both, each of three colours (None where nothing is stated).

    Args:
        stated: The object that may have them.
        source: What it is called in messages.
        keys: Under which names.

    Raises:
        UserError: It is no object, or holds something else under these names.
    """
    if not isinstance(stated, dict):
        raise UserError(f"{source} must be an object, not {type(stated).__name__}")
    mean, std = (_of_three_colours(stated.get(key), f"{source}: {key}") for key in keys)
    if std is not None and min(std) <= 0:
        raise UserError(f"{source}: {keys[1]} must be above 0, not {list(std)}")
    return mean, std


def _of_three_colours(value: Any, what: str) -> Statistic:
    if value is None:
        return None
    numbers = [each for each in value if type(each) in (int, float)] if isinstance(value, list | tuple) else []
    if len(numbers) != 3 or len(value) != 3 or not all(map(math.isfinite, numbers)):
        raise UserError(f"{what} must be three numbers, not {str(value)[:80]}")
    return tuple(map(float, numbers))
