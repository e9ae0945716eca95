"""`fdpp-jax generate`: texts, speed, and which softmax decodes."""

import functools
import pathlib
import shutil
import sys
import types

import numpy as np
import pytest
from calibration_case import calibration_of
from cli_case import FIXTURES, make_checkpoint, run

from fdpp_jax import UnifiedMax, calibration, cli
from fdpp_jax.cli import generate
from fdpp_jax.generation import GenerationResult, StreamChunk


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("checkpoint")))


class _ByteTokenizer:
    """Each token is a byte of UTF-8."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def _stream(rows, chunk_sizes, lengths):
    """Chunks of the rows' bytes, as generation.stream yields them."""
    tokens = np.array([list(row) for row in rows], np.int32)  # [B, n]
    position = 0
    for size in chunk_sizes:
        so_far = np.minimum(lengths, position + size).astype(np.int32)
        yield StreamChunk(tokens[:, position : position + size], so_far)
        position += size
    return types.SimpleNamespace(tokens=tokens)


def test_text_streams_without_broken_characters(capsys, monkeypatch):
    pieces = []
    monkeypatch.setattr(sys.stdout, "write", pieces.append)
    # The two bytes of e with acute come in two chunks.
    generate.print_stream(_stream(["caf\u00e9!".encode()], [4, 2], [6]), [list(b"> ")], _ByteTokenizer())
    monkeypatch.undo()
    assert [piece for piece in pieces if piece] == ["> caf", "\u00e9!", "\n\n"]


def test_several_prompts_are_printed_when_they_end(capsys):
    chunks = _stream([b"ab....", b"cdefgh"], [1, 2, 3], [2, 6])
    generate.print_stream(chunks, [list(b"1 "), list(b"2 ")], _ByteTokenizer())
    assert capsys.readouterr().out == "[1 of 2] 1 ab\n\n[2 of 2] 2 cdefgh\n\n"


def test_speed_counts_decoded_tokens_only(capsys):
    result = GenerationResult(
        tokens=np.zeros((2, 8), np.int32),
        lengths=np.array([8, 3]),
        recomputed_steps=1,
        softmax_reason="unified, as asked",
        online_from=None,
        decode_steps=7,
        prefill_seconds=0.5,
        decode_seconds=0.25,
        compile_seconds=2.0,
        cache_capacity=64,
    )
    generate.print_speed(result, [10, 5])
    assert capsys.readouterr().out == (
        "prefill  15 tokens in 0.500 s: 30.0 tokens/s\n"
        "decode   9 tokens in 0.250 s: 36.0 tokens/s, 35.71 ms a step\n"
        "compile  2.0 s\n"
        "recomputed steps: 1 of 7\n\n"
    )


def _generate(capsys, checkpoint, *argv):
    """stdout of generate: the text, and what follows it."""
    code, out, err = run(capsys, "generate", "--model", checkpoint, "--ignore-eos", *argv)
    assert code == 0, err
    text, _, report = out.partition("prefill  ")
    return text, report


def test_generate_reports_speed_kernels_and_recomputes(capsys, checkpoint):
    text, report = _generate(capsys, checkpoint, "--prompt", "def ", "--max-new-tokens", "12")
    assert text.startswith("def ")
    for expected in ("4 tokens in", "11 tokens in", "tokens/s", "recomputed steps: 0 of 11", "attention", "gate_up"):
        assert expected in report


def test_softmax_changes_the_recomputed_steps_and_not_the_text(capsys, checkpoint):
    argv = ["--prompt", "class ", "--max-new-tokens", "8"]
    online, report = _generate(capsys, checkpoint, *argv, "--softmax", "online")
    assert "recomputed steps: 0 of 7" in report
    for softmax, recomputed in ((["--phi", "500"], 7), (["--softmax", "bound"], 0), (["--softmax", "unified"], 0)):
        text, report = _generate(capsys, checkpoint, *argv, *softmax)
        assert text == online
        assert f"recomputed steps: {recomputed} of 7" in report


