"""Decodes with the bundled tiny model from Python, and shows that the softmax policy changes cost, not text.

python examples/decode_tiny.py
"""

import numpy as np

import fdpp_jax

DIRECTORY = fdpp_jax.models.bundled_path()
PROMPTS = ("def ", "import os\n\n\nclass ")


def main() -> None:
    model = fdpp_jax.models.load(DIRECTORY, dtype="float32")
    tokenizer = fdpp_jax.models.load_tokenizer(DIRECTORY, vocab_size=model.config.vocab_size)

    # A batch of prompts of unequal length: right-padded, with their lengths.
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt

    policies = {
        "online softmax": None,
        "unified max, phi 6": fdpp_jax.UnifiedMax(6.0),
        "unified max, phi far off": fdpp_jax.UnifiedMax(200.0),
        "unified max, bound": fdpp_jax.UnifiedMax.bound(),
    }
    results = {}
    for name, softmax in policies.items():
        result = fdpp_jax.generate(model, tokens, lengths, 48, eos_ids=tokenizer.eos_ids, softmax=softmax)
        results[name] = result
        print(f"{name}: {result.recomputed_steps} of {result.decode_steps} steps recomputed")
    tokens_of = [result.tokens.tolist() for result in results.values()]
    print("same tokens:", all(row == tokens_of[0] for row in tokens_of), "\n")

    result = results["unified max, phi 6"]
    for prompt, new_tokens, length in zip(prompts, result.tokens, result.lengths, strict=True):
        print(tokenizer.decode([*prompt, *new_tokens[:length].tolist()]), "\n" + "-" * 40)


if __name__ == "__main__":
    main()
