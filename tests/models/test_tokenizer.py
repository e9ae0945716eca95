"""The tokenizer wrapper: special tokens as the checkpoint's files ask, and mismatches refused."""

import json
import pathlib
import re
from typing import Any

import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from fdpp_jax.models import bundled_path, load_tokenizer

VOCAB = {"<s>": 0, "</s>": 1, "<unk>": 2, "def": 3, "return": 4, "x": 5}


def write(folder: pathlib.Path, *, template: bool = True, **files: Any) -> pathlib.Path:
    """A checkpoint's directory with a word tokenizer and JSON files by name."""
    tokenizer = tokenizers.Tokenizer(WordLevel(VOCAB, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if template:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("template", "settings", "starts_with_bos"),
    [
        (True, None, True),
        (False, None, False),
        (True, {"add_bos_token": True, "bos_token": "<s>"}, True),
        (False, {"add_bos_token": True, "bos_token": {"content": "<s>", "lstrip": False}}, True),
        (True, {"add_bos_token": False, "bos_token": "<s>"}, False),
        (False, {"bos_token": "<s>"}, False),
    ],
)
def test_bos_as_the_checkpoint_asks(
    tmp_path: pathlib.Path, template: bool, settings: Any, starts_with_bos: bool
) -> None:
    files = {} if settings is None else {"tokenizer_config": settings}
    tokenizer = load_tokenizer(write(tmp_path, template=template, **files))
    bos = [0] if starts_with_bos else []
    assert tokenizer.encode("def x") == [*bos, 3, 5]
    assert tokenizer.encode("") == bos


def test_decode_drops_special_tokens(tmp_path: pathlib.Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path))
    assert tokenizer.decode([0, 3, 5, 1]) == "def x"
    assert tokenizer.decode([]) == ""
    assert tokenizer.vocab_size == len(VOCAB)


@pytest.mark.parametrize(
    ("files", "eos_ids"),
    [
        ({"generation_config": {"eos_token_id": [1, 4]}, "config": {"eos_token_id": 5}}, (1, 4)),
        ({"config": {"eos_token_id": 5}, "tokenizer_config": {"eos_token": "</s>"}}, (5,)),
        ({"generation_config": {}, "config": {}, "tokenizer_config": {"eos_token": "</s>"}}, (1,)),
        ({"special_tokens_map": {"eos_token": {"content": "</s>", "lstrip": False}}}, (1,)),
        ({}, ()),
    ],
)
def test_eos_ids(tmp_path: pathlib.Path, files: Any, eos_ids: tuple[int, ...]) -> None:
    assert load_tokenizer(write(tmp_path, **files)).eos_ids == eos_ids


@pytest.mark.parametrize(
    ("file", "field", "value", "expected"),
    [
        ("generation_config", "eos_token_id", "2", "a token's id or a list of them"),
        ("generation_config", "eos_token_id", [1, None], "a token's id or a list of them"),
        ("config", "eos_token_id", True, "a token's id or a list of them"),
        ("config", "eos_token_id", -1, "a token's id or a list of them"),
        ("tokenizer_config", "add_bos_token", "no", "true or false"),
        ("tokenizer_config", "eos_token", 2, 'text or {"content": text}'),
        ("tokenizer_config", "eos_token", {"text": "</s>"}, 'text or {"content": text}'),
    ],
)
def test_malformed_settings_name_file_and_field(
    tmp_path: pathlib.Path, file: str, field: str, value: Any, expected: str
) -> None:
    message = f"{file}.json to be {expected}, got {value!r}"
    with pytest.raises(ValueError, match=f"^expected {field} in .*{re.escape(message)}$"):
        load_tokenizer(write(tmp_path, **{file: {field: value}}))


def test_vocabulary_larger_than_the_models(tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path)
    assert load_tokenizer(folder, vocab_size=6).vocab_size == 6
    assert load_tokenizer(folder, vocab_size=64).vocab_size == 6  # a padded embedding
    tokenizer = load_tokenizer(folder, vocab_size=5)
    assert tokenizer.encode("def return") == [0, 3, 4]
    with pytest.raises(ValueError, match="the text has 'x', which is token 5; the model's vocabulary ends at 4"):
        tokenizer.encode("def x")


def test_the_trainers_truncation_and_padding_do_not_act(tmp_path: pathlib.Path) -> None:
    """transformers switches them off, too."""
    folder = write(tmp_path)
    saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding(length=8)
    saved.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("x") == [0, 5]
    assert tokenizer.encode("x def return x def return") == [0, 5, 3, 4, 5, 3, 4]


def test_eos_beyond_the_models_vocabulary(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"end-of-sequence ids .*9.* vocabulary of 6"):
        load_tokenizer(write(tmp_path, config={"eos_token_id": 9}), vocab_size=6)


def test_special_token_that_does_not_exist(tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path, tokenizer_config={"add_bos_token": True, "bos_token": "<bos>"})
    with pytest.raises(ValueError, match=r"names bos_token '<bos>', which tokenizer\.json does not have"):
        load_tokenizer(folder)


def test_no_tokenizer(tmp_path: pathlib.Path) -> None:
    files = r"tokenizer\.json, tokenizer\.model, or vocab\.json with merges\.txt"
    with pytest.raises(ValueError, match=f"expected {files} in .* found an empty directory$"):
        load_tokenizer(tmp_path)


def test_malformed_tokenizer(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_goes_before_sentencepiece(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"never read")
    assert load_tokenizer(write(tmp_path)).vocab_size == len(VOCAB)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"])
def test_a_git_lfs_pointer_is_no_tokenizer(tmp_path: pathlib.Path, name: str) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=rf"got git-lfs pointers for {name}: `git lfs pull` there gets them$"):
        load_tokenizer(tmp_path)


def test_half_of_a_surrogate_pair_is_no_text():
    """What Python makes of bytes in a command that are not UTF-8."""
    with pytest.raises(ValueError, match="expected a text in Unicode, got half of a surrogate pair at character 1"):
        load_tokenizer(bundled_path()).encode("a\udcff")
