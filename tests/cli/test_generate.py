"""`fdpp-jax generate`: texts, the report, conversations, and which softmax decodes."""

import dataclasses
import functools
import io
import json
import pathlib
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibration_case import calibration_of
from cli_case import FIXTURES, make_checkpoint, run

from fdpp_jax import UnifiedMax, calibration, cli, decode_loop, generation, models
from fdpp_jax.cli import generate
from fdpp_jax.cli.output import kernels_line
from fdpp_jax.generation import GenerationResult, StreamChunk
from fdpp_jax.models import PRESETS, model_plans
from fdpp_jax.models.loading import read_config
from fdpp_jax.plans import device


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def _stream(rows, lengths):
    """Chunks of texts, as generation.stream yields them: of each row a piece a chunk, and a token a character."""
    num_tokens = 0
    for texts in zip(*rows, strict=True):
        size = max(map(len, texts))
        num_tokens += size
        yield StreamChunk(np.zeros((len(rows), size), np.int32), np.minimum(lengths, num_tokens), list(texts))
    return types.SimpleNamespace(texts=["".join(row) for row in rows])


def test_text_is_printed_as_it_comes(capsys, monkeypatch):
    pieces = []
    monkeypatch.setattr(sys.stdout, "write", pieces.append)
    generate.print_stream(_stream([["caf", "", "\u00e9!"]], [5]), 1, ["> "])
    monkeypatch.undo()
    assert [piece for piece in pieces if piece] == ["caf", "\u00e9!", "\n"]
    assert capsys.readouterr() == ("", "> ")


def test_several_prompts_are_printed_when_they_end(capsys):
    generate.print_stream(_stream([["ab", ""], ["cd", "efgh"]], [2, 6]), 2)
    assert capsys.readouterr() == ("[1 of 2] ab\n\n[2 of 2] cdefgh\n\n", "")


def test_an_error_stands_on_a_line_of_its_own(capsys):
    def broken():
        yield StreamChunk(np.zeros((1, 2), np.int32), np.array([2]), ["ab"])
        raise FloatingPointError("expected finite logits")

    with pytest.raises(FloatingPointError):
        generate.print_stream(broken(), 1)
    assert capsys.readouterr().out == "ab\n"


def test_an_error_before_the_text_leaves_stdout_empty(capsys):
    def broken():
        raise FloatingPointError("expected finite logits")
        yield

    with pytest.raises(FloatingPointError):
        generate.print_stream(broken(), 1)
    assert capsys.readouterr().out == ""


def test_speed_counts_decoded_tokens_only():
    result = GenerationResult(
        tokens=np.zeros((2, 8), np.int32),
        lengths=np.array([8, 3]),
        recomputed_steps=1,
        softmax_reason="unified, as asked",
        is_online=False,
        online_from=None,
        decode_steps=7,
        prefill_seconds=0.5,
        decode_seconds=0.25,
        compile_seconds=2.0,
        cache_capacity=64,
        prompts=[[0] * 10, [0] * 5],
        cached_tokens=np.array([0, 0]),
        tokenizer=lambda: None,
    )
    assert generate.speed_line(result) == (
        "decode: 9 tokens in 0.250 s, 36.0 tokens/s, 35.71 ms a step; prefill: 15 tokens in 0.500 s, 30.0 tokens/s; "
        "compilation: 2.0 s"
    )
    result = dataclasses.replace(result, cached_tokens=np.array([20, 3]))
    assert "; prefill: 15 tokens in 0.500 s, 30.0 tokens/s, behind 23 in the cache; compil" in generate.speed_line(
        result
    )


def _generate(capsys, checkpoint, *argv):
    """stdout and stderr of generate: the text, and the report."""
    code, out, err = run(capsys, "generate", "--model", checkpoint, "--ignore-eos", *argv)
    assert code == 0, err
    return out, err


def test_the_text_goes_to_stdout_and_the_report_to_stderr(capsys, checkpoint):
    argv = ["--prompt", "def ", "--max-new-tokens", "12"]
    text, report = _generate(capsys, checkpoint, *argv)
    assert len(text) == 12 + 1  # a token a character
    speed, softmax, kernels = report.splitlines()
    assert speed.startswith("fdpp-jax: decode: ")
    for expected in ("4 tokens in", "11 tokens in", "tokens/s", "ms a step"):
        assert expected in speed
    assert softmax.startswith("fdpp-jax: softmax: unified, phi 6, the default")
    assert softmax.endswith("; 0 of 11 steps recomputed")
    assert kernels == "fdpp-jax: kernels: none on cpu, plain XLA computes all (--verbose says more)"
    assert _generate(capsys, checkpoint, *argv, "--quiet") == (text, "")
    same, report = _generate(capsys, checkpoint, *argv, "--verbose")
    assert same == text
    for name in ("Kernels of a decode step on cpu", "attention", "gate_up", "no kernel for cpu"):
        assert name in report


