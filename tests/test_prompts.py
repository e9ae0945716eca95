"""Prompts as lists and as texts, and the texts that come of them."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_case import PROMPTS, drain, loud_model, plain_loop

from fdpp_jax.generation import generate, stream
from fdpp_jax.models import LlamaForCausalLM, bundled_path, load, load_tokenizer


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return loud_model()


@pytest.fixture(scope="module")
def with_tokenizer(one_layer_checkpoint):
    """A model that has a tokenizer beside it."""
    return load(one_layer_checkpoint, dtype=jnp.float32)


def test_lists_of_unequal_prompts(model):
    prompts = [[5], list(range(7)), np.array([1, 2, 3, 4])]
    result = generate(model, prompts, max_new_tokens=10)
    assert result.tokens.tolist() == result.token_lists == [plain_loop(prompt, 10) for prompt in prompts]
    assert result.prompts == [[5], list(range(7)), [1, 2, 3, 4]]
    assert result.texts is None  # no tokenizer


def test_texts_in_and_texts_out(with_tokenizer):
    tokenizer = load_tokenizer(bundled_path())
    texts = ["def ", "import numpy as np\n\n\nclass "]
    result = generate(with_tokenizer, texts, max_new_tokens=12, eos_ids=[])
    assert result.prompts == [tokenizer.encode(text) for text in texts]
    for text, prompt, new, tokens in zip(texts, result.prompts, result.texts, result.token_lists, strict=True):
        assert len(tokens) == 12
        assert text + new == tokenizer.decode([*prompt, *tokens])
    one = generate(with_tokenizer, texts[0], max_new_tokens=12, eos_ids=[])
    assert one.texts == result.texts[:1]
    by_tokens = generate(with_tokenizer, result.prompts, max_new_tokens=12)
    assert by_tokens.texts == result.texts
    assert generate(with_tokenizer, [np.str_(texts[0])], max_new_tokens=12, eos_ids=[]).texts == one.texts


def test_texts_end_at_the_tokenizer_s_end(with_tokenizer):
    first = generate(with_tokenizer, "def ", max_new_tokens=12, eos_ids=[]).token_lists[0]
    tokenizer = load_tokenizer(bundled_path())
    tokenizer.eos_ids = (first[5],)
    end = first.index(first[5]) + 1
    for prompts, num_tokens in (("def ", end), ([tokenizer.encode("def ")], 12)):
        result = generate(with_tokenizer, prompts, max_new_tokens=12, tokenizer=tokenizer)
        assert result.token_lists == [first[:num_tokens]]


@pytest.mark.parametrize("chunk_size", [1, 5])
def test_a_stream_of_texts_is_the_text(with_tokenizer, chunk_size):
    texts = ["def ", "class A"]
    chunks, result = drain(stream(with_tokenizer, texts, max_new_tokens=24, chunk_size=chunk_size))
    assert ["".join(pieces) for pieces in zip(*(chunk.texts for chunk in chunks), strict=True)] == result.texts
    chunks, result = drain(stream(with_tokenizer, result.prompts, max_new_tokens=24))
    assert all(chunk.texts is None for chunk in chunks)


def test_a_checkpoint_without_a_tokenizer(one_layer_checkpoint, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(one_layer_checkpoint / name, tmp_path)
    bare = load(tmp_path, dtype=jnp.float32)
    with pytest.raises(ValueError, match=f"texts need a tokenizer, and the model has none in {tmp_path}: pass tokens"):
        generate(bare, "def ")
    tokenizer = load_tokenizer(bundled_path())
    result = generate(bare, [tokenizer.encode("def ")], max_new_tokens=4)
    assert result.texts is None
    assert generate(bare, "def ", max_new_tokens=4, tokenizer=tokenizer).texts == [tokenizer.decode(result.tokens[0])]
    (tmp_path / "tokenizer.json").write_text("{}")
    result = generate(bare, [tokenizer.encode("def ")], max_new_tokens=4)
    with pytest.raises(ValueError, match="is not a tokenizer"):
        _ = result.texts


def test_keys_of_both_kinds(model):
    runs = [
        generate(model, PROMPTS, max_new_tokens=8, temperature=1.0, key=key).tokens.tolist()
        for key in (jax.random.key(3), jax.random.PRNGKey(3))
    ]
    assert runs[0] == runs[1]
