"""vocab.json and merges.txt in the place of tokenizer.json: the tokenizers of GPT-2, OPT and Qwen2."""

import json
import pathlib
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from fdpp_jax.models import load_tokenizer

SPACE, LINE = "\u0120", "\u010a"  # as byte-level BPE spells them
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
MERGES = ["t h", "th e", f"{SPACE} the", "1 2", f"{SPACE} 1", f"{LINE} {LINE}", f"{SPACE} t", "# #", "c a"]
VOCAB = {
    text: i
    for i, text in enumerate(
        [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    )
}
END = len(VOCAB)
# As published with opt-6.7b.
OPT = {
    "add_bos_token": True,
    "add_prefix_space": False,
    "bos_token": {"__type": "AddedToken", "content": "</s>", "normalized": True},
    "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": True},
    "unk_token": {"__type": "AddedToken", "content": "</s>", "normalized": True},
    "pad_token": {"__type": "AddedToken", "content": "<pad>", "normalized": True},
    "errors": "replace",
    "tokenizer_class": "GPT2Tokenizer",
}
ENTRY = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
# As with Qwen2.5, whose chat tokens are none of vocab.json's.
QWEN2 = {
    "tokenizer_class": "Qwen2Tokenizer",
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "added_tokens_decoder": {
        str(END): {"content": "<|endoftext|>", "special": True, **ENTRY},
        str(END + 1): {"content": "<|im_start|>", "special": True, **ENTRY},
        str(END + 2): {"content": "<|im_end|>", "special": True, **ENTRY},
        str(END + 3): {"content": "<tool_call>", "special": False, **ENTRY},
    },
}


def write(
    folder: pathlib.Path,
    *,
    vocab: Any = VOCAB,
    merges: str | bytes = "#version: 0.2\n" + "\n".join(MERGES),
    **files: Any,
) -> pathlib.Path:
    """A checkpoint's directory with vocab.json, merges.txt and JSON files by name."""
    (folder / "merges.txt").write_bytes(merges if isinstance(merges, bytes) else merges.encode())
    for name, content in {"vocab": vocab, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def ids(*tokens: str) -> list[int]:
    return [VOCAB[token] for token in tokens]


def test_opt(tmp_path: pathlib.Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_config=OPT), vocab_size=END)
    text = "the the 12\n\n  x"
    expected = ids("</s>", "the", f"{SPACE}the", SPACE, "12", f"{LINE}{LINE}", SPACE, SPACE, "x")
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == text
    assert tokenizer.encode("x</s>x<pad>", add_special_tokens=False) == ids("x", "</s>", "x", "<pad>")
    assert tokenizer.decode(ids("</s>", "x", "<pad>", "x", "</s>")) == "xx"
    assert tokenizer.eos_ids == (VOCAB["</s>"],)
    assert tokenizer.vocab_size == END
    # The class alone, without settings, is GPT-2's.
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).encode(text) == expected[1:]


def test_a_space_at_the_front(tmp_path: pathlib.Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_config={"add_prefix_space": True}))
    assert tokenizer.encode("the") == ids(f"{SPACE}the")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": QWEN2},
        {"tokenizer_config": {**QWEN2, "tokenizer_class": "Qwen2TokenizerFast"}},
        {"tokenizer_config": {**QWEN2, "tokenizer_class": None}, "config": {"model_type": "qwen3"}},
    ],
)
def test_qwen2(tmp_path: pathlib.Path, files: Any) -> None:
    tokenizer = load_tokenizer(write(tmp_path, **files))
    # Digits stand alone, line ends keep together, and a mark goes with the letters behind it.
    assert tokenizer.encode("12 .the\n\n  x") == ids("1", "2", SPACE, ".", "the", f"{LINE}{LINE}", SPACE, SPACE, "x")
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9") == ids("ca", "f", "\u00c3", "\u00a9")
    chat = tokenizer.encode("<|im_start|>the<|im_end|><tool_call>")
    assert chat == [END + 1, *ids("the"), END + 2, END + 3]
    assert tokenizer.decode(chat) == "the<tool_call>"
    assert tokenizer.encode("<|endoftext|>") == [END]


