"""Write the tables of docs/gpu-appendix.md from docs/gpu/*.json: ``python tools/render_gpu.py``."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))

from gpu_compile import facts  # noqa: E402

PAGE = ROOT / "docs" / "gpu-appendix.md"


def compiled(rows: list[dict[str, Any]]) -> str:
    """One line a kernel: compilations, most registers and spills by architecture, matrix units, what sm_90's code does."""
    arches = sorted({row["arch"] for row in rows})
    versions = ", ".join(sorted({row["triton"] for row in rows}))
    parts = [f"Triton {versions}; most registers / most bytes spilled among the compilations of a kernel:", ""]
    columns = "matrix units | sm_90: matrix instructions | async copies, below 16 bytes | barriers | loads below 4 bytes, of 16 | stores"
    parts.append("| kernel | compilations | " + " | ".join(f"sm_{a}" for a in arches) + f" | {columns} |")
    parts.append("|---" * (len(arches) + 8) + "|")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        odd = ", widths that 16 does not divide" if "odd widths" in row["kernel"] else ""
        groups.setdefault(row["kernel"].split(" [")[0] + odd, []).append(row)
    for kernel, mine in sorted(groups.items()):
        cells = []
        for arch in arches:
            here = [row for row in mine if row["arch"] == arch]
            most = [str(max((row.get(key, 0) for row in here), default="–")) for key in ("registers", "spill_bytes")]
            cells.append(" / ".join(most) if here else "not compiled")
        units = sorted({unit for row in mine for unit in row.get("matrix", {})})
        here = [row.get("sass", {}) for row in mine if row["arch"] == 90]
        most = Counter[str]()
        for sass in here:
            most |= Counter(facts(sass)) | Counter({name: n for name, n in sass.items() if name.endswith("MMA")})
        products = ", ".join(f"{most[name]} {name}" for name in sorted(most) if name.endswith("MMA"))
        cells += [
            ", ".join(units) or "–",
            products or "–",
            f"{most['async_copies']}, {most['narrow_copies']}",
            str(most["barriers"]),
        ]
        cells += [f"{most[f'narrow_{what}']}, {most[f'wide_{what}']}" for what in ("loads", "stores")]
        parts.append(f"| {kernel} | {len(mine)} | {' | '.join(cells)} |")
    if unread := [row["arch"] for row in rows if "sass" not in row]:
        counts = ", ".join(f"sm_{arch}: {n}" for arch, n in sorted(Counter(unread).items()))
        parts += ["", f"From an earlier compilation, machine code not yet read: {counts} of {len(rows)} in all."]
    problems = [f"sm_{row['arch']}, {row['kernel']}: {problem}" for row in rows for problem in row["problems"]]
    return "\n".join([*parts, "", "Known and recorded:", "", *(f"- {p}" for p in problems or ["nothing"])])


def audit(rows: list[dict[str, Any]]) -> str:
    """Counted launches and bytes."""
    parts = ["| case | launches, eager | ours | MB, eager | ours | ratio | limits |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        eager, ours = (" + ".join(map(str, row[side]["launches"].values())) for side in ("eager", "ours"))
        sums = [sum(row[side]["bytes"].values()) / 1e6 for side in ("eager", "ours")]
        limits = ", ".join(f"{key} ≤ {value:g}" for key, value in row["limits"].items())
        ratio = f"{row['byte_ratio']:.3f} | {limits}"
        name = f"{row['case']}, {row['precision']}"
        parts.append(f"| {name} | {eager} | {ours} | {sums[0]:,.0f} | {sums[1]:,.0f} | {ratio} |")
    return "\n".join(parts)


def roofline(rows: list[dict[str, Any]]) -> str:
    """Least times by case, and which launch takes most of them."""
    parts = [
        "| case | GFLOP | MB of memory | MB of cache | µs, launched | µs in a graph | longest launches |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        found, name = row["roofline"], f"{row['case']}, {row['precision']}"
        longest = sorted(found["launches"], key=lambda launch: -launch[-1])[:3]
        launches = ", ".join(f"{kernel} {time:g} ({bound})" for kernel, _, bound, time in longest)
        numbers = (found[key] for key in ("GFLOP", "memory_MB", "cache_MB", "microseconds", "in_graph"))
        parts.append(f"| {name} | {' | '.join(f'{n:,}' for n in numbers)} | {launches} |")
    return "\n".join(parts)


def render(page: str) -> str:
    """The page with fresh tables between its markers."""
    for name, record, table in (
        ("compiled", "compiled", compiled),
        ("audit", "audit", audit),
        ("roofline", "audit", roofline),
    ):
        text = table(json.loads((ROOT / "docs" / "gpu" / f"{record}.json").read_text(encoding="utf-8")))
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        page, count = re.subn(pattern, lambda m, t=text: f"{m[1]}\n{t}\n\n{m[2]}", page, flags=re.DOTALL)
        if count != 1:
            raise RuntimeError(f"docs/gpu-appendix.md has {count} blocks named {name}; there must be one")
    return page


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
