"""Data sets that travel with the package; LICENSES.md here names their origin and licence."""