def test_the_end_of_text_needs_no_other_file(tmp_path: pathlib.Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, vocab={**VOCAB, "<|endoftext|>": END}))
    assert tokenizer.encode("x<|endoftext|>") == [*ids("x"), END]
    assert tokenizer.decode([*ids("x"), END]) == "x"


@pytest.mark.parametrize(
    "merges",
    ["#version: 0.2\n{}\n", "{}", "\n{}\n\n", b"#version: 0.2\r\n{}\r\n"],
    ids=["published", "bare", "blank", "dos"],
)
def test_merges_are_all_there_whatever_the_frame(tmp_path: pathlib.Path, merges: str | bytes) -> None:
    if isinstance(merges, bytes):
        content: str | bytes = merges.replace(b"{}", "\r\n".join(MERGES).encode())
    else:
        content = merges.replace("{}", "\n".join(MERGES))
    tokenizer = load_tokenizer(write(tmp_path, merges=content))
    assert tokenizer.encode("the##") == ids("the", "##")  # a merge of # is no comment


def test_a_vocabulary_may_have_holes(tmp_path: pathlib.Path) -> None:
    vocab = {text: 2 * i for text, i in VOCAB.items()}
    files = {"added_tokens": {"<y>": 3, "<z>": 2 * END}, "special_tokens_map": {"eos_token": "<z>"}}
    tokenizer = load_tokenizer(write(tmp_path, vocab=vocab, **files))
    assert tokenizer.encode("the<y>x<z>") == [vocab["the"], 3, vocab["x"], 2 * END]
    assert tokenizer.decode([vocab["the"], 1, 3, vocab["x"], 2 * END]) == "the<y>x"
    assert tokenizer.vocab_size == 2 * END + 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"merges": "t h\nt h e"}, r"expected two tokens of vocab\.json .* in line 2 of .*merges\.txt, got 't h e'$"),
        ({"merges": "#version: 0.2\nthe"}, r"in line 2 of .*merges\.txt, got 'the'$"),
        ({"merges": "th zz"}, r"in line 1 of .*merges\.txt, got 'th zz'$"),
        ({"merges": "h t"}, r"that make up a third in line 1 of .*merges\.txt, got 'h t'$"),
        ({"merges": b"\xff\xff"}, r"merges\.txt is not text"),
        ({"vocab": [1]}, r"expected a JSON object in .*vocab\.json, got list"),
        ({"vocab": {"a": "0"}}, r"vocab\.json is malformed: expected a to be an integer of at least 0, got '0'"),
        ({"vocab": {"a": 1, "b": 1}}, r"expected one token an id in .*vocab\.json, got 'a' and 'b' for 1"),
        ({"tokenizer_config": {**OPT, "bos_token": "<x>"}}, r"names bos_token '<x>', which vocab\.json does not have"),
        ({"added_tokens": {"the": 5}}, r"adds 'the' as token 5, which is \d+ in vocab\.json"),
    ],
)
def test_malformed_files(tmp_path: pathlib.Path, files: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write(tmp_path, **files))


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_one_file_of_the_two(tmp_path: pathlib.Path, missing: str) -> None:
    (write(tmp_path) / missing).unlink()
    with pytest.raises(ValueError, match=rf"expected {missing} in .*, found (vocab\.json|merges\.txt)$"):
        load_tokenizer(tmp_path)


def test_another_class_is_refused(tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path, tokenizer_config={"tokenizer_class": "CLIPTokenizer"})
    with pytest.raises(NotImplementedError, match=r"tokenizer_class 'CLIPTokenizer': .* only GPT2Tokenizer and Qwen2"):
        load_tokenizer(folder)
