"""Write docs/schemas/COMMAND.json from mmc_fast/cli/schemas.py: ``python tools/render_schemas.py``."""

from __future__ import annotations

import json
from pathlib import Path

from mmc_fast.cli.schemas import SCHEMAS, schema

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "schemas"


def files() -> dict[Path, str]:
    """Every file and its content."""
    return {FOLDER / f"{name.replace(' ', '-')}.json": json.dumps(schema(name), indent=1) + "\n" for name in SCHEMAS}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
