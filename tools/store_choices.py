"""Write what the searches of a comparison chose into configs/rows: ``python tools/store_choices.py runs/compare``.

Each row's file gets a table ``[chosen.DATA]``, which `mmc-fast compare` then takes in place of a search; other data of the
row stay as they are. The test part has no share in these choices.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROWS = Path(__file__).resolve().parent.parent / "mmc_fast" / "experiments" / "configs" / "rows"


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
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "choices").glob("*.json"))]
    stored = 0
    for record in found:
        path = ROWS / f"{record['row']}.toml"
        if not path.is_file():
            print(f"{record['row']}: no file in configs/rows, left out")
            continue
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        values.setdefault("chosen", {})[record["data"]] = record["chosen"]
        path.write_text(toml(values) + "\n", encoding="utf-8")
        stored += 1
    print(f"{stored} choices stored")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
