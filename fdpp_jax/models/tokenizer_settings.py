"""What a checkpoint's small JSON files say of its tokens: which are added, which are special, what ends a text."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from fdpp_jax.json_fields import BOOL, INDEX, OBJECT, TEXT, Kind, field_problems, read_optional_field
from fdpp_jax.models.loading import read_optional_json

SETTINGS = "tokenizer_config.json"
_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"
_DECODER = "added_tokens_decoder"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE_ROLES = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_EOS_IDS = Kind(
    "a token's id or a list of them",
    lambda value: all(map(INDEX.holds, value)) if isinstance(value, list) else INDEX.holds(value),
)
_TOKEN = Kind(
    'text or {"content": text}',
    lambda value: TEXT.holds(value.get("content") if isinstance(value, dict) else value),
)
_TOKENS = Kind(
    'a list of texts or of {"content": text}, or an object of them',
    lambda value: (
        isinstance(value, list | dict) and all(map(_TOKEN.holds, value.values() if isinstance(value, dict) else value))
    ),
)
_DESCRIPTION = Kind(
    f'{{"content": text}} with {", ".join(_FLAGS)} true or false',
    lambda value: (
        isinstance(value, dict)
        and TEXT.holds(value.get("content"))
        and not field_problems(value, dict.fromkeys(_FLAGS, BOOL))
    ),
)
_IDS = Kind("an object from texts to token ids", lambda value: all(map(INDEX.holds, value.values())))


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that a text is split at before the model of the tokenizer sees it.

    Attributes:
      content: How a text spells the token.
      id: The token's id; None: the one that the tokenizer's own file gives, if any.
      special: Whether the token is no text, so that decoding leaves it out.
      lstrip: Whether white space before the token belongs to it.
      rstrip: Whether white space behind the token belongs to it.
      single_word: Whether the token may not be part of a word.
      normalized: Whether the token is looked for in the normalised text.
    """

    content: str
    id: int | None = None
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    @classmethod
    def of(cls, description: Mapping[str, Any], **fields: Any) -> "AddedToken":
        """Reads {"content": text, "lstrip": false, ...}."""
        flags = {name: description[name] for name in _FLAGS if name in description}
        special = fields.get("special", flags.get("special", False))
        return cls(**{"content": description["content"], "normalized": not special} | flags | fields)


def read_added_tokens(directory: pathlib.Path) -> dict[str, AddedToken]:
    """The tokens that tokenizer_config.json adds, or else added_tokens.json, and all that have a special role, by text.

    Raises:
      ValueError: A file or field is malformed, or a text has two ids.
    """
    settings = read_optional_json(directory, SETTINGS)
    found = read_optional_field(settings, _DECODER, OBJECT, directory / SETTINGS)
    special = _special_tokens(directory)
    tokens: dict[str, AddedToken] = {}
    if found is not None:
        where = f"{_DECODER} in {directory / SETTINGS}"
        if problems := field_problems(found, dict.fromkeys(found, _DESCRIPTION)):
            raise ValueError(f"{where} is malformed: {problems[0]}")
        for number, description in found.items():
            if not (number.isascii() and number.isdigit()):
                raise ValueError(f"expected token ids as names in {where}, got {number!r}")
            token = AddedToken.of(description, id=int(number))
            if token.content in tokens:
                raise ValueError(f"{where} has {token.content!r} as {tokens[token.content].id} and as {token.id}")
            tokens[token.content] = token
    else:
        ids = read_optional_json(directory, _ADDED)
        if not _IDS.holds(ids):
            raise ValueError(f"expected {_IDS.text} in {directory / _ADDED}, got {ids}")
        tokens = {text: AddedToken(text, id=number, normalized=text not in special) for text, number in ids.items()}
    for text, token in special.items():
        # A role makes an added token special, and leaves its other flags alone.
        known = tokens.get(text)
        tokens[text] = token if known is None else dataclasses.replace(known, special=True)
    tokens.pop("", None)
    return tokens


def _special_tokens(directory: pathlib.Path) -> dict[str, AddedToken]:
    """The tokens with a role such as bos_token, by text."""
    found: list[Any] = []
    for name in (_MAP, SETTINGS):  # the second goes before the first
        path, content = directory / name, read_optional_json(directory, name)
        found += [read_optional_field(content, role, _TOKEN, path) for role in _ROLES]
        for role in _MORE_ROLES:
            several = read_optional_field(content, role, _TOKENS, path) or ()
            found += several.values() if isinstance(several, dict) else several
    descriptions = [token if isinstance(token, dict) else {"content": token} for token in found if token is not None]
    return {token["content"]: AddedToken.of(token, special=True) for token in descriptions}


def special_token(directory: pathlib.Path, name: str) -> str | None:
    """The text of a special token such as bos_token, None where the checkpoint names none.

    Raises:
      ValueError: It is neither text nor {"content": text, ...}.
    """
    for file in (SETTINGS, _MAP):  # the second is all that old checkpoints have
        token = read_optional_field(read_optional_json(directory, file), name, _TOKEN, directory / file)
        if token is not None:
            return str(token["content"] if isinstance(token, dict) else token)
    return None


def eos_ids(directory: pathlib.Path) -> tuple[int, ...] | None:
    """generation_config.json knows best (Llama 3 has three), then config.json; None where both are silent."""
    for name in ("generation_config.json", "config.json"):
        eos = read_optional_field(read_optional_json(directory, name), "eos_token_id", _EOS_IDS, directory / name)
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (eos,)
    return None


def setting(directory: pathlib.Path, name: str, kind: Kind) -> Any:
    """A field of tokenizer_config.json; None where the checkpoint does not say."""
    return read_optional_field(read_optional_json(directory, SETTINGS), name, kind, directory / SETTINGS)
