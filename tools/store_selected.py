"""Write what the searches of a comparison selected into configs/methods: ``python tools/store_selected.py runs/compare``.

The file of each method config gets a table ``[selected.DATA]``, which `mmc-fast compare` then takes in place of a search; other data
stay as they are. The test part has no share in these selections.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmc_fast._util.toml import read_toml

METHODS = Path(__file__).resolve().parent.parent / "mmc_fast" / "experiments" / "configs" / "methods"


def toml(values: Mapping[str, Any], prefix: str = "") -> str:
    """Plain values and nested tables as TOML."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, Mapping)]
    for key, value in values.items():
        if isinstance(value, Mapping):
            name = f"{prefix}{key}"
            inner = toml(value, f"{name}.")
            plain = not value or any(not isinstance(v, Mapping) for v in value.values())
            lines += [f"[{name}]", inner] if plain else [inner]
    return "\n".join(line for line in lines if line)


def main(folder: Path) -> int:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "selected").glob("*.json"))]
    stored = 0
    for record in found:
        path = METHODS / f"{record['method']}.toml"
        if not path.is_file():
            print(f"{record['method']}: no file in configs/methods, left out")
            continue
        values = read_toml(path)
        values.setdefault("selected", {})[record["data"]] = record["selected"]
        path.write_text(toml(values) + "\n", encoding="utf-8")
        stored += 1
    print(f"{stored} selections stored")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
