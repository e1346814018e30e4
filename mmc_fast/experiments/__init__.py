"""Everything that trains: data sets, training loop, methods, comparison, the paper's tables, reports."""
