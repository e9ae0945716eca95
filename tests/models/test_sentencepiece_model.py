"""SentencePiece's tokenizer.model: special and added tokens, the space at the front, ChatGLM's own tokens."""

import functools
import io
import json
import pathlib
import sys
from typing import Any

import pytest
import sentencepiece

from fdpp_jax.models import chat_text, load_tokenizer


@functools.cache
def sentencepiece_model(**settings: Any) -> bytes:
    """A tokenizer.model with <unk> 0, <s> 1, </s> 2 and a token for every byte."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["def f(x): return x", "the quick brown fox jumps over the lazy dog"]),
        model_writer=model,
        model_type="bpe",
        byte_fallback=True,
        vocab_size=300,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def write_sentencepiece(folder: pathlib.Path, model: bytes, **files: Any) -> pathlib.Path:
    """A checkpoint's directory with a SentencePiece model and JSON files by name."""
    (folder / "tokenizer.model").write_bytes(model)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("files", "prefix", "vocab_size", "eos_ids"),
    [
        ({}, [1], 300, (2,)),
        ({"config": {"model_type": "llama"}, "tokenizer_config": {"add_bos_token": True}}, [1], 300, (2,)),
        ({"tokenizer_config": {"add_bos_token": False}}, [], 300, (2,)),
        # [gMASK] sop of [MASK] [gMASK] [sMASK] sop eop <|system|> <|user|> <|assistant|> <|observation|>
        ({"config": {"model_type": "chatglm"}}, [301, 303], 309, (2, 306, 308)),
    ],
)
def test_sentencepiece(
    tmp_path: pathlib.Path, files: Any, prefix: list[int], vocab_size: int, eos_ids: tuple[int, ...]
) -> None:
    model = sentencepiece_model()
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, model, **files))
    text = "def fox(\u6f22) \U0001f98a"  # neither of the last two is in the training text
    ids = tokenizer.encode(text)
    assert ids == prefix + sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)
    assert tokenizer.encode("") == prefix
    assert tokenizer.decode([*ids, 2]) == text
    assert tokenizer.decode(prefix) == ""
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.eos_ids == eos_ids


def test_sentencepiece_decodes_what_is_no_piece(tmp_path: pathlib.Path) -> None:
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, sentencepiece_model()))
    ids = tokenizer.encode("the lazy dog")
    assert tokenizer.decode([0, *ids, 0, 65023]) == "the lazy dog"


def test_sentencepiece_text_may_name_bos_and_eos(tmp_path: pathlib.Path) -> None:
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, sentencepiece_model()))
    turns = [tokenizer.encode(text) for text in ("the dog", "the fox")]
    assert tokenizer.encode("<s>the dog</s><s>the fox") == [*turns[0], 2, *turns[1]]


def test_the_text_of_chatglm3_s_template(tmp_path: pathlib.Path) -> None:
    config = {"model_type": "chatglm", "eos_token_id": [2, 306]}
    template = (
        "{% for m in messages %}{% if loop.first %}[gMASK]sop{% endif %}<|{{ m['role'] }}|>\n {{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    model = sentencepiece_model()
    folder = write_sentencepiece(
        tmp_path, model, config=config, tokenizer_config={"chat_template": template, "add_bos_token": False}
    )
    messages = [{"role": "system", "content": "the fox"}, {"role": "user", "content": "philosopher sop [MASK] eop"}]
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model).encode
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(chat_text(folder, messages), add_special_tokens=False)
    assert ids == [301, 303, 305, *pieces("\n the fox"), 306, *pieces("\n philosopher sop [MASK] eop"), 307]
    assert tokenizer.encode("[gMASK]sop<|user|>") == [301, 303, 306]  # not twice
    assert tokenizer.eos_ids == (2, 306, 308)


def test_sentencepiece_without_bos_and_eos(tmp_path: pathlib.Path) -> None:
    model = sentencepiece_model(bos_id=-1, eos_id=-1)
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, model))
    assert tokenizer.encode("") == []
    assert tokenizer.eos_ids == ()


def test_sentencepiece_eos_ids_of_the_config(tmp_path: pathlib.Path) -> None:
    folder = write_sentencepiece(tmp_path, sentencepiece_model(), config={"eos_token_id": [2, 7]})
    assert load_tokenizer(folder).eos_ids == (2, 7)


def test_sentencepiece_vocabulary_counts_the_added_tokens(tmp_path: pathlib.Path) -> None:
    folder = write_sentencepiece(tmp_path, sentencepiece_model(), config={"model_type": "chatglm"})
    assert load_tokenizer(folder, vocab_size=309).vocab_size == 309
    with pytest.raises(ValueError, match=r"end-of-sequence ids \[2, 306, 308\] .* exceed the vocabulary of 308"):
        load_tokenizer(folder, vocab_size=308)


