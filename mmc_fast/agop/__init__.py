"""Average gradient outer products of fusion heads, exact, at the cost of a forward pass."""

from mmc_fast._util.callable_package import make_callable

from .accumulator import AGOPAccumulator, agop
from .result import AGOPResult

__all__ = ["AGOPAccumulator", "AGOPResult", "agop"]

make_callable(__name__)
