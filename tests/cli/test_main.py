"""What `--help` says, and how errors and Ctrl-C end."""

import os
import subprocess
import sys

import jax
import pytest
from cli_case import run

import fdpp_jax
from fdpp_jax import cli
from fdpp_jax.cli import info


def _help(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main([*argv, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        *([], ["generate"], ["calibrate"], ["tune"], ["plan"], ["info"]),
        *(["bench", "decode"], ["bench", "attention"], ["bench", "matmul"]),
    ],
)
def test_every_help_has_examples(capsys, command):
    text = _help(capsys, *command)
    assert "examples:" in text
    assert " ".join(["fdpp-jax", *command]) in text.split("examples:")[1]


def test_the_help_has_an_example_of_each_command_that_takes_a_model(capsys):
    examples = _help(capsys).split("examples:")[1]
    assert all(f"fdpp-jax {name} " in examples for name in ("generate", "calibrate", "plan", "bench"))


def test_help_needs_no_jax():
    code = (
        "import sys\nfrom fdpp_jax import cli\ntry:\n    cli.main(['--help'])\n"
        "finally:\n    print('jax' in sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0
    assert result.stderr == "False\n"


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fdpp-jax {fdpp_jax.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "--model", "nope"], "unknown model 'nope': neither a directory .* nor one of tiny, llama-2-7b"),
        (["plan", "--device", ""], "unknown device ''; known are A100"),
        (["plan", "--device", "V100"], "unknown device 'V100'; known are A100"),
        (["plan", "--device", "H200", "--batch", "0"], "batch"),
        (["generate", "--prompt", "x", "--phi", "3", "--softmax", "online"], "--phi belongs to --softmax unified"),
        (["generate", "--prompt", ""], "expected prompts that are not empty, got one that is"),
        (["generate"], "expected --prompt TEXT or --prompt-file FILE, or --chat for a conversation"),
        (["generate", "--chat", "--json"], "--json belongs to prompts, not to a conversation"),
        (["generate", "--prompt", "-", "--prompt", "-"], "stdin is one prompt: expected --prompt - once"),
        (["generate", "--prompt", "x", "--system", "y"], "--system belongs to --chat"),
        (["generate", "--prompt", "x", "--chat"], "expected chat_template.jinja or a chat_template"),
        (["generate", "--prompt", "x", "--model", "llama-2-7b"], "llama-2-7b is a preset of shapes without weights"),
        (["generate", "--prompt", "x", "--model", "./no/such/dir"], "no/such/dir"),
    ],
)
def test_expected_errors_are_one_line(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert err.startswith("fdpp-jax: error: ")
    assert err.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(err)


@pytest.mark.parametrize(
    "argv", [[], ["bench"], ["generate", "--json", "--quiet"], ["plan", "--batch", "many"], ["calibrate"]]
)
def test_wrong_usage_is_argparse_s(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: fdpp-jax" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "err"),
    [
        (KeyboardInterrupt(), 130, "\nfdpp-jax: interrupted\n"),
        (NotImplementedError("the kernel refuses"), 2, "fdpp-jax: error: the kernel refuses\n"),
        (FileNotFoundError("no such shard"), 2, "fdpp-jax: error: no such shard\n"),
        (FloatingPointError("expected finite logits"), 2, "fdpp-jax: error: expected finite logits\n"),
        (MemoryError("weights take 14 GB"), 2, "fdpp-jax: error: weights take 14 GB\n"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes.\nBuffers:"),
            2,
            "fdpp-jax: error: Out of memory while trying to allocate 5 bytes. Lower the sizes that the command names\n",
        ),
        (
            jax.errors.JaxRuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 5 bytes."),
            2,
            "fdpp-jax: error: Out of memory allocating 5 bytes. Lower the sizes that the command names\n",
        ),
    ],
)
def test_how_a_command_ends(capsys, monkeypatch, error, code, err):
    def fail(args):
        raise error

    monkeypatch.setattr(info, "run", fail)
    assert run(capsys, "info") == (code, "", err)


def test_a_text_that_the_output_cannot_take(capsys, monkeypatch):
    monkeypatch.setattr(info, "run", lambda args: "\u00e9".encode("ascii"))
    code, _, err = run(capsys, "info")
    assert code == 2
    assert err == "fdpp-jax: error: expected an output that takes 'é', got one in ascii: PYTHONIOENCODING=utf-8 " + (
        "makes it take all\n"
    )


@pytest.mark.parametrize(
    ("command", "code", "err"),
    [
        ("info >&-", 0, ""),
        ("plan --model nope 2>&-", 2, ""),
        ("generate --prompt - <&-", 2, "fdpp-jax: error: expected prompts that are not empty, got one that is\n"),
        ("generate --prompt '' --quiet >&- 2>&- <&-", 2, ""),
    ],
)
def test_streams_that_the_caller_has_closed(command, code, err):
    shell = ["sh", "-c", f'exec "{sys.executable}" -m fdpp_jax {command}']
    result = subprocess.run(shell, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (code, err)


def test_a_model_s_name_that_no_file_can_have(capsys):
    code, out, err = run(capsys, "plan", "--model", "x" * 5000)
    assert (code, out) == (2, "")
    assert err.startswith("fdpp-jax: error: ")


@pytest.mark.parametrize(
    ("argv", "flag"), [(["plan"], "--model"), (["generate", "--prompt", "x"], "--model"), (["calibrate"], "--data")]
)
def test_an_empty_name_is_not_the_current_directory(capsys, argv, flag):
    with pytest.raises(SystemExit):
        cli.main([*argv, flag, ""])
    assert f"argument {flag}: expected a name, got an empty one" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError(), jax.errors.JaxRuntimeError("INTERNAL: no idea")])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    def fail(args):
        raise error

    monkeypatch.setattr(info, "run", fail)
    with pytest.raises(type(error)):
        cli.main(["info"])


@pytest.mark.parametrize(
    "command", ["info", "generate --prompt x", "bench matmul", "plan", "calibrate --data README.md"]
)
def test_a_platform_that_is_not_there(command):
    """JAX_PLATFORMS names one whose plugin is not installed."""
    environment = os.environ | {"JAX_PLATFORMS": "rocm"}
    argv = [sys.executable, "-m", "fdpp_jax", *command.split()]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(
        "fdpp-jax: error: expected a platform that JAX has here, got 'rocm', by JAX_PLATFORMS"
    )
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none/such/m.json", "no directory /none/such to write m.json to"),
        ("/", "expected a file, got the directory /"),
    ],
)
@pytest.mark.parametrize("flags", ["bench matmul --json", "calibrate --data x --plot", "calibrate --data x --output"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(capsys, flags, path, message):
    with pytest.raises(SystemExit) as stop:
        cli.main([*flags.split(), path])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
