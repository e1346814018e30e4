"""Everything that trains: data sets, training loop, methods, comparison, the paper's tables, reports."""

from importlib.util import find_spec as _find_spec

from mmc_fast._util.extras import MissingExtra as _MissingExtra

for _package in ("scipy", "sklearn", "matplotlib", "safetensors", "filelock", "pydantic"):
    if _find_spec(_package) is None:
        raise _MissingExtra(f"{_package} is not installed; run: pip install 'mmc-fast[experiments]'")
