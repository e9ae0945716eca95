"""A tokenizer.json, or what would stand in one, with added tokens by the ids that the files give."""

import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from fdpp_jax.models.tokenizer_settings import AddedToken

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Decoders that turn each token into text by itself, or by itself and whether one goes before.
_TOKENWISE = ("WordPiece", "Metaspace", "CTC")


class TokenizerJson:
    """A tokenizer of the package tokenizers, with or without its own template (often just BOS)."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, add_special_tokens: bool):
        self._tokenizer = tokenizer
        self._add_special_tokens = add_special_tokens
        decoder = tokenizer.decoder
        steps = [] if decoder is None else list(_steps(json.loads(decoder.__getstate__())))
        self._has_bytes = any(step["type"] == "ByteFallback" for step in steps)
        self.is_prefix_stable = _is_prefix_stable(steps)
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}

    @property
    def vocab_size(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens and self._add_special_tokens).ids

    def decode(self, ids: Sequence[int]) -> str:
        if not self._has_bytes:
            return self._tokenizer.decode(ids, skip_special_tokens=True)
        tokens = [self._tokenizer.id_to_token(i) for i in ids]
        text = [token for token in tokens if token is not None and token not in self._special]
        return self._tokenizer.decoder.decode(list(_with_valid_bytes(text)))

    def token(self, token_id: int) -> str:
        return str(self._tokenizer.id_to_token(token_id))


def read_tokenizer(text: str, added: Mapping[str, AddedToken], path: pathlib.Path) -> tokenizers.Tokenizer:
    """A tokenizer with all added tokens, each with its id.

    The package numbers added tokens itself, one after the other behind as many ids as the vocabulary has entries. Where
    the files give other ids, those tokens enter the vocabulary, which may have holes.

    Args:
      text: What tokenizer.json holds.
      added: Tokens that other files add, by text. Those without an id count where the tokenizer has them.
      path: The file, for errors.

    Raises:
      ValueError: The text is no tokenizer, or an added token contradicts it.
      NotImplementedError: An id leaves a hole in a vocabulary that cannot have one.
    """
    tokenizer = _parse(text, path)
    content = json.loads(text)
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    own = {entry["content"]: entry for entry in content.get("added_tokens") or ()}
    entries = {name: entry | {"id": vocab.get(name, entry["id"])} for name, entry in own.items()}
    for name, token in added.items():
        entry = entries.get(name)
        if entry is not None and token.id is None:
            entries[name] = entry | {"special": True}
        elif token.id is not None or name in vocab:
            known = vocab.get(name) if entry is None else entry["id"]
            if None not in (known, token.id) and known != token.id:
                raise ValueError(f"{path.parent} adds {name!r} as token {token.id}, which is {known} in {path.name}")
            special = token.special or (entry is not None and entry["special"])
            entries[name] = vars(token) | {"id": token.id if known is None else known, "special": special}
    _check_distinct(vocab, entries, path)
    if entries != own or any(tokenizer.token_to_id(name) != entry["id"] for name, entry in entries.items()):
        _number(content, vocab, entries, path)
        tokenizer = _parse(json.dumps(content), path)
    return tokenizer


def _parse(text: str, path: pathlib.Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    # Settings of the training may be saved with it. A prompt is never shortened or padded by a file.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_distinct(vocab: Mapping[str, int], entries: Mapping[str, Mapping[str, Any]], path: pathlib.Path) -> None:
    """No id may stand for two tokens."""
    holders = {number: text for text, number in vocab.items()}
    for text, entry in entries.items():
        if holders.setdefault(entry["id"], text) != text:
            raise ValueError(
                f"{path.parent} adds {text!r} as token {entry['id']}, which is {holders[entry['id']]!r} in {path.name}"
            )


def _number(
    content: dict[str, Any], vocab: Mapping[str, int], entries: Mapping[str, dict[str, Any]], path: pathlib.Path
) -> None:
    """Changes a tokenizer.json so that its added tokens get their ids."""
    content["added_tokens"] = sorted(entries.values(), key=lambda entry: entry["id"])
    beside = [entry for entry in content["added_tokens"] if entry["content"] not in vocab]
    if [entry["id"] for entry in beside] == list(range(len(vocab), len(vocab) + len(beside))):
        return
    in_model = content["model"]["vocab"]
    if not isinstance(in_model, dict):
        raise NotImplementedError(
            f"{beside[-1]['content']!r} is token {beside[-1]['id']} of {path.parent}, and there are no tokens before "
            f"it: a {content['model'].get('type')} vocabulary is a list without holes"
        )
    in_model |= {entry["content"]: entry["id"] for entry in beside}


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The decoders of a decoder, in order."""
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder


def _is_prefix_stable(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the text of the first tokens is how the whole text begins, but for U+FFFD at its end."""
    joins = False  # whether tokens have been joined, so that the last piece of text may grow
    for step in steps:
        kind = step["type"]
        if kind == "Replace":
            is_one_character = len(step["pattern"].get("String", "")) == 1
            if joins and not is_one_character:
                return False
        elif kind in ("ByteFallback", "ByteLevel", *_TOKENWISE):
            if joins:
                return False
            joins = kind not in _TOKENWISE
        elif kind == "Fuse":
            joins = True
        elif kind != "Strip":
            return False
    return True


def _with_valid_bytes(tokens: Sequence[str]) -> Iterator[str]:
    """The tokens, with U+FFFD in the place of bytes that are part of no character.

    The package decodes a run of byte tokens as a whole. If one character at its end is unfinished, all are lost.
    """
    for is_byte, group in itertools.groupby(tokens, lambda token: _BYTE.fullmatch(token) is not None):
        run = list(group)
        content = bytes(int(token[3:5], 16) for token in run) if is_byte else b""
        begin = 0
        while begin < len(content):
            try:
                content[begin:].decode()
                break
            except UnicodeDecodeError as error:
                yield from run[begin : begin + error.start]
                yield "\ufffd"
                begin += error.end
        yield from run[begin:]
