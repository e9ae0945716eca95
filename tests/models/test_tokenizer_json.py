"""Added tokens of a tokenizer.json: all that the checkpoint's files list, each with the id that they give."""

import json
import pathlib
import re
from typing import Any

import pytest

from fdpp_jax.models import load_tokenizer

LETTERS = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz<>|_/\n ")}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
NEXT = len(LETTERS)


def entry(content: str, **flags: Any) -> dict[str, Any]:
    return {"content": content, **FLAGS, **flags}


def write(
    folder: pathlib.Path, *added: dict[str, Any], vocab: dict[str, int] | None = None, model: Any = None, **files: Any
) -> pathlib.Path:
    """A checkpoint's directory with a tokenizer of letters and JSON files by name."""
    content = {
        "version": "1.0",
        "added_tokens": list(added),
        "decoder": {"type": "Fuse"},
        "model": model or {"type": "BPE", "vocab": vocab or LETTERS, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def listed(*tokens: tuple[int, dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """What tokenizer_config.json holds."""
    return {"added_tokens_decoder": {str(number): token for number, token in tokens}, **settings}


CHAT = "<|im_start|>user\nhi<|im_end|>\n"
CHAT_IDS = [NEXT, *(LETTERS[c] for c in "user\nhi"), NEXT + 1, LETTERS["\n"]]


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<|im_start|>": NEXT, "<|im_end|>": NEXT + 1}},
        {"tokenizer_config": listed((NEXT, entry("<|im_start|>")), (NEXT + 1, entry("<|im_end|>")))},
        {"tokenizer_config": listed((NEXT + 1, entry("<|im_end|>")), (NEXT, entry("<|im_start|>")))},
        # transformers reads the second file only where the first has none.
        {
            "tokenizer_config": listed((NEXT, entry("<|im_start|>")), (NEXT + 1, entry("<|im_end|>"))),
            "added_tokens": {"user": NEXT + 2},
        },
    ],
)
def test_tokens_of_other_files_are_tokens(tmp_path: pathlib.Path, files: Any) -> None:
    tokenizer = load_tokenizer(write(tmp_path, **files))
    assert tokenizer.encode(CHAT) == CHAT_IDS
    assert tokenizer.decode(CHAT_IDS) == CHAT  # none of them is special
    assert tokenizer.vocab_size == NEXT + 2


def test_a_special_token_is_no_text_whoever_says_so(tmp_path: pathlib.Path) -> None:
    """By its own flag, by tokenizer.json's, or by its role."""
    folder = write(
        tmp_path,
        {"id": NEXT, **entry("<a>", special=True)},
        {"id": NEXT + 1, **entry("<b>")},
        {"id": NEXT + 2, **entry("<c>")},
        vocab=LETTERS,
        tokenizer_config=listed(
            (NEXT, entry("<a>")),
            (NEXT + 1, entry("<b>", special=True)),
            (NEXT + 3, entry("<d>")),
            eos_token="<d>",
            bos_token="a",
            additional_special_tokens=[{"content": "<c>"}],
        ),
        special_tokens_map={"pad_token": "b", "unk_token": "<unk>", "extra_special_tokens": {"x": "c"}},
    )
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("x<a>x<b>x<c>x<d>xaxbxcx<unk>")
    x = LETTERS["x"]
    specials = [NEXT, NEXT + 1, NEXT + 2, NEXT + 3, 0, 1, 2]
    # A role alone makes no token: the files give it no id.
    assert ids == [i for special in specials for i in (x, special)] + [x, *(LETTERS[c] for c in "<unk>")]
    assert tokenizer.decode(ids) == "xxxxxxxx<unk>"
    assert tokenizer.eos_ids == (NEXT + 3,)


def test_flags_of_an_added_token(tmp_path: pathlib.Path) -> None:
    tokens = entry("<l>", lstrip=True), entry("<r>", rstrip=True), entry("<w>", single_word=True)
    folder = write(tmp_path, tokenizer_config=listed(*enumerate(tokens, start=NEXT)))
    x, space = LETTERS["x"], LETTERS[" "]
    assert load_tokenizer(folder).encode("x  <l> x <r>  x <w> x<w>x") == [
        *(x, NEXT, space, x, space, NEXT + 1, x, space, NEXT + 2, space, x),
        *(LETTERS["<"], LETTERS["w"], LETTERS[">"], x),
    ]


@pytest.mark.parametrize("in_own_file", [False, True])
@pytest.mark.parametrize(
    ("vocab", "ids"),
    [
        (LETTERS, (NEXT + 7, NEXT + 20)),  # rows of the embedding lie between
        (LETTERS, (NEXT + 1, NEXT)),
        ({**LETTERS, "q": 90}, (LETTERS["q"], 91)),  # a hole in the vocabulary, which takes a token
        ({**LETTERS, "q": NEXT + 1}, (NEXT, NEXT + 2)),
    ],
)
def test_ids_are_those_that_the_files_give(
    tmp_path: pathlib.Path, in_own_file: bool, vocab: dict[str, int], ids: tuple[int, int]
) -> None:
    """The package alone counts on from the size of the vocabulary."""
    tokens = tuple(zip(ids, (entry("<y>"), entry("<z>", special=True)), strict=True))
    own = [{"id": number, **token} for number, token in tokens] if in_own_file else []
    tokenizer = load_tokenizer(write(tmp_path, *own, vocab=vocab, tokenizer_config={} if own else listed(*tokens)))
    assert tokenizer.encode("a<y>q<z>") == [0, ids[0], vocab["q"], ids[1]]
    assert tokenizer.decode([0, ids[0], vocab["q"], ids[1], NEXT + 5, 1000]) == "a<y>q"
    assert tokenizer.vocab_size == max(*vocab.values(), *ids) + 1


@pytest.mark.parametrize("gap", [0, 3])
def test_a_vocabulary_without_holes(tmp_path: pathlib.Path, gap: int) -> None:
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [[letter, -1.0] for letter in LETTERS]}
    folder = write(tmp_path, model=unigram, added_tokens={"<y>": NEXT + gap})
    if gap:
        with pytest.raises(NotImplementedError, match=rf"'<y>' is token {NEXT + 3} .* Unigram .* without holes"):
            load_tokenizer(folder)
    else:
        assert load_tokenizer(folder).encode("b<y>") == [1, NEXT]


@pytest.mark.parametrize(
    ("number", "text", "message"),
    [
        (NEXT + 1, "<y>", rf"adds '<y>' as token {NEXT + 1}, which is {NEXT} in tokenizer\.json"),
        (NEXT + 1, "a", rf"adds 'a' as token {NEXT + 1}, which is 0 in tokenizer\.json"),
        (NEXT, "<z>", rf"adds '<z>' as token {NEXT}, which is '<y>' in tokenizer\.json"),
        (1, "<z>", r"adds '<z>' as token 1, which is 'b' in tokenizer\.json"),
    ],
)
@pytest.mark.parametrize("file", ["tokenizer_config", "added_tokens"])
def test_a_contradiction_is_refused(tmp_path: pathlib.Path, number: int, text: str, message: str, file: str) -> None:
    content = listed((number, entry(text))) if file == "tokenizer_config" else {text: number}
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write(tmp_path, {"id": NEXT, **entry("<y>")}, **{file: content}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<y>": "7"}}, "expected an object from texts to token ids in .*added_tokens.json, got"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "expected added_tokens_decoder in .* to be an object"),
        ({"tokenizer_config": listed((7, {"text": "y"}))}, "malformed: expected 7 to be {.content.: text} with"),
        ({"tokenizer_config": listed((7, entry("y", special=1)))}, "malformed: expected 7 to be .* true or false"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": entry("y")}}}, "expected token ids as names .*, got 'x'"),
        (
            {"tokenizer_config": listed((NEXT, entry("y")), (NEXT + 1, entry("y")))},
            f"added_tokens_decoder in .* has 'y' as {NEXT} and as {NEXT + 1}",
        ),
        ({"special_tokens_map": {"additional_special_tokens": [3]}}, "expected additional_special_tokens in .* a list"),
    ],
)
def test_malformed_added_tokens(tmp_path: pathlib.Path, files: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write(tmp_path, **files))


def test_an_added_token_beyond_the_models_rows(tmp_path: pathlib.Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, added_tokens={"<y>": NEXT}), vocab_size=NEXT)
    assert tokenizer.encode("a") == [0]
    with pytest.raises(ValueError, match=re.escape(f"the text has '<y>', which is token {NEXT};")):
        tokenizer.encode("a<y>")


def test_a_tokenizer_that_is_no_text(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer: 'utf-8'"):
        load_tokenizer(tmp_path)
