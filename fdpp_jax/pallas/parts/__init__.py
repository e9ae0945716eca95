"""Parts that kernels share; the table in `fdpp_jax.pallas` says which kernel uses which part."""
