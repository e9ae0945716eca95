"""`fdpp-jax bench`: its flags, without a bench."""

import json

import pytest
from cli_case import run

from fdpp_jax import cli, device_memory
from fdpp_jax.bench import attention as bench_attention
from fdpp_jax.bench import decode as bench_decode
from fdpp_jax.bench import matmul as bench_matmul
from fdpp_jax.bench import prefill as bench_prefill
from fdpp_jax.bench import prefill_model as bench_prefill_model
from fdpp_jax.bench.report import BenchReport
from fdpp_jax.cli import arguments
from fdpp_jax.models import PRESETS
from fdpp_jax.plans import device
from fdpp_jax.plans.backends import BACKENDS

LARGEST = 2**31 - 1  # that flags take


def test_large_bench_on_a_cpu_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.by_name("cpu"))
    code, _, err = run(capsys, "bench", "decode", "--model", "llama-2-7b")
    assert code == 2
    assert "needs a GPU, this is cpu; the bundled model, without --model, does not" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("decode --model nosuch", "unknown model 'nosuch'"),
        ("decode --context 10 --steps 64", "expected a batch and steps of at least 1 and context above steps, got"),
        ("prefill --model tiny --batch 0", "expected a batch and a query_length of at least 1, got batch=0"),
        ("prefill --model tiny --prefill-chunk-size 0", "prefill_chunk_size must be at least 1, got 0"),
        ("matmul --m 0 --k 64 --n 64", "expected sizes of at least 1, got m=0, k=64 and n=64"),
        (f"decode --context {LARGEST}", "expected keys and values that fit the device's memory (24 GB), got"),
        (f"decode --batch {LARGEST}", "expected keys and values that fit the device's memory (24 GB), got"),
        (f"attention --batch {LARGEST}", "expected queries, keys and values that fit the device's memory (24 GB), got"),
        (f"attention --head-dim {LARGEST}", "expected queries, keys and values that fit"),
        (f"prefill --query-length {LARGEST}", "expected queries, keys and values that fit"),
        (f"prefill --model tiny --query-length {LARGEST} --batch {LARGEST}", "expected keys and values that fit"),
        (f"matmul --m {LARGEST} --k {LARGEST} --n {LARGEST}", "expected x, w and their product that fit"),
    ],
)
def test_a_bench_that_can_only_fail_is_one_line_at_once(capsys, monkeypatch, flags, message):
    monkeypatch.setattr(device_memory, "_capacity_bytes", lambda: 24 * 10**9)
    code, out, err = run(capsys, "bench", *flags.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"fdpp-jax: error: {message}")
    assert err.count("\n") == 1  # no warning goes before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the table of bench attention needs a GPU, this is cpu; try one small shape"),
        (["--batch", "2", "--only", "32/8"], "--only picks shapes of the table"),
        (["--scale-per", "token"], "--scale-per belongs to --kv-dtype"),
        (["--query-length", "8", "--capacity", "5"], "capacity must be at least query_length, got capacity=5 query"),
        (["--query-length", "17"], "bench attention is for 1 to 16 queries"),
        (["--page-size", "8"], "pages must hold 16, 32, 64, 128, 256 keys, got page_size=8"),
        (["--lengths", "5000"], "lengths must lie in query_length=1..capacity=4096, got 5000"),
    ],
)
def test_bench_attention_refuses(capsys, monkeypatch, argv, message):
    monkeypatch.setattr(device, "current", lambda: device.by_name("cpu"))
    code, out, err = run(capsys, "bench", "attention", *argv)
    assert (code, out) == (2, "")
    assert err.startswith(f"fdpp-jax: error: {message}")
    assert err.count("\n") == 1