def test_a_terminal_shows_the_prompt_before_the_text(capsys, checkpoint, monkeypatch):
    argv = ["--prompt", "def ", "--max-new-tokens", "4"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "def fdpp-jax: decode" in _generate(capsys, checkpoint, *argv)[1]
    assert _generate(capsys, checkpoint, *argv, "--quiet")[1] == ""


def test_json_has_texts_tokens_times_and_kernels(capsys, checkpoint):
    argv = ["--prompt", "def ", "--prompt", "x", "--max-new-tokens", "12"]
    text, _ = _generate(capsys, checkpoint, *argv)
    out, err = _generate(capsys, checkpoint, *argv, "--json")
    assert err == ""
    record = json.loads(out)
    assert text == "".join(f"[{i} of 2] {row['text']}\n\n" for i, row in enumerate(record["results"], start=1))
    first = record["results"][0]
    assert (first["prompt"], first["prompt_tokens"], len(first["tokens"]), first["ended"]) == ("def ", 4, 12, False)
    assert (record["model"], record["device"], record["dtype"]) == (checkpoint, "cpu", "float32")
    assert (record["decode_steps"], record["recomputed_steps"], record["online_from"]) == (11, 0, None)
    assert record["softmax"].startswith("unified, phi 6, the default")
    assert record["seconds"].keys() == {"prefill", "decode", "compile"}
    attention = next(kernel for kernel in record["kernels"] if kernel["kernel"] == "attention")
    assert (attention["backend"], attention["shape"]["batch"], attention["config"]) == ("xla", 2, None)


@pytest.mark.parametrize(
    ("changes", "batch", "line"),
    [
        ({}, 1, "kernels: attention, layer, head on A100 (--verbose says why)"),
        ({}, 17, "kernels: qkv, attention, o, gate_up, down, head on A100; plain XLA for layer (--verbose says why)"),
        (
            dict(arch="sm_75"),
            1,
            "kernels: none on A100, plain XLA computes all: no kernel for sm_75 (--verbose says more)",
        ),
        (
            dict(why_no_triton="install it"),
            1,
            "kernels: none on A100, plain XLA computes all: install it (--verbose says more)",
        ),
    ],
)
def test_the_line_on_kernels_says_what_runs(changes, batch, line):
    running = dataclasses.replace(device.by_name("A100"), **changes)
    plans = model_plans(PRESETS["qwen3-8b"], batch=batch, capacity=1024, device=running)
    assert kernels_line(plans, running) == line


def test_a_prompt_from_a_file_and_from_stdin(capsys, checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    path.write_text("a\nb\n")  # of which the last line break is none of the prompt
    expected = [_generate(capsys, checkpoint, "--prompt", text, "--quiet")[0][:-1] for text in ("x", "a\nb", "c")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"c\n")))
    argv = ["--prompt", "x", "--prompt-file", path, "--prompt", "-", "--json"]
    record = json.loads(_generate(capsys, checkpoint, *argv)[0])
    assert [row["prompt"] for row in record["results"]] == ["x", "a\nb", "c"]
    assert [row["text"] for row in record["results"]] == expected


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a\r\nb\r\n", "a\r\nb"),
        (b"\xef\xbb\xbfa\n", "a"),
        (b"a\r", "a\r"),
        (b"a\n\n", "a\n"),
        (b"\n", ""),
        (b"\xef\xbb\xbf", ""),
    ],
)
def test_what_editors_write_around_a_text_is_none_of_it(tmp_path, monkeypatch, content, text):
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    assert generate.prompt_text(path) == text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert generate.prompt_text("-") == text


def test_a_text_without_tokens(capsys, tmp_path):
    directory = make_checkpoint(tmp_path)
    (directory / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 5}, "merges": []}}')
    code, out, err = run(capsys, "generate", "--model", directory, "--prompt", "b")
    assert (code, out) == (2, "")
    assert err == "fdpp-jax: error: expected prompts of at least one token, got none for prompt 0, 'b'\n"


