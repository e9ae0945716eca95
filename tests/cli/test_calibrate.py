"""`fdpp-jax calibrate`, and that `generate` takes its file."""

import importlib.util
import os
import pathlib
import re
import signal

import pytest
import safetensors.numpy
from cli_case import make_checkpoint, run

from fdpp_jax import calibration
from fdpp_jax.cli import calibrate


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def texts(tmp_path):
    directory = tmp_path / "texts"
    (directory / ".hidden").mkdir(parents=True)
    (directory / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 3)
    (directory / "b.txt").write_text("Sphinx of black quartz, judge my vow")
    (directory / "c.bin").write_bytes(b"\xff\xfe\xff")
    (directory / ".hidden" / "d.txt").write_text("x" * 1000)
    return directory


def calibrate_command(checkpoint, texts, *argv):
    flags = ("--samples", 5, "--length", 24, "--batch", 2, "--dtype", "float32", "--min-tokens", 90)
    return ("calibrate", "--model", checkpoint, "--data", texts, *flags, *argv)


def test_calibrate_then_generate_takes_it(capsys, checkpoint, texts, tmp_path):
    code, out, err = run(capsys, *calibrate_command(checkpoint, texts))
    assert code == 0, err
    for expected in ("Scores in nats", "ln den", "model", "layer", "head", "unified max", "wrote "):
        assert expected in out
    found = calibration.find(checkpoint)
    # 6 pieces of a.txt (135 characters), of 24 but the last; 2 of b.txt: 5 of these 8.
    assert found.data.startswith("5 pieces of 24 tokens from texts, sha256 ")
    assert (found.num_sequences, found.num_tokens) == (5, 24 * 5)
    assert calibration.load_for(checkpoint) == found.unified_max()
    assert calibration.load_for(checkpoint, level="layer").phi.shape == (2, 1, 1)

    argv = ("generate", "--model", checkpoint, "--prompt", "The ", "--max-new-tokens", 4)
    code, out, err = run(capsys, *argv)
    assert code == 0
    assert "; 0 of 3 steps recomputed" in err
    assert f"softmax: unified, phi {found.unified_max().phi:.2f}, calibrated: ln den from" in err


def test_ctrl_c_leaves_a_file_that_the_same_command_goes_on_with(capsys, monkeypatch, checkpoint, texts, tmp_path):
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    assert run(capsys, *calibrate_command(checkpoint, texts, "--output", whole))[0] == 0
    record = calibration._record
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return record(*arguments)

    monkeypatch.setattr(calibration, "_record", interrupted)
    command = calibrate_command(checkpoint, texts, "--output", parts)
    code, _, err = run(capsys, *command)
    assert code == 130
    assert "parts.json.partial has the first 2; the same command goes on" in err
    assert not parts.exists()
    code, _, err = run(capsys, *calibrate_command(checkpoint, texts, "--output", parts, "--samples", 4))
    assert code == 2
    assert "parts.json.partial holds another run, of 5 pieces" in err
    code, _, err = run(capsys, *command)
    assert code == 0, err
    assert len(calls) == 2 + 2
    assert parts.read_text() == whole.read_text()
    assert not (tmp_path / "parts.json.partial").exists()


def other_weights(checkpoint):
    """Another checkpoint of the same shapes, in its place."""
    weights = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    safetensors.numpy.save_file({name: x * 2 for name, x in weights.items()}, checkpoint / "model.safetensors")