def test_a_phi_that_fails_too_often_is_warned_of(capsys, checkpoint):
    argv = ["generate", "--model", str(checkpoint), "--prompt", "class ", "--max-new-tokens", "80", "--phi", "500"]
    assert cli.main(argv) == 0
    err = capsys.readouterr().err
    assert "fdpp-jax: warning: 8 of the latest 8 decode steps left the safe window" in err
    assert cli.main([*argv[:-3], "8", "--phi", "500"]) == 0
    err = capsys.readouterr().err
    assert "fdpp-jax: warning: 7 of the latest 7 decode steps left the safe window" in err


def test_chat_fills_in_the_template_and_defaults_come_from_the_checkpoint(capsys, checkpoint, tmp_path):
    directory = pathlib.Path(shutil.copytree(checkpoint, tmp_path / "chat"))
    template = "{% for m in messages %}{{ m.role[0] }}={{ m.content }};{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    (directory / "generation_config.json").write_text('{"do_sample": true, "temperature": 2.0}')
    argv = ["--chat", "--system", "a", "--prompt", "b", "--max-new-tokens", "8"]
    sampled, _ = _generate(capsys, str(directory), *argv)
    assert sampled.startswith("s=a;u=b;")
    assert sampled != _generate(capsys, str(directory), *argv, "--temperature", "0")[0]


@pytest.mark.parametrize("flags", [["--top-p", "0.99"], ["--top-k", "100"]])
def test_a_filter_alone_samples_at_temperature_1(capsys, checkpoint, flags):
    argv = ["--prompt", "x", "--max-new-tokens", "8", *flags]
    text = _generate(capsys, checkpoint, *argv)[0]
    assert text == _generate(capsys, checkpoint, *argv, "--temperature", "1")[0]
    assert text != _generate(capsys, checkpoint, *argv, "--temperature", "0")[0]


def test_sampling_follows_the_seed(capsys, checkpoint):
    argv = ["--prompt", "x", "--max-new-tokens", "8", "--temperature", "2", "--top-k", "50", "--top-p", "0.9"]
    texts = [_generate(capsys, checkpoint, *argv, "--seed", seed)[0] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_a_batch_gives_each_prompt_its_own_text(capsys, checkpoint):
    argv = ["--max-new-tokens", "6", "--dtype", "float32"]
    alone = [_generate(capsys, checkpoint, "--prompt", prompt, *argv)[0].rstrip("\n") for prompt in ("ab", "cdefg")]
    together, report = _generate(capsys, checkpoint, "--prompt", "ab", "--prompt", "cdefg", *argv)
    assert together.rstrip("\n") == f"[1 of 2] {alone[0]}\n\n[2 of 2] {alone[1]}"
    assert "10 tokens in" in report


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--temperature", "-1"], "temperature"),
        (["--top-k", "0"], "top_k"),
        (["--max-new-tokens", "1000000"], "max_position_embeddings"),
    ],
)
def test_bad_values_are_refused(capsys, checkpoint, argv, message):
    code, out, err = run(capsys, "generate", "--model", checkpoint, "--prompt", "x", *argv)
    assert (code, out) == (2, "")
    assert message in err


def test_generate_with_the_bundled_model(capsys):
    code, out, err = run(capsys, "generate", "--prompt", "def ", "--max-new-tokens", "10")
    assert code == 0, err
    assert out.startswith("def ")
    assert "Kernels of a decode step" in out


def test_which_softmax_generate_takes(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    choose = functools.partial(generate.choose_softmax, directory=checkpoint, dtype="bfloat16")
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
    policy, why = generate.choose_softmax("auto", None, FIXTURES / "opt", "bfloat16")
    assert policy is None
    assert why.startswith(
        "online, OPT's scores are known to spread too far for one phi (OPT-6.7B: -496.8 .. 363.5): no"
    )
    assert why.endswith("which `fdpp-jax calibrate` would write")
    policy, why = generate.choose_softmax("auto", None, FIXTURES / "gemma2", "bfloat16")
    assert policy == UnifiedMax(-34.0)  # 5 + ln 128 - 44.4, and up
    assert why.startswith("unified, phi -34, with scores capped at 5 no row of 128 keys exceeds the window: no fdpp")