def test_softmax_changes_the_recomputed_steps_and_not_the_text(capsys, checkpoint):
    argv = ["--prompt", "class ", "--max-new-tokens", "8"]
    online, report = _generate(capsys, checkpoint, *argv, "--softmax", "online")
    assert "; 0 of 7 steps recomputed" in report
    for softmax, recomputed in ((["--phi", "500"], 7), (["--softmax", "bound"], 0), (["--softmax", "unified"], 0)):
        text, report = _generate(capsys, checkpoint, *argv, *softmax)
        assert text == online
        assert f"; {recomputed} of 7 steps recomputed" in report


def test_a_phi_that_fails_too_often_is_warned_of(capsys, checkpoint):
    argv = ["generate", "--model", str(checkpoint), "--prompt", "class ", "--max-new-tokens", "80", "--phi", "500"]
    assert cli.main(argv) == 0
    err = capsys.readouterr().err
    assert "fdpp-jax: warning: 8 of the latest 8 decode steps left the safe window" in err
    assert cli.main([*argv[:-3], "8", "--phi", "500"]) == 0
    err = capsys.readouterr().err
    assert "fdpp-jax: warning: 7 of the latest 7 decode steps left the safe window" in err


@pytest.fixture
def chatting(checkpoint, tmp_path):
    """A checkpoint with a chat template of one letter a role."""
    directory = pathlib.Path(shutil.copytree(checkpoint, tmp_path / "chat"))
    template = "{% for m in messages %}{{ m.role[0] }}={{ m.content }};{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    return directory


def test_chat_fills_in_the_template_and_defaults_come_from_the_checkpoint(capsys, checkpoint, chatting):
    (chatting / "generation_config.json").write_text('{"do_sample": true, "temperature": 2.0}')
    argv = ["--chat", "--system", "a", "--prompt", "b", "--max-new-tokens", "8"]
    sampled, err = _generate(capsys, chatting, *argv)
    assert err.startswith("fdpp-jax: ")  # what the user has typed is not said again
    greedy = _generate(capsys, chatting, *argv, "--temperature", "0")[0]
    assert sampled != greedy
    assert greedy == _generate(capsys, checkpoint, "--prompt", "s=a;u=b;", "--max-new-tokens", "8")[0]


