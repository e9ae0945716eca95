"""What a field of a checkpoint's JSON must be, and the one error that says so."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a field must be: in the words of an error, and as a test."""

    text: str
    holds: Callable[[Any], bool]

    @property
    def or_null(self) -> "Kind":
        """This, or null."""
        return Kind(f"{self.text} or null", lambda value: value is None or self.holds(value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


BOOL = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a number", _is_number)
POSITIVE = Kind("a positive number", lambda value: _is_number(value) and value > 0)
SIZE = Kind("a positive integer", lambda value: _is_index(value) and value > 0)
INDEX = Kind("an integer of at least 0", _is_index)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
TEXT = Kind("text", lambda value: isinstance(value, str))
TEXTS = Kind(
    "a list of texts", lambda value: isinstance(value, list) and all(isinstance(entry, str) for entry in value)
)


def field_problems(settings: Mapping[str, Any], kinds: Mapping[str, Kind]) -> list[str]:
    """Which fields are there and are not of their kind, each with expected and got."""
    return [
        f"expected {name} to be {kind.text}, got {settings[name]!r}"
        for name, kind in kinds.items()
        if name in settings and not kind.holds(settings[name])
    ]


def read_field(settings: Mapping[str, Any], name: str, kind: Kind, path: pathlib.Path) -> Any:
    """One field; None where it is null or not there, which stands for the default.

    Args:
      settings: What the file holds.
      name: The field's.
      kind: What it must be.
      path: The file, for the error.

    Raises:
      ValueError: It is of another kind.
    """
    value = settings.get(name)
    if value is not None and not kind.holds(value):
        raise ValueError(f"expected {name} in {path} to be {kind.text}, got {value!r}")
    return value
