"""Everything that trains: data sets, training loop, methods, comparison, the paper's tables, reports."""

from importlib.util import find_spec as _find_spec

for _package in ("scipy", "sklearn", "matplotlib", "jinja2", "safetensors", "filelock"):
    if _find_spec(_package) is None:
        raise ModuleNotFoundError(
            f"mmc_fast.experiments needs {_package}; install it with: pip install 'mmc-fast[experiments]'",
            name=_package,
        )
