"""`fdpp-jax calibrate`, and what `generate` makes of its file."""

import functools
import importlib.util
import os
import pathlib
import re
import shutil
import signal

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import tokenizers.decoders
import tokenizers.models
from calibration_case import calibration_of

from fdpp_jax import UnifiedMax, calibration, cli, cli_calibrate

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "llama3_gqa"


@pytest.fixture
def checkpoint(tmp_path):
    """A random LLaMA of two layers with a tokenizer of single ASCII characters."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, directory)
    vocabulary = {chr(code): code for code in range(127)} | {"?": 127}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="?"))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def texts(tmp_path):
    directory = tmp_path / "texts"
    (directory / ".hidden").mkdir(parents=True)
    (directory / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 3)
    (directory / "b.txt").write_text("Sphinx of black quartz, judge my vow")
    (directory / "c.bin").write_bytes(b"\xff\xfe\xff")
    (directory / ".hidden" / "d.txt").write_text("x" * 1000)
    return directory


def run(capsys, *argv):
    code = cli.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def calibrate_command(checkpoint, texts, *argv):
    flags = ("--samples", 5, "--length", 24, "--batch", 2, "--dtype", "float32")
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
    assert "recomputed steps: 0 of 3" in out
    assert f"softmax: unified, phi {found.unified_max().phi:.2f}, calibrated: ln den from" in err


def test_which_softmax_generate_takes(checkpoint):
    choose = functools.partial(cli_calibrate.choose_softmax, directory=checkpoint, dtype="bfloat16")
    path = checkpoint / calibration.FILE_NAME
    policy, why = choose("auto", None)
    assert policy == UnifiedMax()
    assert why.startswith(
        "unified, phi 6, the default: no fdpp_calibration.json beside the checkpoint, which `fdpp-jax"
    )
    assert calibration.load_for(checkpoint) is None

    calibration_of([[-10.0] * 4] * 2, [[30.0] * 4] * 2).save(path)
    assert choose("unified", None) == (UnifiedMax(), "unified, phi 6, as asked")
    assert choose("auto", 2.5) == choose("unified", 2.5) == (UnifiedMax(2.5), "unified, phi 2.5, as asked")
    assert choose("bound", None) == (UnifiedMax.bound(), "bound, as asked")
    assert choose("online", None) == (None, "online, as asked")
    policy, why = choose("auto", None)
    assert policy == UnifiedMax(10.0)
    assert why.startswith("unified, phi 10.00, calibrated: ln den from -10.0 to 30.0")
    policy, why = choose("auto", None, dtype="float16")  # whose window is narrower
    assert policy is None
    assert why.startswith("online, since no phi fits fdpp_calibration.json: ln den from -10.0 to 30.0")
    assert calibration.load_for(checkpoint, dtype="float16") is None

    apart = [[-200.0] * 4, [200.0] * 4]  # the layers
    calibration_of(apart, apart).save(path)
    policy, why = choose("auto", None)
    np.testing.assert_allclose(policy.phi, [[[-200.0]], [[200.0]]])
    assert why.startswith(
        "unified, a phi each layer (-200.00 .. 200.00), none for all, calibrated: layer 0: ln den from"
    )
    apart = [[-200.0, -200.0, 200.0, 200.0]] * 2  # the heads
    calibration_of(apart, apart).save(path)
    policy, why = choose("auto", None)
    np.testing.assert_allclose(policy.phi, np.array(apart)[:, None])
    assert why.startswith("unified, a phi each head (-200.00 .. 200.00), none for all, calibrated: layer 0, head 0: ln")

    calibration_of([[0.0]], [[1.0]]).save(path)
    with pytest.raises(ValueError, match=r"\(layers, heads\) = \(2, 4\), got \(1, 1\)"):
        choose("auto", None)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"fdpp_calibration\.json is not a calibration: format is missing"):
        choose("auto", None)


def test_what_a_family_is_known_for_stands_in_for_a_calibration():
    policy, why = cli_calibrate.choose_softmax("auto", None, FIXTURE.parent / "opt", "bfloat16")
    assert policy is None
    assert why.startswith(
        "online, OPT's scores are known to spread too far for one phi (OPT-6.7B: -496.8 .. 363.5): no"
    )
    assert why.endswith("which `fdpp-jax calibrate` would write")
    policy, why = cli_calibrate.choose_softmax("auto", None, FIXTURE.parent / "gemma2", "bfloat16")
    assert policy == UnifiedMax(-34.0)  # 5 + ln 128 - 44.4, and up
    assert why.startswith("unified, phi -34, with scores capped at 5 no row of 128 keys exceeds the window: no fdpp")


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


def test_data_without_text_is_refused(capsys, checkpoint, texts, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for data, message in ((tmp_path / "empty.txt", "expected text"), (texts / "c.bin", "is not text in UTF-8")):
        code, _, err = run(capsys, *calibrate_command(checkpoint, data))
        assert code == 2
        assert message in err


def test_nothing_is_written_beside_the_bundled_model(capsys, texts):
    code, _, err = run(capsys, "calibrate", "--data", texts)
    assert code == 2
    assert "where nothing is written: name an --output" in err