def test_bench_attention_of_one_shape(capsys, monkeypatch, tmp_path):
    cases = []

    def bench(case, *, quick, implementation):
        assert implementation is None
        cases.append((case, quick))
        return BenchReport("title", ("kernel",), (("public op",),), {"attention": case.label})

    monkeypatch.setattr(bench_attention, "bench_attention", bench)
    flags = "--batch 8 --num-kv-heads 8 --context 8192 --lengths mixed --page-size 64 --kv-dtype int8 --scale-per token"
    code, out, _ = run(capsys, "bench", "attention", *flags.split(), "--quick", "--json", str(tmp_path / "record.json"))
    assert code == 0
    assert "public op" in out
    same = bench_attention.attention_case(
        8, 32, 8, 8192, lengths="mixed", page_size=64, kv_dtype="int8", scales="token"
    )
    assert cases == [(same, True)]
    assert json.loads((tmp_path / "record.json").read_text()) == {"attention": same.label}


def test_bench_attention_of_the_table(capsys, monkeypatch):
    tables = []

    def bench(cases, *, quick, record_path, implementation):
        assert record_path is implementation is None
        tables.append((cases, quick))
        return BenchReport("title", ("shape",), (), {})

    monkeypatch.setattr(bench_attention, "bench_attention_table", bench)
    monkeypatch.setattr(device, "current", lambda: device.by_name("H200"))
    assert run(capsys, "bench", "attention")[0] == 0
    assert run(capsys, "bench", "attention", "--only", "pages")[0] == 0
    assert tables[0] == (list(bench_attention.TABLE), False)
    assert [case.shape.page_size for case in tables[1][0]] == [16, 64, 256]
    code, _, err = run(capsys, "bench", "attention", "--only", "9, 9/9")
    assert code == 2
    assert "--only '9, 9/9' is in no label of the table: 1, 32/32, 1024; 1, 32/32, 4096" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the table of bench prefill needs a GPU, this is cpu; try one small shape: --num-heads 4"),
        (["--not-causal", "--only", "window"], "--only picks shapes of the table"),
        (
            ["--query-length", "100", "--capacity", "50"],
            "capacity must be at least query_length, got capacity=50 query",
        ),
        (["--lengths", "5000"], "lengths must lie in query_length=4096..capacity=4096, got 5000"),
        (["--window", "0"], "window must be a positive number of keys, got 0"),
        (["--soft-cap", "-1"], "soft_cap must be positive and finite, got -1.0"),
        (["--query-length", "16"], "bench prefill is for more than 16 queries"),
        (["--prefill-chunk-size", "64"], "--prefill-chunk-size belongs to --model"),
        (
            ["--model", "tiny", "--batch", "2", "--head-dim", "64", "--not-causal", "--only", "x"],
            "--model, a whole prefill, takes its shapes from the model; got --head-dim, --not-causal, --only",
        ),
        (
            ["--model", "llama-2-7b"],
            "bench prefill --model llama-2-7b needs a GPU, this is cpu; the bundled model, --model tiny, does not",
        ),
        (["--model", "nosuch"], "unknown model 'nosuch'"),
    ],
)
def test_bench_prefill_refuses(capsys, monkeypatch, argv, message):
    monkeypatch.setattr(device, "current", lambda: device.by_name("cpu"))
    code, out, err = run(capsys, "bench", "prefill", *argv)
    assert (code, out) == (2, "")
    assert err.startswith(f"fdpp-jax: error: {message}")
    assert err.count("\n") == 1


def test_bench_prefill_of_one_shape_and_of_the_table(capsys, monkeypatch):
    called = []

    def bench(cases, *, quick, implementation, record_path=None):
        assert record_path is implementation is None
        called.append((cases, quick))
        return BenchReport("title", ("kernel",), (), {})

    monkeypatch.setattr(bench_prefill, "bench_prefill", bench)
    monkeypatch.setattr(bench_prefill, "bench_prefill_table", bench)
    monkeypatch.setattr(device, "current", lambda: device.by_name("H200"))
    flags = "--query-length 512 --capacity 2048 --lengths 1024 --not-causal --window 64 --soft-cap 30 --page-size 64"
    assert run(capsys, "bench", "prefill", *flags.split(), "--kv-dtype", "int8", "--quick")[0] == 0
    assert run(capsys, "bench", "prefill", "--only", "window")[0] == 0
    one = bench_prefill.prefill_case(
        1,
        32,
        32,
        512,
        capacity=2048,
        lengths=1024,
        is_causal=False,
        window=64,
        soft_cap=30.0,
        page_size=64,
        kv_dtype="int8",
    )
    assert called[0] == (one, True)
    assert called[1][0] == [case for case in bench_prefill.TABLE if case.shape.local_window_size]


