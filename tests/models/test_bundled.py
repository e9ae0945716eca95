"""The bundled checkpoint: the same text on every device in float32, and on Hopper's kernels in bfloat16."""

import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdpp_jax
from fdpp_jax import UnifiedMax, models, unified_max
from fdpp_jax.ops.phi import row_phi
from fdpp_jax.plans import device
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions

# fmt: off
GREEDY = {  # 48 tokens in float32 on a CPU
    "def ": [
        1434, 85, 686, 9, 265, 286, 263, 421, 1073, 84, 289, 763, 472, 1083, 472, 341,
        222, 1434, 85, 686, 890, 263, 391, 275, 15, 1341, 15, 666, 9, 265, 378, 88,
        13, 285, 458, 576, 70, 300, 285, 1434, 300, 285, 1434, 300, 285, 1434, 300, 285,
    ],
    "import os\n\nclass ": [
        368, 9, 1271, 286, 282, 421, 1271, 580, 69, 1078, 289, 222, 368, 372, 580, 69,
        890, 282, 307, 510, 717, 573, 265, 13, 1201, 64, 733, 286, 263, 275, 15, 1166,
        64, 733, 278, 1201, 64, 733, 321, 307, 510, 296, 351, 573, 265, 286, 263, 391,
    ],
}
# fmt: on


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(models.bundled_path())


def prompts(tokenizer):
    """Both prompts as one right-padded batch, and their lengths."""
    ids = [tokenizer.encode(text) for text in GREEDY]
    lengths = np.array([len(row) for row in ids])
    return np.array([row + [0] * (lengths.max() - len(row)) for row in ids]), lengths


@pytest.mark.parametrize(
    "softmax", [None, UnifiedMax(), UnifiedMax(-200.0), UnifiedMax.bound()], ids=["online", "unified", "off", "bound"]
)
def test_float32_tokens_are_the_same_everywhere(tokenizer, softmax):
    model = models.load(models.bundled_path(), dtype=jnp.float32)
    tokens, lengths = prompts(tokenizer)
    result = fdpp_jax.generate(model, tokens, lengths, max_new_tokens=48, softmax=softmax, max_recompute_rate=1.0)
    assert result.tokens.tolist() == list(GREEDY.values())
    assert result.recomputed_steps == (result.decode_steps if softmax == UnifiedMax(-200.0) else 0)


@pytest.fixture(scope="module")
def rows_of_held_out_text(tokenizer):
    """ln of the sum of e^score, and phi of UnifiedMax.bound(): [steps, layers, heads] each.

    Of the decode steps of 512 tokens that the model never saw in training.
    """
    model = models.load(models.bundled_path(), dtype=jnp.float32)
    text = (pathlib.Path(sysconfig.get_path("stdlib")) / "getopt.py").read_text(encoding="utf-8")
    tokens = jnp.array([tokenizer.encode(text)[:512]])
    num_tokens, num_heads = tokens.shape[1], model.config.num_attention_heads
    log_sums, phis = [], []

    def attend(layer, query, key, value):
        del layer
        group, scale = num_heads // key.shape[2], key.shape[3] ** -0.5
        scores = jnp.einsum("tnh,snh->tns", query[0], key[0].repeat(group, axis=1), precision="highest") * scale
        scores = jnp.where(jnp.tri(num_tokens, dtype=bool)[:, None], scores, -jnp.inf)
        log_sums.append(jax.nn.logsumexp(scores, axis=-1))
        cache = jax.ShapeDtypeStruct((num_tokens, *key.shape[1:]), key.dtype)
        phis.append(
            row_phi(
                UnifiedMax.bound(),
                AttentionArrays(query[0][:, None], cache, cache),  # each token is a step of its own
                AttentionOptions(scale),
                weights_dtype=key.dtype,
                key_max_norm=jax.lax.cummax(jnp.linalg.norm(key[0], axis=-1), axis=0),  # of the keys so far
            )
        )
        return fdpp_jax.dot_product_attention(query, key, value, is_causal=True)

    @jax.jit
    def probe(tokens):
        model.hidden_states(tokens, jnp.arange(num_tokens)[None], attend)
        return jnp.stack(log_sums, axis=1), jnp.stack(phis, axis=1)

    return probe(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("softmax", ["unified", "bound", "phi = bound"])
def test_which_steps_of_held_out_text_recompute(rows_of_held_out_text, softmax):
    """Hardly any; most, if phi were the bound itself. docs/numerics.md has the numbers of more text."""
    log_sums, phi = rows_of_held_out_text
    num_steps = len(log_sums)
    assert num_steps == 512
    phi = {"unified": 6.0, "bound": phi, "phi = bound": phi + np.log(2.0**64) - np.log(num_steps) - 1}[softmax]
    failed = unified_max.leaves_window(jnp.exp(log_sums - phi), num_steps, jnp.float32).any(axis=(1, 2))
    if softmax == "phi = bound":
        assert failed.mean() > 0.5
    else:
        assert failed.mean() < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("phi", [None, 6.0, -200.0])
def test_kernels_decode_it_in_bfloat16(tokenizer, phi, batch):
    """Every token is the best of the float32 model's, or within rounding of the best."""
    model = models.load(models.bundled_path(), dtype=jnp.bfloat16)
    tokens, lengths = (array[:batch] for array in prompts(tokenizer))
    softmax = None if phi is None else UnifiedMax(phi)
    result = fdpp_jax.generate(model, tokens, lengths, max_new_tokens=48, softmax=softmax, max_recompute_rate=1.0)
    plans = models.model_plans(model.config, batch=batch, capacity=result.cache_capacity, device=device.current())
    assert [plan.implementation for _, _, plan in plans] == ["mosaic_gpu", "fused"]
    assert result.recomputed_steps == (result.decode_steps if phi == -200.0 else 0)
    exact = models.load(models.bundled_path(), dtype=jnp.float32)
    score = nnx.jit(lambda model, tokens: model(tokens))
    for row in range(batch):
        text = np.concatenate([tokens[row, : lengths[row]], result.tokens[row]])
        logits = np.asarray(score(exact, text[None]))[0, lengths[row] - 1 : -1]  # [48, V]
        chosen = np.take_along_axis(logits, result.tokens[row][:, None], axis=1)[:, 0]
        assert (logits.max(axis=1) - chosen).max() < 0.25
