"""What a checkpoint says of how to talk to it: its chat template and its sampling defaults."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from fdpp_jax.models.fields import BOOL, INDEX, NUMBER, read_field
from fdpp_jax.models.loading import list_files, read_optional_json, resolve
from fdpp_jax.models.tokenizer import special_token

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

Message = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """The checkpoint's own sampling: arguments of `fdpp_jax.generate`."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


def sampling_defaults(path_or_hub_id: str | pathlib.Path) -> SamplingDefaults:
    """Reads generation_config.json: greedy without one, or where it does not sample.

    Raises:
      ValueError: No such checkpoint, malformed JSON, or a field of the wrong kind.
    """
    directory = resolve(path_or_hub_id)
    settings, path = read_optional_json(directory, "generation_config.json"), directory / "generation_config.json"
    if not read_field(settings, "do_sample", BOOL, path):
        return SamplingDefaults()
    temperature = read_field(settings, "temperature", NUMBER, path)
    top_k, top_p = read_field(settings, "top_k", INDEX, path), read_field(settings, "top_p", NUMBER, path)
    return SamplingDefaults(
        temperature=1.0 if temperature is None else float(temperature),
        top_k=top_k or None,  # 0 stands for none
        top_p=None if top_p in (None, 1) else float(top_p),
    )


def chat_text(path_or_hub_id: str | pathlib.Path, messages: Sequence[Message]) -> str:
    """A conversation as the text that the model was trained on, up to where its answer begins.

    The text has all special tokens that the template wants: encode it without adding any.

    Args:
      path_or_hub_id: A directory with chat_template.jinja, or a chat_template in tokenizer_config.json; or a hub id.
      messages: {"role": "system" | "user" | "assistant", "content": text} each, in order.

    Raises:
      ValueError: No template, or it does not take these messages.
      NotImplementedError: jinja2 is not installed.
    """
    directory = resolve(path_or_hub_id)
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError as error:
        raise NotImplementedError("chat templates need jinja2: pip install 'fdpp-jax[chat]'") from error
    settings = read_optional_json(directory, "tokenizer_config.json")
    # A template comes with the checkpoint, from anyone: it may compute text and nothing else.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    special = {name: special_token(directory, name) or "" for name in _SPECIAL_TOKENS}
    try:
        template = environment.from_string(_template(directory, settings))
        return template.render(messages=list(messages), add_generation_prompt=True, **special)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template of {directory} does not take these messages: {error}") from error


def _template(directory: pathlib.Path, settings: Mapping[str, Any]) -> str:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if not isinstance(template, str):
        raise ValueError(
            "expected chat_template.jinja or a chat_template in tokenizer_config.json, "
            f"found neither in {directory}: {list_files(directory)}"
        )
    return template


def _refuse(message: str) -> None:
    """What templates call raise_exception."""
    import jinja2

    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    """Today's date, which some templates name."""
    import datetime

    return datetime.datetime.now().strftime(form)
