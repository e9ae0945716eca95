"""Reads the fields of JSON files: what each must be, and the one error that says so."""

import dataclasses
import math
import pathlib
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

# Long enough for what a person has written, short enough for a list of measurements.
_SHORT = reprlib.Repr(maxlist=20, maxdict=20, maxstring=200, maxother=200)


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
LIST = Kind("a list", lambda value: isinstance(value, list))
TEXT = Kind("text", lambda value: isinstance(value, str))
TEXTS = Kind(
    "a list of texts", lambda value: isinstance(value, list) and all(isinstance(entry, str) for entry in value)
)


def equal_to(expected: float | str) -> Kind:
    """One value alone."""
    return Kind(repr(expected), lambda value: not isinstance(value, bool) and value == expected)


def one_of(*choices: str) -> Kind:
    """One of several texts."""
    return Kind(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


def _problem(what: str, kind: Kind, value: object) -> str:
    return f"expected {what} to be {kind.text}, got {_SHORT.repr(value)}"


def field_problems(settings: Mapping[str, Any], kinds: Mapping[str, Kind]) -> list[str]:
    """Which fields are there and are not of their kind, each with expected and got."""
    return [
        _problem(name, kind, settings[name])
        for name, kind in kinds.items()
        if name in settings and not kind.holds(settings[name])
    ]


def read_field(content: Any, name: str, kind: Kind, where: str = "") -> Any:
    """One field, which must be there.

    Args:
      content: What the field stands in, which must be an object.
      name: The field's.
      kind: What it must be.
      where: The object's place in its file, for the error: "entries[3].".

    Raises:
      ValueError: There is no object or no such field, or the field is of another kind.
    """
    if not OBJECT.holds(content):
        raise ValueError(_problem(where.rstrip(".") or "the file", OBJECT, content))
    if name not in content:
        raise ValueError(f"{where}{name} is missing")
    if not kind.holds(content[name]):
        raise ValueError(_problem(f"{where}{name}", kind, content[name]))
    return content[name]


def read_optional_field(settings: Mapping[str, Any], name: str, kind: Kind, path: pathlib.Path) -> Any:
    """One field; None where it is null or missing, which stands for the default.

    Args:
      settings: What the file holds.
      name: The field's.
      kind: What it must be.
      path: The file, for the error.

    Raises:
      ValueError: The field is of another kind.
    """
    value = settings.get(name)
    if value is not None and not kind.holds(value):
        raise ValueError(_problem(f"{name} in {path}", kind, value))
    return value
