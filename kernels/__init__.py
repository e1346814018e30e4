"""Triton kernels and launchers: tensors in, tensors out; no autograd, no modules. Installed as ``mmc_fast.kernels``."""
