"""Registered operators: schemas, fake implementations, autograd and the choice of backend. Importing this registers all."""

from .agop import op as _agop  # noqa: F401
from .ebr import op as _ebr  # noqa: F401
