"""A checkpoint for the commands, and how tests run them."""

import pathlib
import shutil

import tokenizers
import tokenizers.decoders
import tokenizers.models

from fdpp_jax import cli

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def run(capsys, *argv):
    """Exit code, stdout and stderr of one command."""
    code = cli.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def make_checkpoint(directory):
    """A random LLaMA of two layers with a tokenizer of single ASCII characters."""
    directory.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / "llama3_gqa" / name, directory)
    vocabulary = {chr(code): code for code in range(127)} | {"?": 127}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="?"))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
