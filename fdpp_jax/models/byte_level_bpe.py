"""vocab.json and merges.txt, in the place of a tokenizer.json: the byte-level BPE of GPT-2, OPT and Qwen2.

Source: GPT-2's and Qwen2's tokenizers in Hugging Face's transformers.
"""

import pathlib
from typing import Any

from fdpp_jax.json_fields import BOOL, INDEX, TEXT, field_problems
from fdpp_jax.models.loading import list_files, read_json, read_optional_json, refuse_pointers
from fdpp_jax.models.tokenizer_settings import SETTINGS, AddedToken, setting

VOCAB, MERGES = "vocab.json", "merges.txt"
_GPT2, _QWEN2 = "GPT2Tokenizer", "Qwen2Tokenizer"
# By the model_type of config.json, where tokenizer_config.json names no class.
_QWEN2_MODELS = ("qwen2", "qwen3")
# What ends a text in both classes, whether or not a file says so.
END_OF_TEXT = AddedToken("<|endoftext|>", special=True)
# Letters with one mark before them, single digits, marks, line ends, spaces.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_byte_level_bpe(directory: pathlib.Path) -> dict[str, Any]:
    """What tokenizer.json would hold in a directory with vocab.json and merges.txt.

    Raises:
      ValueError: A file is missing or malformed.
      NotImplementedError: The tokenizer's class is neither GPT-2's nor Qwen2's.
    """
    is_qwen2 = _class(directory) == _QWEN2
    vocab = _vocab(directory)
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": setting(directory, "add_prefix_space", BOOL) or False,
        "trim_offsets": True,
        "use_regex": not is_qwen2,
    }
    words = {"type": "Split", "pattern": {"Regex": _QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"} if is_qwen2 else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, byte_level]} if is_qwen2 else byte_level,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "vocab": vocab,
            "merges": _merges(directory / MERGES, vocab),
        },
    }


def _class(directory: pathlib.Path) -> str:
    """The tokenizer's class as transformers names it, without a Fast at its end."""
    found: str | None = setting(directory, "tokenizer_class", TEXT)
    if found is None:
        model_type = read_optional_json(directory, "config.json").get("model_type")
        return _QWEN2 if model_type in _QWEN2_MODELS else _GPT2
    name = found.removesuffix("Fast")
    if name not in (_GPT2, _QWEN2):
        raise NotImplementedError(
            f"{directory / SETTINGS} has tokenizer_class {found!r}: from {VOCAB} and {MERGES} only {_GPT2} and "
            f"{_QWEN2} are built"
        )
    return name


def _vocab(directory: pathlib.Path) -> dict[str, int]:
    """From a token's text to its id."""
    vocab = read_json(directory, VOCAB)
    if problems := field_problems(vocab, dict.fromkeys(vocab, INDEX)):
        raise ValueError(f"{directory / VOCAB} is malformed: {problems[0]}")
    holders: dict[int, str] = {}
    for text, number in vocab.items():
        if holders.setdefault(number, text) != text:
            raise ValueError(
                f"expected one token an id in {directory / VOCAB}, got {holders[number]!r} and {text!r} for {number}"
            )
    return vocab


def _merges(path: pathlib.Path, vocab: dict[str, int]) -> list[list[str]]:
    """The pairs of tokens that become one, in order."""
    if not path.is_file():
        raise ValueError(f"expected {MERGES} in {path.parent}, found {list_files(path.parent)}")
    refuse_pointers(path.parent, [MERGES])
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error}") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise ValueError(
                f"expected two tokens of {VOCAB} that make up a third in line {number} of {path}, got {line!r}"
            )
        merges.append(pair)
    return merges