def test_bench_prefill_of_a_model(capsys, monkeypatch, tmp_path):
    called = []

    def bench(config, **options):
        called.append((config, options))
        return BenchReport("title", ("prefill",), (("ours",),), {"prefill": 1})

    monkeypatch.setattr(bench_prefill_model, "bench_model_prefill", bench)
    monkeypatch.setattr(device, "current", lambda: device.by_name("H200"))
    path = tmp_path / "record.json"
    flags = "--model gemma-2-9b --batch 2 --query-length 4096 --prefill-chunk-size 512 --quick"
    code, out, _ = run(capsys, "bench", "prefill", *flags.split(), "--json", str(path))
    assert code == 0
    assert "ours" in out
    assert json.loads(path.read_text()) == {"prefill": 1}
    assert run(capsys, "bench", "prefill", "--model", "tiny")[0] == 0
    given = dict(batch=2, query_length=4096, prefill_chunk_size=512, quick=True, implementation=None)
    assert called[0] == (PRESETS["gemma-2-9b"], given)
    assert called[1][0].max_position_embeddings == 512
    assert called[1][1] == given | dict(batch=1, query_length=None, prefill_chunk_size=None, quick=False)


@pytest.mark.parametrize(
    ("flags", "module", "name"),
    [
        ("attention", bench_attention, "bench_attention_table"),
        ("attention --batch 2", bench_attention, "bench_attention"),
        ("prefill", bench_prefill, "bench_prefill_table"),
        ("prefill --batch 2", bench_prefill, "bench_prefill"),
        ("prefill --model llama-2-7b", bench_prefill_model, "bench_model_prefill"),
        ("decode --model llama-2-7b", bench_decode, "bench_decode"),
        ("matmul --m 1", bench_matmul, "bench_matmul"),
    ],
)
def test_every_bench_is_told_whose_kernels_are_ours(capsys, monkeypatch, flags, module, name):
    named = []

    def bench(*args, implementation, **options):
        named.append(implementation)
        return BenchReport("title", ("kernel",), (), {})

    monkeypatch.setattr(module, name, bench)
    monkeypatch.setattr(device, "current", lambda: device.by_name("H200"))
    for more in ([], ["--implementation", "triton"]):
        assert run(capsys, "bench", *flags.split(), *more)[0] == 0
    assert named == [None, "triton"]


@pytest.mark.parametrize(
    "kind", ["attention --batch 1", "prefill --batch 1", "matmul", "decode", "prefill --model tiny"]
)
def test_a_backend_without_kernels_here_is_one_line(capsys, monkeypatch, kind):
    monkeypatch.setattr(device, "current", lambda: device.by_name("A100"))
    code, out, err = run(capsys, "bench", *kind.split(), "--implementation", "mosaic_gpu")
    assert (code, out) == (2, "")
    assert err.endswith("fdpp-jax: error: implementation='mosaic_gpu' cannot run here: it has no kernel for sm_80\n")


def test_the_backends_that_can_be_named():
    assert tuple(b.name for b in BACKENDS if b.architectures) == arguments.IMPLEMENTATIONS


@pytest.mark.parametrize(
    "argv",
    [
        ("matmul", "--m"),
        ("decode", "--context"),
        ("attention", "--batch"),
        ("attention", "--lengths"),
        ("prefill", "--window"),
    ],
)
def test_a_size_that_no_array_has_is_refused(capsys, argv):
    with pytest.raises(SystemExit):
        cli.main(["bench", *argv, "99999999999999999999"])
    err = capsys.readouterr().err
    assert f"argument {argv[1]}: expected at most 2147483647, got 99999999999999999999" in err
