"""What a checkpoint says of how to talk to it: its chat template and its sampling defaults."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fdpp_jax.json_fields import BOOL, INDEX, NUMBER, TEXT, Kind, read_optional_field
from fdpp_jax.models.loading import list_files, read_optional_json, refuse_pointers, resolve
from fdpp_jax.models.tokenizer_settings import special_token

if TYPE_CHECKING:
    import jinja2

_TEMPLATES = Kind(
    "text or a list of {name: text, template: text}",
    lambda value: TEXT.holds(value) or (isinstance(value, list) and all(map(_is_named_template, value))),
)
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
    if not read_optional_field(settings, "do_sample", BOOL, path):
        return SamplingDefaults()
    temperature = read_optional_field(settings, "temperature", NUMBER, path)
    top_k, top_p = (
        read_optional_field(settings, "top_k", INDEX, path),
        read_optional_field(settings, "top_p", NUMBER, path),
    )
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
    environment, source = _environment(), _template(directory)
    # A token that the checkpoint does not name is undefined in the template, as transformers has it.
    special = {name: token for name in _SPECIAL_TOKENS if (token := special_token(directory, name)) is not None}
    # A template that takes tools or documents asks whether they are none, as transformers has them.
    values = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": True, **special}
    try:
        return environment.from_string(source).render(values)
    except Exception as error:  # it computes what it likes, so it may fail as it likes
        why = " ".join(str(error).split())
        raise ValueError(f"the chat template of {directory} does not take these messages: {why}") from error


def _environment() -> "jinja2.Environment":
    """What transformers gives a template: block trimming, loop controls, generation blocks and a few functions."""
    try:
        import jinja2.ext
        import jinja2.nodes
        import jinja2.parser
        import jinja2.sandbox
    except ImportError as error:
        raise NotImplementedError("chat templates need jinja2: pip install 'fdpp-jax[chat]'") from error

    class Generation(jinja2.ext.Extension):
        """{% generation %}..{% endgeneration %} marks an answer for training: here it is its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    # A template comes with the checkpoint, from anyone: it may compute text and nothing else.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    environment.filters["tojson"] = _json  # jinja2's own is for HTML, and spells out < and >
    return environment


def _template(directory: pathlib.Path) -> str:
    path = directory / "chat_template.jinja"
    if path.is_file():
        refuse_pointers(directory, [path.name])
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text: {error}") from error
    name = "tokenizer_config.json"
    template = read_optional_field(read_optional_json(directory, name), "chat_template", _TEMPLATES, directory / name)
    if isinstance(template, list):  # several by name
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    if template is None:
        raise ValueError(
            "expected chat_template.jinja or a chat_template in tokenizer_config.json, "
            f"found neither in {directory}: {list_files(directory)}"
        )
    return str(template)


def _is_named_template(entry: object) -> bool:
    return isinstance(entry, dict) and all(TEXT.holds(entry.get(name)) for name in ("name", "template"))


def _refuse(message: str) -> None:
    """What templates call raise_exception."""
    import jinja2

    raise jinja2.TemplateError(message)


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter tojson, with transformers' arguments."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    """Today's date, which some templates name."""
    import datetime

    return datetime.datetime.now().strftime(form)
