"""Parts that Triton kernels share."""