def test_sigterm_leaves_one_too_that_other_weights_do_not_go_on_with(capsys, monkeypatch, checkpoint, texts, tmp_path):
    def killed(*arguments):
        result = record(*arguments)
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    record, calls, before = calibration._record, [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(calibration, "_record", killed)
    command = calibrate_command(checkpoint, texts, "--output", tmp_path / "o.json")
    code, _, err = run(capsys, *command)
    assert code == 130
    assert "o.json.partial has the first 2; the same command goes on" in err
    assert signal.getsignal(signal.SIGTERM) is before
    other_weights(checkpoint)
    code, _, err = run(capsys, *command)
    assert code == 2
    assert "o.json.partial holds another run" in err
    assert len(calls) == 2


def test_generate_refuses_a_calibration_of_other_weights(capsys, checkpoint, texts):
    assert run(capsys, *calibrate_command(checkpoint, texts))[0] == 0
    path = checkpoint / calibration.FILE_NAME
    assert calibration.find(checkpoint).weights == calibration.Calibration.load(path).weights != ""
    other_weights(checkpoint)
    code, out, err = run(capsys, "generate", "--model", checkpoint, "--prompt", "The ")
    assert (code, out) == (2, "")
    assert f"{path} must be of the weights beside it, " in err


def test_output_that_cannot_be_written_is_refused_before_the_run(capsys, monkeypatch, checkpoint, texts, tmp_path):
    monkeypatch.setattr(calibration, "_record", None)
    path = checkpoint / calibration.FILE_NAME
    path.mkdir()
    code, _, err = run(capsys, *calibrate_command(checkpoint, texts))
    assert (code, err) == (2, f"fdpp-jax: error: expected a file, got the directory {path}; name another --output\n")
    path.rmdir()
    monkeypatch.setattr(os, "access", lambda path, mode: pathlib.Path(path) != checkpoint)
    code, _, err = run(capsys, *calibrate_command(checkpoint, texts))
    assert (code, err) == (2, f"fdpp-jax: error: no permission to write {path}; name another --output\n")
    path.touch()  # is writable, but the partial file beside it is not
    code, _, err = run(capsys, *calibrate_command(checkpoint, texts))
    assert (code, err) == (2, f"fdpp-jax: error: no permission to write {path}.partial; name another --output\n")


def test_a_plot_that_matplotlib_cannot_write_is_refused(capsys, monkeypatch, checkpoint, texts, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(calibration, "_record", None)
    for name, kind in (("x.foo", "foo"), ("x", "")):
        code, _, err = run(capsys, *calibrate_command(checkpoint, texts, "--plot", tmp_path / name))
        assert code == 2
        assert re.search(rf"--plot must end in one of .*, pdf, .*, png, .*; got '{kind}' in .*{name}\n", err)


def test_plot_is_a_png(capsys, monkeypatch, checkpoint, texts, tmp_path):
    pytest.importorskip("matplotlib")
    command = calibrate_command(checkpoint, texts, "--plot", tmp_path / "scores.png", "--output", tmp_path / "o.json")
    assert run(capsys, *command)[0] == 0
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--min-tokens", "0"], "--min-tokens must be at least 1, got 0"),
        (["--min-tokens", "121"], "expected at least 121 tokens, got 120: .* or a lower --min-tokens"),
        (["--length", "513"], "513 tokens a sequence need as many positions"),
        (["--data", "no/such/file"], "--data must be a file or a directory, got no/such/file"),
        (["--plot", "x.png"], r"--plot needs matplotlib: pip install 'fdpp-jax\[plots\]'"),
        (["--model", "llama-2-7b"], "llama-2-7b is a preset of shapes without weights"),
    ],
)
def test_calibrate_refuses(capsys, monkeypatch, checkpoint, texts, argv, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = run(capsys, *calibrate_command(checkpoint, texts, *argv))
    assert (code, out) == (2, "")
    with pytest.raises(ValueError, match=message):
        raise ValueError(err)


def test_few_tokens_are_refused_before_the_run_unless_told(capsys, monkeypatch, checkpoint, texts):
    record = calibration._record
    monkeypatch.setattr(calibration, "_record", None)
    command = ("calibrate", "--model", checkpoint, "--data", texts, "--length", 24, "--samples", 1)
    code, out, err = run(capsys, *command)
    assert (code, out) == (2, "")
    assert "expected at least 1024 tokens, got 24: " in err
    assert "give more text, or a lower --min-tokens" in err
    monkeypatch.setattr(calibration, "_record", record)
    code, out, err = run(capsys, *command, "--min-tokens", 24)
    assert code == 0, err
    assert "of only 24 tokens" in out


def test_data_without_text_is_refused(capsys, checkpoint, texts, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for data, message in ((tmp_path / "empty.txt", "expected text"), (texts / "c.bin", "is not text in UTF-8")):
        code, _, err = run(capsys, *calibrate_command(checkpoint, data))
        assert code == 2
        assert message in err


def test_a_byte_order_mark_is_none_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab")
    assert list(calibrate._texts(tmp_path)) == list(calibrate._texts(tmp_path / "a.txt")) == ["ab"]


def test_pointers_are_no_text(capsys, checkpoint, texts):
    pointer = texts / "0.txt"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for data in (texts, pointer):
        code, out, err = run(capsys, *calibrate_command(checkpoint, data))
        assert (code, out) == (2, "")
        assert err.startswith(f"fdpp-jax: error: expected the files themselves in {texts}, got git-lfs pointers for 0.")
        assert err.count("\n") == 1


def test_nothing_is_written_beside_the_bundled_model(capsys, texts):
    code, _, err = run(capsys, "calibrate", "--data", texts)
    assert code == 2
    assert "where nothing is written: name an --output" in err
