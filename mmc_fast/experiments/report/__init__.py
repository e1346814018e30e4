"""Self-contained HTML reports: composable blocks, drawings, and the sections built from run results."""

from mmc_fast.diagnose.document import Callout, Cell, Details, Facts, Figure, Panels, Report, Section, Table, Text

__all__ = ["Callout", "Cell", "Details", "Facts", "Figure", "Panels", "Report", "Section", "Table", "Text"]
