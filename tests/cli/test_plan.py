"""`fdpp-jax plan`."""

import json
import re

from cli_case import run


def test_plan_of_a_preset_on_a_named_device(capsys):
    where = "--context", "4096", "--device", "A100"
    code, out, _ = run(capsys, "plan", "--model", "llama-2-7b", "--batch", "8", *where)
    assert code == 0
    for expected in ("attention", "layer", "head", "[8, 4096] @ [4096, 32000]", "4 launches"):
        assert expected in out
    lines = " ".join(out.replace("\u2502", " ").split())
    assert re.search(r"o \(\d+ x \d+ by \d groups?, split", lines)
    assert "'" not in lines  # of a dictionary
    for runs in ("triton decode", "triton fused", "triton flat"):
        assert f" {runs} " in out
    code, out, _ = run(capsys, "plan", "--model", "llama-2-7b", "--batch", "64", *where)
    assert code == 0
    for expected in ("qkv", "attention", "gate_up", "down", "head", "[64, 4096] @ [4096, 12288]", "1 to 16 rows gain"):
        assert expected in out
    for runs in ("triton decode", "xla unfused", "triton flat"):
        assert f" {runs} " in out
    assert "would be" not in out


def test_plan_on_hopper_takes_the_kernels(capsys):
    code, out, _ = run(
        capsys, "plan", "--model", "qwen3-8b", "--batch", "40", "--device", "h100"
    )  # too many rows to fuse
    assert code == 0
    for runs in ("mosaic_gpu flat", "mosaic_gpu decode", "xla unfused"):
        assert runs in out
    assert "rule: M = 40" in " ".join(out.split())
    assert re.search(r"block_kv \d+, num_splits \d+", " ".join(out.split()))


def test_plan_of_a_prefill(capsys):
    code, out, _ = run(capsys, "plan", "--model", "gemma-2-9b", "--context", "8192", "--device", "H200")
    assert code == 0
    lines = " ".join(out.replace("\u2502", " ").split())
    assert "one decode step with a unified max, and a prefill of 8192 tokens" in lines
    assert "T 4096, S 8192" in lines
    code, out, _ = run(capsys, "plan", "--model", "gemma-2-9b", "--context", "8192", "--device", "H200", "--json")
    assert code == 0
    windowed, full = json.loads(out)["kernels"][-2:]
    assert [windowed["kernel"], full["kernel"]] == ["prefill attention (window 4096)", "prefill attention"]
    for record in (windowed, full):
        assert (record["backend"], record["algorithm"]) == ("mosaic_gpu", "prefill")
        assert (record["shape"]["query_length"], record["shape"]["capacity"]) == (4096, 8192)
        assert record["reason"]


def test_plan_has_the_softmax_that_generate_takes(capsys):
    for context, is_online in (("1024", True), ("8192", False)):
        argv = "plan", "--model", "llama-3-8b", "--context", context, "--device", "H200"
        _, out, _ = run(capsys, *argv)
        assert f"one decode step with {'online softmax' if is_online else 'a unified max'}, and" in " ".join(
            out.split()
        )
        _, out, _ = run(capsys, *argv, "--json")
        (attention,) = (kernel for kernel in json.loads(out)["kernels"] if kernel["kernel"] == "attention")
        assert attention["shape"]["is_online"] == is_online


def test_plan_knows_the_model_s_positions(capsys):
    code, out, _ = run(capsys, "plan", "--model", "opt-6.7b", "--device", "H200")
    assert code == 0
    assert "context 2048" in " ".join(out.split())
    code, _, err = run(capsys, "plan", "--model", "opt-6.7b", "--device", "H200", "--context", "2049")
    assert code != 0
    assert "expected a context of at most the model's 2048, got 2049" in err


def test_plan_of_a_directory(capsys, tmp_path):
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 64, '
        '"intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}'
    )
    code, out, _ = run(capsys, "plan", "--model", str(tmp_path), "--device", "H200")
    assert code == 0
    assert "[1, 64] @ [64, 96]" in out


def test_plan_as_json(capsys):
    code, out, err = run(capsys, "plan", "--model", "qwen3-8b", "--device", "H200", "--json")
    assert (code, err) == (0, "")
    record = json.loads(out)
    attention = record.pop("kernels")[0]
    assert (attention["kernel"], attention["backend"], attention["algorithm"]) == ("attention", "mosaic_gpu", "decode")
    assert (attention["shape"]["capacity"], attention["shape"]["head_dim"]) == (4096, 128)
    assert attention["config"]["block_kv"] > 0
    assert attention["reason"]
    assert record == {"model": "qwen3-8b", "device": "H200", "batch": 1, "context": 4096, "dtype": "bfloat16"}


def test_sizes_are_named_as_they_were_given(capsys):
    for flag in ("batch", "context"):
        code, out, err = run(capsys, "plan", "--model", "llama-2-7b", "--device", "H200", f"--{flag}", "0")
        assert (code, out, err) == (2, "", f"fdpp-jax: error: {flag} must be at least 1, got 0\n")
