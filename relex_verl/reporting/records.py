"""What relex-verl writes as JSON and reads again: dataclasses, strict on the way out, checked on the way in."""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from relex_verl.maths.extrapolators import Prediction

__all__ = ["IF_KNOWN", "Record", "RecordError", "strict"]

R = TypeVar("R", bound="Record")
# Metadata of a field that is left out of the file where it is None.
IF_KNOWN = {"written": "if known"}
NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}
NAMES[bool] = "true or false"


class RecordError(ValueError):
    """A file that is not what it should be: which one, which key, and what is wrong with it."""


class Record:
    """A dataclass that is one JSON file; its fields are the keys.

    A field without a default has to be there when it is read. `schema_version` is the newest that is understood; a file
    without it is of version 1, as 0.1.0 wrote it. Keys that are not known are passed over.
    """

    schema_version: int

    @classmethod
    def read(cls: type[R], path: Path) -> R:
        """Read a file.

        Raises:
            OSError: it cannot be opened.
            RecordError: it is no JSON, newer than this version, or lacks what a reader needs.
        """
        text = path.read_bytes()
        try:
            content = json.loads(text)
        except ValueError as error:
            raise RecordError(f"{path} is damaged: {error}") from None
        return cls.from_json(content, str(path))

    @classmethod
    def from_json(cls: type[R], content: Any, where: str = "the content") -> R:
        """What some JSON says.

        Args:
            content: as `json.loads` gives it.
            where: what to call it in an error.

        Raises:
            RecordError: see `read`.
        """
        newest, version = cls.schema_version, content.get("schema_version", 1) if isinstance(content, dict) else 1
        if not isinstance(version, int) or not 1 <= version <= newest:
            raise RecordError(
                f"{where} has schema_version {version!r}, this relex-verl reads up to {newest}: it was written by a newer "
                "one, install that"
            )
        read: R = _value(cls, content, where, "")
        return read

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`, by `strict`."""
        content: dict[str, Any] = strict(self)
        return content


def strict(content: Any) -> Any:
    """The same as JSON knows it: dataclasses become objects, predictions the names of their folders, NaN becomes null.

    JSON has no word for numbers that are not finite.
    """
    if isinstance(content, Prediction):
        return content.folder_name
    if is_dataclass(content):
        written = [
            of.name for of in fields(content) if of.metadata != IF_KNOWN or getattr(content, of.name) is not None
        ]
        return {name: strict(getattr(content, name)) for name in written}
    if isinstance(content, Mapping):
        return {str(key): strict(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [strict(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _value(kind: Any, content: Any, where: str, key: str) -> Any:
    """JSON as a value of this type; null is NaN where a number has to be."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or (content is None and type(None) in arguments):
        return content
    if origin in (Union, UnionType):
        return _value(arguments[0], content, where, key)  # X of X | None
    if kind is float and content is None:
        return math.nan
    shape = str if kind is Prediction else dict if is_dataclass(kind) else origin or kind
    if not _is(shape, content):
        said = f"{where} is damaged: {key or 'it'} has to be {NAMES[shape]}"
        raise RecordError(f"{said}, not {json.dumps(content)[:80]}")
    if origin is list:
        return [_value(arguments[0], value, where, f"{key}[{i}]") for i, value in enumerate(content)]
    if origin is dict:
        return {name: _value(arguments[1], value, where, f"{key}[{name!r}]") for name, value in content.items()}
    if kind is Prediction:
        return _prediction(content, where, key)
    return _fields(kind, content, where, key) if is_dataclass(kind) else kind(content)


def _is(shape: type, content: Any) -> bool:
    return isinstance(content, (int, float) if shape is float else shape)


def _fields(kind: Any, content: Mapping[str, Any], where: str, key: str) -> Any:
    """JSON as a dataclass."""
    types, values = get_type_hints(kind), {}
    for of in fields(kind):
        inner = f"{key}.{of.name}" if key else of.name
        if of.name in content:
            values[of.name] = _value(types[of.name], content[of.name], where, inner)
        elif of.default is MISSING and of.default_factory is MISSING:
            raise RecordError(f"{where} lacks {inner}")
    return kind(**values)


def _prediction(name: str, where: str, key: str) -> Prediction:
    """Method and target, as the name of a folder says them; rank and first step it does not know."""
    method, _, step = name.rpartition("-step_")
    if not method or not step.isdecimal():
        raise RecordError(f"{where} is damaged: {key}: {name!r} is no prediction's name, such as 'relex-step_500'")
    return Prediction(method, int(step))
