"""The conversation of `fdpp-jax generate --chat`: what is typed, and how much of what was said the cache holds."""

import os
import pathlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fdpp_jax.cli.arguments import utf8
from fdpp_jax.cli.output import report

if TYPE_CHECKING:
    from fdpp_jax.models import Tokenizer
    from fdpp_jax.prompts import PromptCache
    from fdpp_jax.results import GenerationResult


class Conversation:
    """All messages so far, and the cache behind the last answer.

    Args:
      directory: The checkpoint with the chat template.
      tokenizer: The checkpoint's.
      system: The system's message, or none.
    """

    def __init__(self, directory: pathlib.Path, tokenizer: "Tokenizer", system: list[dict[str, str]]):
        self._directory, self._tokenizer, self._messages = directory, tokenizer, list(system)
        self._cache: PromptCache | None = None

    def asked(self, text: str) -> "tuple[list[list[int]], PromptCache | None]":
        """With the user's next message: the one prompt that is new, and the cache that it goes behind.

        The template writes the conversation anew each time. The cache serves as far as both have the same tokens.
        """
        self._messages.append({"role": "user", "content": text})
        tokens = chat_tokens(self._directory, self._tokenizer, self._messages)
        if self._cache is None:
            return [tokens], None
        cache, prompts = self._cache.matched([tokens])
        return prompts, cache

    def answered(self, result: "GenerationResult") -> None:
        """Takes in the model's answer."""
        self._messages.append({"role": "assistant", "content": result.texts[0] if result.texts else ""})
        self._cache = result.cache


def chat_tokens(directory: pathlib.Path, tokenizer: "Tokenizer", messages: list[dict[str, str]]) -> list[int]:
    """The tokens of a conversation, up to where the model's answer begins."""
    from fdpp_jax import models

    return tokenizer.encode(models.chat_text(directory, messages), add_special_tokens=False)


def messages() -> Iterator[str]:
    """Lines that the user types, or that another program writes."""
    has_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if has_terminal:
        import readline  # noqa: F401  lets a line be edited

        report("a conversation: Ctrl-D ends it")
    while True:
        try:
            line = input("> " if has_terminal else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            got = f"byte 0x{error.object[error.start]:02x}"
            raise ValueError(f"expected UTF-8 in the message, got {got} at position {error.start}") from None
        line = line.removeprefix("\ufeff")  # a byte order mark, where a file is piped in
        if line.strip():
            yield utf8(os.fsencode(line), "the message")
