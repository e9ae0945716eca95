"""Mosaic GPU kernels for Hopper (sm_90), one a file."""
