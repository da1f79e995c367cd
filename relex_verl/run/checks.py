"""What a value of a key may be, and how a wrong one is refused."""

import math
from collections.abc import Mapping, Sequence

__all__ = ["ConfigError", "is_list", "is_number", "is_whole", "one_of", "whole"]


class ConfigError(ValueError):
    """A key under `relex` (or a verl key that RELEX depends on) with a value that cannot work: key, value, cure."""

    def __init__(self, key: str, value: object, cure: str) -> None:
        super().__init__(f"{key}={value!r}: {cure}")
        self.key = key


def is_list(value: object) -> bool:
    """Any sequence but a string."""
    return not isinstance(value, str) and hasattr(value, "__iter__") and not isinstance(value, Mapping)


def is_number(value: object) -> bool:
    """A number, which NaN is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def is_whole(value: object) -> bool:
    """A whole number, also if it is written with a point."""
    return isinstance(value, int | float) and is_number(value) and math.isfinite(value) and value == int(value)


def whole(key: str, value: object, least: int, cure: str) -> None:
    """Refuse what is no whole number of at least so much."""
    if not is_whole(value) or int(value) < least:  # type: ignore[call-overload]
        raise ConfigError(key, value, cure)


def one_of(key: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse what is not among these."""
    if value not in allowed:
        raise ConfigError(key, value, f"give one of {', '.join(allowed)}")
