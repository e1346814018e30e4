"""Triton kernels of the EBR step."""
