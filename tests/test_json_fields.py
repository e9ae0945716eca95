"""The reader of JSON fields: its kinds, and what its errors say."""

import pathlib

import pytest

from fdpp_jax import json_fields
from fdpp_jax.json_fields import INDEX, LIST, NUMBER, OBJECT, POSITIVE, SIZE, TEXT, equal_to, one_of, read_field


@pytest.mark.parametrize(
    ("kind", "values", "others"),
    [
        (SIZE, [1, 7], [0, -1, 1.0, True, "1", None]),
        (INDEX, [0, 7], [-1, 0.0, False]),
        (NUMBER, [-1, 0.5], [True, float("nan"), float("inf"), "0"]),
        (POSITIVE, [1, 0.5], [0, -0.5, True]),
        (TEXT.or_null, ["", None], [0, []]),
        (LIST, [[]], [{}, "", None]),
        (one_of("a", "b"), ["a", "b"], ["c", None, ["a"]]),
        (equal_to(1), [1], [2, True, "1"]),
        (equal_to("H200"), ["H200"], ["H100", None]),
    ],
    ids=lambda value: getattr(value, "text", ""),
)
def test_kinds(kind, values, others):
    assert all(map(kind.holds, values))
    assert not any(map(kind.holds, others))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"m": 8}, None),
        ({}, "entries[0].m is missing"),
        ({"m": None}, "expected entries[0].m to be a positive integer, got None"),
        ([8], "expected entries[0] to be an object, got [8]"),
    ],
)
def test_a_field_that_must_be_there(content, message):
    if message is None:
        assert read_field(content, "m", SIZE, "entries[0].") == 8
        return
    with pytest.raises(ValueError, match=r"^expected|missing$") as error:
        read_field(content, "m", SIZE, "entries[0].")
    assert str(error.value) == message


def test_the_whole_file_and_long_values_have_a_name_and_an_end():
    with pytest.raises(ValueError, match=r"^expected the file to be an object, got 'text'$"):
        read_field("text", "format", SIZE)
    with pytest.raises(ValueError, match=r"\.\.\.\]$") as error:
        read_field({"layers": list(range(10_000))}, "layers", OBJECT)
    assert len(str(error.value)) < 200


def test_a_field_that_may_be_missing():
    path = pathlib.Path("config.json")
    assert json_fields.read_optional_field({"eos": 2}, "eos", INDEX, path) == 2
    assert json_fields.read_optional_field({"eos": None}, "eos", INDEX, path) is None
    assert json_fields.read_optional_field({}, "eos", INDEX, path) is None
    with pytest.raises(ValueError, match=r"^expected eos in config\.json to be an integer of at least 0, got 'x'$"):
        json_fields.read_optional_field({"eos": "x"}, "eos", INDEX, path)
