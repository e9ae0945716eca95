"""The text of tokens as they come: joined, it is the decoded whole, whatever the decoder and wherever it is cut."""

import io
import itertools
import json
import pathlib
from typing import Any

import hypothesis
import pytest
import sentencepiece
import tokenizers
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from fdpp_jax.models import Tokenizer, load_tokenizer

REPLACE, FALLBACK, FUSE = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, "ByteFallback", "Fuse"
# By name: the decoder's steps, and whether text comes before the end.
DECODERS: dict[str, tuple[Any, bool]] = {
    "llama2": ([REPLACE, FALLBACK, FUSE, {"type": "Strip", "content": " ", "start": 1, "stop": 0}], True),
    "gemma": ([REPLACE, FALLBACK, FUSE], True),
    "bytes alone": (FALLBACK, True),
    "pieces stripped": ([FALLBACK, {"type": "Strip", "content": "a", "start": 1, "stop": 0}], True),
    "byte level": ({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, True),
    "metaspace": ({"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}, True),
    "wordpiece": ({"type": "WordPiece", "prefix": "##", "cleanup": True}, True),
    "ctc": ({"type": "CTC", "pad_token": "a", "word_delimiter_token": "\u2581", "cleanup": True}, True),
    "none": (None, True),
    # These take text back when more tokens come.
    "word ends": ({"type": "BPEDecoder", "suffix": "</w>"}, False),
    "pairs replaced": ([FUSE, {"type": "Replace", "pattern": {"String": "the"}, "content": "a"}], False),
    "patterns replaced": ([FUSE, {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"}], False),
    "fused words": ([FUSE, {"type": "WordPiece", "prefix": "##", "cleanup": True}], False),
}
WORDS = ["\u2581", "\u2581\u2581", "\u2581the", "\u2581dog", "a", "b", "the", "##b", ".", " do", "n't", "e</w>"]
WORDS += ["\ufffd", "\u00e9"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
ADDED = [("</s>", True), ("<tool>", False)]
SENTENCEPIECE = ("sentencepiece", "sentencepiece, not legacy")


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
BEYOND = "beyond the vocabulary"


def write_json(folder: pathlib.Path, decoder: Any) -> None:
    """A tokenizer.json with words, a token for each byte in both spellings, and added tokens."""
    steps = [{"type": step} if isinstance(step, str) else step for step in ([decoder] if decoder else [])]
    if isinstance(decoder, list):
        inner = [{"type": step} if isinstance(step, str) else step for step in decoder]
        steps = [{"type": "Sequence", "decoders": inner}]
    texts = dict.fromkeys([*WORDS, *BYTES, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    vocab = {text: i for i, text in enumerate(texts)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": len(vocab) + i, "content": text, "special": special, **flags} for i, (text, special) in enumerate(ADDED)
    ]
    content = {
        "version": "1.0",
        "added_tokens": added,
        "decoder": steps[0] if steps else None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))


def write_sentencepiece(folder: pathlib.Path, *, legacy: bool) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["def f(x): return x", "the quick brown fox jumps over the lazy dog"]),
        model_writer=model,
        model_type="bpe",
        byte_fallback=True,
        vocab_size=300,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    added = {"300": {"content": "<tool>", "special": False}, "301": {"content": "<end>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy, "added_tokens_decoder": added}))


@pytest.fixture(scope="module", params=[*DECODERS, *SENTENCEPIECE])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, bool]:
    """A tokenizer, and whether text comes before the end."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param in SENTENCEPIECE:
        write_sentencepiece(folder, legacy=request.param == SENTENCEPIECE[0])
        return load_tokenizer(folder), True
    decoder, is_live = DECODERS[request.param]
    write_json(folder, decoder)
    return load_tokenizer(folder), is_live


def in_bytes(character: str) -> tuple[list[str], list[str]]:
    """A token for each byte, as byte fallback and as byte-level BPE spell them."""
    ((spelled, _),) = BYTE_LEVEL.pre_tokenize_str(character)
    return [f"<0x{byte:02X}>" for byte in character.encode()], list(spelled)


CHARACTERS = [spelling for character in "\u00e9\u6f22\U0001f98a\u2581 a" for spelling in in_bytes(character)]
TOKENS = [[token] for token in (*WORDS, *(text for text, _ in ADDED), "<end>", BEYOND)]


@st.composite
def cut_tokens(draw: st.DrawFn) -> list[list[str]]:
    """Tokens by their texts, in pieces; often the bytes of characters, which may break off."""
    broken = st.sampled_from(CHARACTERS).flatmap(lambda c: st.integers(1, len(c)).map(lambda n: c[:n]))
    parts = draw(st.lists(st.one_of(st.sampled_from(CHARACTERS), broken, st.sampled_from(TOKENS)), max_size=40))
    tokens = [token for part in parts for token in part]
    cuts = sorted(draw(st.lists(st.integers(0, len(tokens)), max_size=12)))
    return [tokens[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(tokens)])]


def ids_of(tokenizer: Tokenizer, tokens: list[str]) -> list[int]:
    """The ids of the tokens that the tokenizer has."""
    known = {tokenizer._backend.token(i): i for i in range(tokenizer.vocab_size)} | {BEYOND: tokenizer.vocab_size + 7}
    return [known[token] for token in tokens if token in known]


@hypothesis.settings(max_examples=80, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(pieces=cut_tokens(), num_prompt=st.integers(0, 3))
def test_the_parts_are_the_whole(loaded: tuple[Tokenizer, bool], pieces: list[list[str]], num_prompt: int) -> None:
    tokenizer, is_live = loaded
    ids = [ids_of(tokenizer, piece) for piece in pieces]
    prompt = [i for piece in ids[:num_prompt] for i in piece]
    if is_live:
        prompt_text = tokenizer.stream().push(prompt)
    else:  # what is left of it in the end
        everything = tokenizer.decode([i for piece in ids for i in piece])
        prompt_text = tokenizer.decode(prompt)
        while not everything.startswith(prompt_text):
            prompt_text = prompt_text[:-1]
    stream, seen, text = tokenizer.stream(prompt), list(prompt), prompt_text
    for piece in ids[num_prompt:]:
        text += stream.push(piece)
        seen += piece
        so_far = tokenizer.decode(seen)
        if is_live:  # all is out but the bytes of a character that may still come
            assert so_far.startswith(text)
            assert set(so_far[len(text) :]) <= {"\ufffd"}
    assert text + stream.finish() == tokenizer.decode(seen)


def test_a_long_text_costs_no_more_a_token(loaded: tuple[Tokenizer, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, is_live = loaded
    spellings = [CHARACTERS[4], CHARACTERS[5], *TOKENS[2:6], CHARACTERS[0], CHARACTERS[1], *TOKENS[4:6]]
    ids = ids_of(tokenizer, [token for spelling in spellings for token in spelling]) * 40
    whole, most = tokenizer.decode(ids), 0
    decode = tokenizer._backend.decode

    def counted(some: list[int]) -> str:
        nonlocal most
        most = max(most, len(some))
        return decode(some)

    monkeypatch.setattr(tokenizer._backend, "decode", counted)
    stream = tokenizer.stream()
    assert "".join([stream.push([i]) for i in ids] + [stream.finish()]) == whole
    assert not is_live or most < 100


@pytest.mark.parametrize("decoder", ["llama2", "byte level"])
def test_a_character_comes_once_it_is_whole(tmp_path: pathlib.Path, decoder: str) -> None:
    write_json(tmp_path, DECODERS[decoder][0])
    tokenizer = load_tokenizer(tmp_path)
    spelling = decoder == "byte level"
    ids = ids_of(tokenizer, [token for character in "\u6f22\U0001f98a" for token in in_bytes(character)[spelling]])
    stream = tokenizer.stream()
    assert [stream.push([i]) for i in ids] == ["", "", "\u6f22", "", "", "", "\U0001f98a"]
    assert stream.finish() == ""
    stream = tokenizer.stream(ids[:2])  # a prompt that ends inside a character
    assert [stream.push([i]) for i in ids[2:5]] == ["\u6f22", "", ""]
    assert stream.finish() == "\ufffd"  # which has ended in one


def test_bytes_that_are_no_text_cost_no_text_before_them(tmp_path: pathlib.Path) -> None:
    """The package alone decodes a run of byte tokens to nothing but U+FFFD if one character breaks off."""
    write_json(tmp_path, DECODERS["gemma"][0])
    tokenizer = load_tokenizer(tmp_path)
    package = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    broken = b"\xe6\xbc\xa2\xf0\x9f", b"\xff\xfea\xed\xa0\x80b\xe6\xbc", b"\xef\xbf\xbd\xa2"
    for content in (b"", b"caf\xc3\xa9 \xe6\xbc\xa2", *broken):
        ids = ids_of(tokenizer, [f"<0x{byte:02X}>" for byte in content])
        text = content.decode(errors="replace")
        assert tokenizer.decode(ids) == text
        if content.decode(errors="ignore").encode() == content:
            assert package.decode(ids) == text
        assert tokenizer.decode([*ids, *ids_of(tokenizer, ["\u2581dog"])]) == text + " dog"
