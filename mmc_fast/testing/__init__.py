"""Public helpers for tests: the tolerance rule; heads with a known diagnosis."""

from .planted import PlantedHead, planted_head
from .tolerance import assert_as_accurate, relative_error

__all__ = ["PlantedHead", "assert_as_accurate", "planted_head", "relative_error"]
