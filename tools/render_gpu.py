"""Write the tables of docs/gpu.md from docs/gpu/*.json: ``python tools/render_gpu.py``.

``measured.json`` is what ``mmc-fast bench --device cuda`` printed on a GPU; where it is missing the page says so.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gpu.md"
DATA = ROOT / "docs" / "gpu"


def compiled(rows: list[dict[str, Any]]) -> str:
    """Registers, spills, shared memory, resident blocks and matrix instructions, one table per Triton."""
    parts = [*_extent(rows), ""]
    for version in sorted({row["triton"] for row in rows}):
        mine = [row for row in rows if row["triton"] == version and row["main"]]
        arches = sorted({row["arch"] for row in mine})
        parts += [f"Triton {version}: registers / bytes spilled / KiB of shared memory / blocks per multiprocessor", ""]
        parts.append(
            "| kernel [scene] | tile, warps, stages | " + " | ".join(f"sm_{a}" for a in arches) + " | matrix unit |"
        )
        parts.append("|---" * (len(arches) + 3) + "|")
        for kernel in sorted({row["kernel"] for row in mine}):
            by_arch = {row["arch"]: row for row in mine if row["kernel"] == kernel}
            any_row = next(iter(by_arch.values()))
            tile = " ".join(f"{k.removeprefix('BLOCK_')}{v}" for k, v in any_row["blocks"].items())
            cells = [_cell(by_arch.get(a)) for a in arches]
            units = sorted({name for row in by_arch.values() for name in row["matrix"]})
            tail = f"{', '.join(units) or '–'}"
            parts.append(
                f"| {kernel} | {tile} w{any_row['warps']} s{any_row['stages']} | {' | '.join(cells)} | {tail} |"
            )
        parts.append("")
        others = [row for row in rows if row["triton"] == version and not row["main"]]
        if others:
            parts += [
                f"Triton {version}, other paths: kernels, most registers / most bytes spilled",
                "",
                *_others(others),
                "",
            ]
    return "\n".join(parts).rstrip()


def _extent(rows: list[dict[str, Any]]) -> list[str]:
    """What the record holds: compilations of main scenes and of the others, by Triton and architecture."""
    arches = sorted({row["arch"] for row in rows})
    lines = ["In the record, compilations of main scenes + of others; what is not here was not compiled:", ""]
    lines += ["| Triton | " + " | ".join(f"sm_{a}" for a in arches) + " |", "|---" * (len(arches) + 1) + "|"]
    for version in sorted({row["triton"] for row in rows}):
        cells = []
        for arch in arches:
            main = [row["main"] for row in rows if (row["triton"], row["arch"]) == (version, arch)]
            cells.append(f"{sum(main)} + {len(main) - sum(main)}" if main else "–")
        lines.append(f"| {version} | {' | '.join(cells)} |")
    return lines


def _others(rows: list[dict[str, Any]]) -> list[str]:
    """One line a scene: what it launches that no scene before it did."""
    arches = sorted({row["arch"] for row in rows})
    lines = ["| scene | kernels | " + " | ".join(f"sm_{a}" for a in arches) + " |", "|---" * (len(arches) + 2) + "|"]
    scenes: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        scenes.setdefault(row["kernel"].split("[")[1].split("]")[0], []).append(row)
    for scene, found in sorted(scenes.items()):
        cells = []
        for arch in arches:
            here = [row for row in found if row["arch"] == arch]
            most = (max(row[key] for row in here) for key in ("registers", "spill_bytes"))
            cells.append(" / ".join(map(str, most)) if here else "–")
        lines.append(f"| {scene} | {len({row['kernel'] for row in found})} | {' | '.join(cells)} |")
    return lines


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    return f"{row['registers']} / {row['spill_bytes']} / {row['shared_bytes'] / 1024:.0f} / {row['blocks_per_sm']}"


def audit(rows: list[dict[str, Any]]) -> str:
    """Counted launches and bytes."""
    parts = ["| case | launches, eager | ours | MB, eager | ours | ratio | limit |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        eager, ours = (" + ".join(map(str, row[side]["launches"].values())) for side in ("eager", "ours"))
        sums = [sum(row[side]["bytes"].values()) / 1e6 for side in ("eager", "ours")]
        limit = ", ".join(f"{key} ≤ {value:g}" for key, value in row["limits"].items())
        parts.append(
            f"| {row['case']}, {row['precision']} | {eager} | {ours} | {sums[0]:,.0f} | {sums[1]:,.0f} "
            f"| {row['byte_ratio']:.3f} | {limit} |"
        )
    return "\n".join(parts)


def projection(rows: list[dict[str, Any]]) -> str:
    """The roofline projection, eager against ours."""
    gpus = list(rows[0]["ours"]["projected_us"])
    parts = ["| case | " + " | ".join(f"{g}: eager → ours, µs" for g in gpus) + " |", "|---" * (len(gpus) + 1) + "|"]
    for row in rows:
        cells = [f"{row['eager']['projected_us'][g]:,.0f} → {row['ours']['projected_us'][g]:,.0f}" for g in gpus]
        parts.append(f"| {row['case']}, {row['precision']} | {' | '.join(cells)} |")
    return "\n".join(parts)


def measured(found: dict[str, Any] | None) -> str:
    """What ``mmc-fast bench --device cuda`` wrote, or that nothing was timed."""
    if found is None:
        return "**Nothing here was timed on hardware.** No kernel of this page has run on a GPU yet."
    parts = [f"{found['device']}, torch {found['torch']}, mmc-fast {found['mmc_fast']}; medians of 50 runs.", ""]
    parts += ["| case | side | ms | GB/s | TFLOP/s | share of roofline | peak MiB |", "|---|---|---|---|---|---|---|"]
    for row in found["rows"]:
        if row["problem"]:
            parts.append(f"| {row['name']}, {row['dtype']} | {row['problem']} | | | | | |")
        for side, got in row["sides"].items():
            if "problem" in got:
                parts.append(f"| {row['name']}, {row['dtype']} | {side}: {got['problem']} | | | | | |")
                continue
            share = "–" if got["share_of_roofline"] is None else f"{got['share_of_roofline']:.0%}"
            memory = "–" if got["peak_MiB"] is None else f"{got['peak_MiB']:.0f}"
            parts.append(
                f"| {row['name']}, {row['dtype']} | {side} | {got['ms']:.3f} | {got['GB/s']:.0f} | {got['TFLOP/s']:.1f} "
                f"| {share} | {memory} |"
            )
    return "\n".join(parts)


def render(page: str) -> str:
    """The page with fresh tables between its markers."""

    def load(name: str) -> Any:
        path = DATA / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    counted = load("audit")
    blocks = {
        "compiled": compiled(load("compiled")),
        "audit": audit(counted),
        "projection": projection(counted),
        "measured": measured(load("measured")),
    }
    for name, text in blocks.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        page, count = re.subn(pattern, lambda m, t=text: f"{m[1]}\n{t}\n\n{m[2]}", page, flags=re.DOTALL)
        if count != 1:
            raise RuntimeError(f"docs/gpu.md has {count} blocks named {name}; there must be one")
    return page


def main() -> int:
    text = render(PAGE.read_text(encoding="utf-8"))
    fresh = PAGE.with_suffix(".new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