def test_malformed_sentencepiece(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a tokenizer: .*Parse"):
        load_tokenizer(write_sentencepiece(tmp_path, b"junk"))


def test_sentencepiece_is_optional(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_sentencepiece(tmp_path, sentencepiece_model())
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        NotImplementedError, match=r"tokenizer\.model needs sentencepiece: pip install 'fdpp-jax\[sentencepiece\]'"
    ):
        load_tokenizer(folder)


def test_an_empty_sentencepiece(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a tokenizer: it is empty"):
        load_tokenizer(write_sentencepiece(tmp_path, b""))


FLAGS = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
ADDED = {
    "300": {**FLAGS, "content": "<|im_start|>", "special": True},
    "301": {**FLAGS, "content": "<tool>", "special": False},
    "303": {**FLAGS, "content": "<r>", "special": False, "rstrip": True},
    "304": {**FLAGS, "content": "<l>", "special": False, "lstrip": True},
}
# In pieces with ~ for the space, as transformers 4.57's LlamaTokenizer cuts: with legacy true or unsaid, and false.
CUT = {
    "the dog": ("~the ~d o g", "~the ~d o g"),
    "<s>the</s><s>fox": ("<s> ~the </s> <s> ~f o x", "<s> t he </s> <s> f o x"),
    "<|im_start|> the": ("<|im_start|> ~ ~the", "<|im_start|> ~the"),
    "<|im_start|>the": ("<|im_start|> ~the", "<|im_start|> t he"),
    "<tool>fox": ("<tool> ~f o x", "~ <tool> f o x"),
    "x<tool>x": ("~ x <tool> ~ x", "~ x <tool> x"),
    "x<r>  x  <l> x": ("~ x <r> ~ x <l> ~ ~ x", "~ x <r> x <l> ~ x"),
    "\u2581fox": ("~ ~f o x", "~ ~f o x"),
    "<unk>": ("<unk>", "<unk>"),
    "": ("", ""),
}


@pytest.mark.parametrize(("legacy", "column"), [(None, 0), (True, 0), (False, 1)])
@pytest.mark.parametrize("text", CUT)
def test_the_space_behind_a_named_token(tmp_path: pathlib.Path, text: str, legacy: bool | None, column: int) -> None:
    model = sentencepiece_model(remove_extra_whitespaces=False)
    settings = {"legacy": legacy, "added_tokens_decoder": ADDED}
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, model, tokenizer_config=settings))
    pieces = [tokenizer._backend.token(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    assert pieces == CUT[text][column].replace("~", "\u2581").split()
    assert tokenizer.vocab_size == 305


@pytest.mark.parametrize(("legacy", "pieces"), [(True, "~the ~d o g"), (False, "t he ~d o g")])
def test_no_space_at_the_front(tmp_path: pathlib.Path, legacy: bool, pieces: str) -> None:
    """transformers heeds the setting with legacy false alone."""
    model = sentencepiece_model(remove_extra_whitespaces=False)
    settings = {"legacy": legacy, "add_prefix_space": False}
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, model, tokenizer_config=settings))
    ids = tokenizer.encode("the dog", add_special_tokens=False)
    assert [tokenizer._backend.token(i) for i in ids] == pieces.replace("~", "\u2581").split()
    for text in ("the dog", " the dog"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("legacy", [True, False])
def test_added_tokens_come_back(tmp_path: pathlib.Path, legacy: bool) -> None:
    model = sentencepiece_model(remove_extra_whitespaces=False)
    settings = {"legacy": legacy, "added_tokens_decoder": ADDED}
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, model, tokenizer_config=settings), vocab_size=304)
    assert tokenizer.encode("the<tool>") == [*tokenizer.encode("the"), 301]
    for text in ("the<tool>fox<tool>", "<tool> fox", "\u6f22<tool>\u6f22"):
        assert tokenizer.decode([*tokenizer.encode(text), 300, 2]) == text
    with pytest.raises(ValueError, match="the text has '<l>', which is token 304; the model's vocabulary ends at 303"):
        tokenizer.encode("<l>")


@pytest.mark.parametrize(
    ("number", "text", "message"),
    [
        (300, "</s>", r"adds '</s>' as token 300, which is 2 in tokenizer\.model"),
        (2, "<x>", r"adds '<x>' as token 2, which is '</s>' besides"),
    ],
)
def test_an_added_token_that_contradicts_the_model(
    tmp_path: pathlib.Path, number: int, text: str, message: str
) -> None:
    folder = write_sentencepiece(tmp_path, sentencepiece_model(), added_tokens={text: number})
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder)


def test_two_added_tokens_of_one_id(tmp_path: pathlib.Path) -> None:
    folder = write_sentencepiece(tmp_path, sentencepiece_model(), added_tokens={"<x>": 300, "<y>": 300})
    with pytest.raises(ValueError, match="adds '<y>' as token 300, which is '<x>' besides"):
        load_tokenizer(folder)