def test_chat_without_a_prompt_is_a_conversation(capsys, checkpoint, chatting, monkeypatch):
    argv = ["--max-new-tokens", "8", "--quiet"]
    first = _generate(capsys, checkpoint, "--prompt", "s=a;u=b;", *argv)[0][:-1]
    second = _generate(capsys, checkpoint, "--prompt", f"s=a;u=b;a={first};u=-;", *argv)[0][:-1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffb\n\n-\n"))
    out, err = _generate(capsys, chatting, "--chat", "--system", "a", "--max-new-tokens", "8")
    assert out == f"{first}\n{second}\n"
    assert err.count("decode: ") == 1


def test_a_turn_prefills_what_is_new(capsys, chatting, monkeypatch):
    """The template puts what it likes between an answer and the next message, or writes all anew."""
    kept = "{% for m in messages %}{{ m.role[0] }}={{ m.content }};{% endfor %}a="
    without_answers = kept.replace("{% for m in messages %}", "{% for m in messages if m.role != 'assistant' %}")
    for template, cached, new in ((kept, 6 + 7, 1 + 1 + 6 + 2), (without_answers, 4, 6 + 2)):
        (chatting / "chat_template.jinja").write_text(template)
        monkeypatch.setattr(sys, "stdin", io.StringIO("b\nlmn\n"))
        _, err = _generate(capsys, chatting, "--chat", "--max-new-tokens", "8", "--verbose")
        first, second = [line for line in err.splitlines() if "prefill: " in line]
        assert "prefill: 6 tokens in" in first
        assert "in the cache" not in first
        assert f"prefill: {new} tokens in" in second
        assert f", behind {cached} in the cache;" in second


def test_each_turn_of_a_conversation_draws_anew(capsys, chatting, monkeypatch):
    (chatting / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    monkeypatch.setattr(sys, "stdin", io.StringIO("b\nb\n"))
    out, _ = _generate(capsys, chatting, "--chat", "--temperature", "5", "--max-new-tokens", "8")
    first, second = out.splitlines()
    assert first != second


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


def test_seeds_of_64_bits_are_all_different():
    seeds = [0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63)]
    assert len({jax.random.key_data(generate.seed_key(seed)).tobytes() for seed in seeds}) == len(seeds)
    np.testing.assert_array_equal(
        jax.random.key_data(generate.seed_key(2**32 - 1)), jax.random.key_data(jax.random.key(2**32 - 1))
    )


def test_a_batch_gives_each_prompt_its_own_text(capsys, checkpoint):
    argv = ["--max-new-tokens", "6", "--dtype", "float32"]
    alone = [_generate(capsys, checkpoint, "--prompt", prompt, *argv)[0].rstrip("\n") for prompt in ("ab", "cdefg")]
    together, report = _generate(capsys, checkpoint, "--prompt", "ab", "--prompt", "cdefg", *argv)
    assert together.rstrip("\n") == f"[1 of 2] {alone[0]}\n\n[2 of 2] {alone[1]}"
    assert "10 tokens in" in report


def test_a_prompt_is_prefilled_in_pieces_of_the_size_that_is_asked_for(capsys, checkpoint, chatting, monkeypatch):
    sizes, prefill_plan = [], models.CausalLM.prefill_plan

    def plan(*args, **options):
        made = prefill_plan(*args, **options)
        sizes.append(made.chunk_size)
        return made

    monkeypatch.setattr(models.CausalLM, "prefill_plan", plan)
    argv = ["--prompt", "def main", "--max-new-tokens", "4", "--quiet"]
    whole, _ = _generate(capsys, checkpoint, *argv)
    assert set(sizes) == {16}  # the width that prompts are padded to
    sizes.clear()
    assert _generate(capsys, checkpoint, *argv, "--prefill-chunk-size", "3")[0] == whole
    assert set(sizes) == {3}
    sizes.clear()
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\ndef\n"))
    _generate(capsys, chatting, "--chat", "--max-new-tokens", "4", "--quiet", "--prefill-chunk-size", "3")
    assert set(sizes) == {3}  # each turn of a conversation, too


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--prefill-chunk-size", "0"], "prefill_chunk_size must be at least 1, got 0"),
        (["--max-new-tokens", "-3"], "max_new_tokens must be at least 1, got -3"),
        (["--temperature", "-1"], "temperature"),
        (["--top-k", "0"], "top_k"),
        (["--top-k", "129", "--temperature", "1"], "top_k must be within 1..128 (the vocabulary), got 129"),
        (["--max-new-tokens", "1000000"], "max_position_embeddings"),
        (["--seed", "9223372036854775808"], "--seed must be within -2^63..2^63 - 1, got 9223372036854775808"),
        (["--seed", "99999999999999999999"], "--seed must be within -2^63..2^63 - 1, got 99999999999999999999"),
        (["--prompt", "a\udcff"], "expected UTF-8 in --prompt, got byte 0xff at position 1"),
        (["--chat", "--system", "\udcff"], "expected UTF-8 in --system, got byte 0xff at position 0"),
        (["--prompt-file", "/none/such"], "No such file or directory: '/none/such'"),
        (["--prompt-file", "/"], "Is a directory: '/'"),
    ],
)
def test_bad_values_are_refused_before_weights_are_loaded(capsys, checkpoint, monkeypatch, argv, message):
    monkeypatch.setattr(models, "load", lambda *args, **options: pytest.fail("loads"))
    code, out, err = run(capsys, "generate", "--model", checkpoint, "--prompt", "x", *argv)
    assert (code, out) == (2, "")
    assert err.startswith("fdpp-jax: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_file_that_is_not_utf_8(capsys, checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"ab\xff")
    code, _, err = run(capsys, "generate", "--model", checkpoint, "--prompt-file", path)
    assert (code, err) == (2, f"fdpp-jax: error: expected UTF-8 in {path}, got byte 0xff at position 2\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    code, _, err = run(capsys, "generate", "--model", checkpoint, "--prompt", "-")
    assert (code, err) == (2, "fdpp-jax: error: expected UTF-8 in stdin, got byte 0xff at position 0\n")


def test_a_message_that_is_not_utf_8(capsys, chatting, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff\n"), encoding="utf-8"))
    code, out, err = run(capsys, "generate", "--model", chatting, "--chat")
    assert (code, out) == (2, "")
    assert err == "fdpp-jax: error: expected UTF-8 in the message, got byte 0xff at position 2\n"


def test_logits_that_are_not_finite_end_with_one_line(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr(generation, "executable", _damaged)
    code, out, err = run(capsys, "generate", "--model", checkpoint, "--prompt", "x", "--max-new-tokens", "8", "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith(
        "fdpp-jax: error: expected finite logits, got NaN or infinity in row 0 of the prompt: weights"
    )
    assert err.count("\n") == 1


def _damaged(request):
    """What executable gives where the first token stands for logits that are not finite."""
    compiled, seconds = decode_loop.executable(request)

    def run_damaged(*arrays):
        loop, first = compiled(*arrays)
        return loop, jnp.full_like(first, decode_loop.NOT_FINITE)

    return run_damaged, seconds


def test_generate_with_the_bundled_model(capsys):
    code, out, err = run(capsys, "generate", "--prompt", "def ", "--max-new-tokens", "10")
    assert code == 0, err
    assert len(out) > 10
    assert err.startswith("fdpp-jax: decode: 9 tokens")


def test_the_flags_of_softmax():
    assert generate.asked_softmax("unified", None) == UnifiedMax()
    assert generate.asked_softmax("auto", 2.5) == generate.asked_softmax("unified", 2.5) == UnifiedMax(2.5)
    assert generate.asked_softmax("bound", None) == UnifiedMax.bound()
    assert generate.asked_softmax("online", None) is None
    assert generate.asked_softmax("auto", None) == "auto"


def test_which_softmax_auto_is(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    choose = functools.partial(calibration.choose_softmax, read_config(checkpoint), checkpoint)
    path = checkpoint / calibration.FILE_NAME
    policy, why = choose("bfloat16")
    assert policy == UnifiedMax()
    assert why.startswith(
        "unified, phi 6, the default: no fdpp_calibration.json beside the checkpoint, which `fdpp-jax"
    )
    assert calibration.load_for(checkpoint) is None

    calibration_of([[-10.0] * 4] * 2, [[30.0] * 4] * 2).save(path)
    policy, why = choose("bfloat16")
    assert policy == UnifiedMax(10.0)
    assert why.startswith("unified, phi 10.00, calibrated: ln den from -10.0 to 30.0")
    policy, why = choose("float16")  # whose window is narrower
    assert policy is None
    assert why.startswith("online, since no phi fits fdpp_calibration.json: ln den from -10.0 to 30.0")
    assert calibration.load_for(checkpoint, dtype="float16") is None

    apart = [[-200.0] * 4, [200.0] * 4]  # the layers
    calibration_of(apart, apart).save(path)
    policy, why = choose("bfloat16")
    np.testing.assert_allclose(policy.phi, [[[-200.0]], [[200.0]]])
    assert why.startswith(
        "unified, a phi each layer (-200.00 .. 200.00), none for all, calibrated: layer 0: ln den from"
    )
    apart = [[-200.0, -200.0, 200.0, 200.0]] * 2  # the heads
    calibration_of(apart, apart).save(path)
    policy, why = choose("bfloat16")
    np.testing.assert_allclose(policy.phi, np.array(apart)[:, None])
    assert why.startswith("unified, a phi each head (-200.00 .. 200.00), none for all, calibrated: layer 0, head 0: ln")

    calibration_of([[0.0]], [[1.0]]).save(path)
    with pytest.raises(ValueError, match=r"\(layers, heads\) = \(2, 4\), got \(1, 1\)"):
        choose("bfloat16")
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"fdpp_calibration\.json is not a calibration: format is missing"):
        choose("bfloat16")


def test_what_a_family_is_known_for_stands_in_for_a_calibration():
    policy, why = calibration.choose_softmax(read_config(FIXTURES / "opt"), FIXTURES / "opt", "bfloat16")
    assert policy is None
    assert why.startswith(
        "online, OPT's scores are known to spread too far for one phi (OPT-6.7B: -496.8 .. 363.5): no"
    )
    assert why.endswith("which `fdpp-jax calibrate` would write")
    policy, why = calibration.choose_softmax(read_config(FIXTURES / "gemma2"), FIXTURES / "gemma2", "bfloat16")
    assert policy == UnifiedMax(-34.0)  # 5 + ln 128 - 44.4, and up
    assert why.startswith("unified, phi -34, with scores capped at 5 no row of 128 keys exceeds the window: no fdpp")
