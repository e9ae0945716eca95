"""Chat templates and sampling defaults, as checkpoints of the hub have them."""

import json
import sys

import pytest

from fdpp_jax.models import SamplingDefaults, chat_text, sampling_defaults

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}\n"
    "    {{ '[INST] ' + message['content'] | trim + ' [/INST]' }}\n"
    "{% endfor %}"
)
USER = [{"role": "user", "content": "Hi"}]


def _checkpoint(tmp_path, template=None, **settings):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    return tmp_path


def test_a_template_in_the_tokenizer_s_settings(tmp_path):
    directory = _checkpoint(tmp_path, chat_template=CHATML)
    messages = [{"role": "system", "content": "Be brief."}, *USER]
    assert chat_text(directory, messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_of_its_own_comes_first_and_knows_special_tokens(tmp_path):
    directory = _checkpoint(tmp_path, LLAMA_2, chat_template=CHATML, bos_token={"content": "<s>", "lstrip": False})
    assert chat_text(directory, USER) == "<s>    [INST] Hi [/INST]\n"
    with pytest.raises(ValueError, match="does not take these messages: no system role"):
        chat_text(directory, [{"role": "system", "content": ""}])


def test_a_special_token_may_be_in_a_file_of_its_own(tmp_path):
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<bos>"}, "eos_token": "<old>"}')
    directory = _checkpoint(tmp_path, "{{ bos_token }}{{ eos_token }}", bos_token=None, eos_token="<eos>")
    assert chat_text(directory, USER) == "<bos><eos>"


def test_a_token_that_the_checkpoint_does_not_name_is_undefined(tmp_path):
    template = "{% if pad_token is defined %}pad{% endif %}{{ eos_token }}{{ bos_token | default('none') }}"
    assert chat_text(_checkpoint(tmp_path, template, eos_token="<eos>"), USER) == "<eos>none"


def test_the_default_among_named_templates(tmp_path):
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ messages | length }}"}]
    assert chat_text(_checkpoint(tmp_path, chat_template=named), USER) == "1"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].__class__.__mro__ }}",
        "{% set _ = messages.append(1) %}",
        "{{ unknown.field }}",
        "{%",
        "{{ 1 / 0 }}",
        "{{ messages + 'x' }}",
        "{{ messages | tojson(indent=[]) }}",
        "{% generation %}",
    ],
)
def test_a_hostile_or_broken_template_is_one_error(tmp_path, template):
    with pytest.raises(ValueError, match="does not take these messages"):
        chat_text(_checkpoint(tmp_path, template), USER)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if tools is not none or documents is not none %}tools{% else %}none{% endif %}", "none"),
        ("{{ {'<b>': \"d'\u00e9&\"} | tojson }}", '{"<b>": "d\'\u00e9&"}'),
        ("{{ {'b': 1, 'a': [2]} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":[2],"b":1}'),
        ("{% for m in messages %}{% generation %}<{{ m.content }}>{% endgeneration %}{% endfor %}!", "<Hi>!"),
        ("{% for m in messages * 3 %}{{ m.content }}{% break %}{% endfor %}", "Hi"),
    ],
)
def test_what_transformers_gives_a_template(tmp_path, template, expected):
    assert chat_text(_checkpoint(tmp_path, template), USER) == expected


@pytest.mark.parametrize("template", [5, ["{{ messages }}"], [{"name": "default"}]])
def test_a_malformed_template_names_file_and_field(tmp_path, template):
    with pytest.raises(
        ValueError, match=r"^expected chat_template in .*tokenizer_config\.json to be text or a list of"
    ):
        chat_text(_checkpoint(tmp_path, chat_template=template), USER)


def test_a_template_s_own_message_stays_on_one_line(tmp_path):
    directory = _checkpoint(tmp_path, "{{ raise_exception('no\nsystem role') }}")
    with pytest.raises(ValueError, match="does not take these messages: no system role"):
        chat_text(directory, USER)


def test_a_template_that_is_no_text_names_its_file(tmp_path):
    directory = _checkpoint(tmp_path)
    path = directory / "chat_template.jinja"
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not text: .* byte 0xff"):
        chat_text(directory, USER)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"git-lfs pointers for chat_template\.jinja"):
        chat_text(directory, USER)


def test_no_template_and_no_jinja2(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"expected chat_template\.jinja .* tokenizer_config\.json"):
        chat_text(_checkpoint(tmp_path), USER)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(NotImplementedError, match=r"pip install 'fdpp-jax\[chat\]'"):
        chat_text(tmp_path, USER)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, SamplingDefaults()),
        ({"eos_token_id": 2, "temperature": 0.6}, SamplingDefaults()),  # which does not sample
        ({"do_sample": True}, SamplingDefaults(1.0)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50}, SamplingDefaults(0.6, 50, 0.9)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0}, SamplingDefaults(0.7)),
        ({"do_sample": True, "temperature": None, "top_p": None, "top_k": None}, SamplingDefaults(1.0)),
        ({"do_sample": None, "temperature": 0.7}, SamplingDefaults()),
    ],
)
def test_sampling_defaults(tmp_path, settings, expected):
    if settings is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert sampling_defaults(tmp_path) == expected


@pytest.mark.parametrize(
    ("settings", "field", "expected"),
    [
        ({"do_sample": "yes"}, "do_sample", "true or false, got 'yes'"),
        ({"do_sample": True, "temperature": True}, "temperature", "a number, got True"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature", "a number, got nan"),
        ({"do_sample": True, "top_p": "high"}, "top_p", "a number, got 'high'"),
        ({"do_sample": True, "top_k": 50.5}, "top_k", "an integer of at least 0, got 50.5"),
    ],
)
def test_a_malformed_default_names_file_and_field(tmp_path, settings, field, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"expected {field} in .*generation_config\.json to be {expected}$"):
        sampling_defaults(tmp_path)
