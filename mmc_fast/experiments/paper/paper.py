"""The numbers that the paper prints, from configs/numbers.toml, which says what each table holds."""

from __future__ import annotations

from typing import Any

from mmc_fast._util.toml import read_toml

from ..compare.configs import configs_folder

_NUMBERS: dict[str, dict[str, Any]] = read_toml(configs_folder() / "numbers.toml")
TABLE1, TABLE2, TABLE3 = (_NUMBERS[f"table{n}"] for n in (1, 2, 3))
TABLE4, TABLE5, TABLE6 = (_NUMBERS[f"table{n}"] for n in (4, 5, 6))
TABLE7, TABLE9, TABLE11 = (_NUMBERS[f"table{n}"] for n in (7, 9, 11))
