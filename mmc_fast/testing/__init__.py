"""Public helpers for tests: the tolerance rule; shape strategies in ``mmc_fast.testing.strategies`` (hypothesis)."""

from .tolerance import assert_as_accurate, relative_error

__all__ = ["assert_as_accurate", "relative_error"]
