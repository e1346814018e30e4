"""Triton kernels of AGOP."""
