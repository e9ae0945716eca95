"""What the attention kernels of all backends refuse alike."""

from fdpp_jax.plans.shapes import PAGE_SIZES, QUANTISED_DTYPES, AttentionShape

DTYPES = ("bfloat16", "float16")
MAX_SOFT_CAP = 1000.0  # tanh is 1 - 2 / (e^2x + 1), off by up to 3e-7 of the cap


def refuse_attention(shape: AttentionShape, kernel: str) -> str | None:
    """Why an attention kernel cannot compute a shape on any device, or None."""
    batch, heads, capacity = shape.batch, shape.num_query_heads, shape.capacity
    if shape.has_bias:
        return f"the {kernel} kernel takes no bias"
    if shape.has_mask:
        return f"the {kernel} kernel takes no mask as an array: lengths, causal masks and windows are its own"
    if shape.dtype not in DTYPES:
        return f"the {kernel} kernel takes {' or '.join(DTYPES)}, got {shape.dtype}"
    if shape.kv_dtype not in (None, shape.dtype, *QUANTISED_DTYPES):
        return f"the {kernel} kernel takes a cache of {shape.dtype}, int8 or float8_e4m3fn, got {shape.kv_dtype}"
    if shape.page_size not in (None, *PAGE_SIZES):
        return f"the {kernel} kernel takes page sizes {PAGE_SIZES}, got {shape.page_size}"
    if shape.scales == "token" and shape.dtype == "float16":
        return "a weight times its token's scale may leave float16's range"
    if shape.logits_soft_cap is not None and shape.logits_soft_cap > MAX_SOFT_CAP:
        return f"the {kernel} kernel's tanh is good for caps up to {MAX_SOFT_CAP:g}, got {shape.logits_soft_cap:g}"
    if shape.has_traced_scale:
        return "kernels take a scale that is known before the call is traced"
    if not (batch and heads and capacity):
        sizes = f"B = {batch}, N = {heads}, S = {capacity}"
        return f"the {kernel} kernel needs a sequence, a query head and a key, got {sizes}"
    return None
