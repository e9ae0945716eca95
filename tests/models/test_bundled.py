"""The bundled checkpoint: the same text on every device in float32, and on Hopper's kernels in bfloat16."""

import jax.numpy as jnp
import numpy as np
import pytest

import fdpp_jax
from fdpp_jax import UnifiedMax, device, models

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
    result = fdpp_jax.generate(model, tokens, lengths, max_new_tokens=48, softmax=softmax)
    assert result.tokens.tolist() == list(GREEDY.values())
    recomputed = {None: 0, 6.0: 0, -200.0: result.decode_steps}
    phi = None if softmax is None else softmax.phi
    if softmax != UnifiedMax.bound():  # may be too loose for the window, at any step
        assert result.recomputed_steps == recomputed[phi]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("phi", [None, 6.0, -200.0])
def test_kernels_decode_it_in_bfloat16(tokenizer, phi, batch):
    """Every token is the best of the float32 model's, or within rounding of the best."""
    model = models.load(models.bundled_path(), dtype=jnp.bfloat16)
    tokens, lengths = (array[:batch] for array in prompts(tokenizer))
    softmax = None if phi is None else UnifiedMax(phi)
    result = fdpp_jax.generate(model, tokens, lengths, max_new_tokens=48, softmax=softmax)
    plans = models.model_plans(model.config, batch=batch, capacity=result.cache_capacity, device=device.current())
    assert [plan.implementation for _, _, plan in plans] == ["flat", "mosaic_gpu", "flat", "flat", "flat", "xla"]
    assert result.recomputed_steps == (result.decode_steps if phi == -200.0 else 0)
    exact = models.load(models.bundled_path(), dtype=jnp.float32)
    for row in range(batch):
        text = np.concatenate([tokens[row, : lengths[row]], result.tokens[row]])
        logits = np.asarray(exact(text[None]))[0, lengths[row] - 1 : -1]  # [48, V]
        chosen = np.take_along_axis(logits, result.tokens[row][:, None], axis=1)[:, 0]
        assert (logits.max(axis=1) - chosen).max() < 0.25
