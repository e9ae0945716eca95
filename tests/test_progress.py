"""The bar, and lines between."""

import sys

import pytest

from fdpp_jax import progress


@pytest.mark.parametrize("is_shown", [None, False, True])
def test_a_bar_is_shown_on_stderr_where_it_is_wanted(capsys, is_shown):
    with progress.bar("Tuning", total=3, done=1, is_shown=is_shown) as update:
        update(title="qkv")
        update(done=3)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("3/3" in err and "qkv" in err) == (is_shown is True)  # stderr is no terminal here
    assert err == "" or is_shown


def test_a_terminal_has_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.bar("Loading", total=1) as update:
        update(done=1)
    assert "Loading" in capsys.readouterr().err


def test_a_line_names_who_says_it(capsys):
    progress.say("bench", "time")
    assert capsys.readouterr() == ("", "bench: time\n")
