"""Triton kernels, called through jax-triton, for GPUs that Mosaic GPU has none for. `bridge` calls them."""

from fdpp_jax.plans import installed

if (_REFUSAL := installed.refuse_triton()) is not None:  # before a kernel's file imports Triton
    raise ImportError(_REFUSAL)
