"""Compile the shipped Triton kernels for GPUs that are not here, and read what the binaries say about themselves.

``python bench/gpu_compile.py --check docs/gpu/compiled.json`` compiles what the workloads of ``gpu_scenes.py`` launch and
compares with the record: exit code 1 where a kernel does not compile, spills more, keeps fewer blocks resident, copies, loads
or stores in smaller pieces or with less of it past the registers, waits at more barriers, needs more shared memory than the
chip has, or runs its products on other units or by smaller instructions. What moves and multiplies is counted in the machine
code (SASS, by Triton's own nvdisasm), the kind of its operands in PTX, as machine code of sm_100 does not tell it.
``--json FILE`` writes the record. Needs Triton, no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Chip(NamedTuple):
    """Limits per multiprocessor of one compute capability (CUDA programming guide, table of compute capabilities)."""

    warps: int
    blocks: int
    shared: int  # bytes per multiprocessor
    shared_block: int  # bytes that one block may use


CHIPS = {80: Chip(64, 32, 167936, 166912), 90: Chip(64, 32, 233472, 232448), 100: Chip(64, 32, 233472, 232448)}
FEWER_IS_WORSE = ("blocks_per_sm", "async_copies", "wide_loads", "wide_stores")
MORE_IS_WORSE = ("spill_bytes", "local_accesses", "narrow_copies", "narrow_loads", "narrow_stores", "barriers")
# what is counted: matrix units; copies past the registers (of tensors and of blocks of bytes the last two); global and local
# memory; barriers; atomics
_COUNTED = r"[HIQD]MMA|[HIQ]GMMA|UTC[A-Z]*MMA|LDGSTS|UTMALDG|UBLKCP|LDG|STG|LDL|STL|BAR|ATOMG?|REDG?"
_SIZED = ("LDGSTS", "LDG", "STG", "LDL", "STL")
_INSTRUCTIONS = {
    "int8": r"(?:mma|wgmma)\S*\.(?:s32\.s8\.s8|s32\.s8\.s8\.s32)\S*|tcgen05\.mma\S*kind::i8\S*",
    "tf32": r"(?:mma|wgmma)\S*\.tf32\.tf32\S*|tcgen05\.mma\S*kind::tf32\S*",
    "half": r"(?:mma|wgmma)\S*\.(?:bf16\.bf16|f16\.f16)\S*|tcgen05\.mma\S*kind::f16\S*",
}


def matrix_instructions(ptx: str) -> dict[str, int]:
    """Kinds of matrix instruction in PTX text, each with the family that carries it: ``{"half wgmma": 8}``."""
    found: dict[str, int] = {}
    for kind, pattern in _INSTRUCTIONS.items():
        for match in re.finditer(pattern, ptx):
            text = match.group()
            family = "tcgen05" if text.startswith("tcgen05") else "wgmma" if text.startswith("wgmma") else "mma"
            found[f"{kind} {family}"] = found.get(f"{kind} {family}", 0) + 1
    return found


def instructions(sass: str) -> dict[str, int]:
    """Instructions of SASS text that move or multiply, those of memory with the bits of a thread: ``{"LDG.128": 8}``."""
    found: dict[str, int] = {}
    for name, modifiers in re.findall(rf"^\s*/\*\w+\*/\s+(?:@!?U?P\w+\s+)?({_COUNTED})\b([.\w]*)", sass, re.MULTILINE):
        if name in _SIZED:
            name += f".{(re.findall(r'[.][US]?(8|16|64|128|256)(?![0-9])', modifiers) or ['32'])[0]}"
        found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items()))


def facts(sass: dict[str, int]) -> dict[str, int]:
    """How a kernel moves data: copies past the registers, those below 16 bytes, barriers, accesses below 4 bytes and of 16."""

    def count(name: str, least: int = 0, most: int = 1 << 10) -> int:
        parts = (key.partition(".") for key in sass)
        return sum(sass[a + b + c] for a, b, c in parts if a == name and least <= int(c or 0) <= most)

    return {
        "async_copies": count("LDGSTS") + count("UTMALDG") + count("UBLKCP"),
        "narrow_copies": count("LDGSTS", most=64),
        "barriers": count("BAR"),
        "narrow_loads": count("LDG", most=16),
        "wide_loads": count("LDG", 128),
        "narrow_stores": count("STG", most=16),
        "wide_stores": count("STG", 128),
        "local_accesses": count("LDL") + count("STL"),
    }


def disassembled(cubin: bytes) -> str:
    """SASS of a binary."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-ndf", "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def blocks_per_sm(arch: int, registers: int, threads: int, shared: int) -> int:
    """Blocks that fit on one multiprocessor: warps, registers in units of 256 per warp, shared memory in 128 bytes."""
    chip = CHIPS[arch]
    warps = -(-threads // 32)
    per_warp = -(-max(1, registers) * 32 // 256) * 256
    by_registers = (65536 // 4 // per_warp) * 4 // warps
    by_shared = chip.shared // (-(-(shared + 1024) // 128) * 128) if shared <= chip.shared_block else 0
    return min(chip.warps // warps, chip.blocks, by_registers, by_shared)


def source_of(spec: dict[str, Any]) -> Any:
    """The kernel with types, constants and alignments of one recorded launch."""
    from triton.compiler import ASTSource

    def revived(value: Any) -> Any:
        return tuple(map(revived, value)) if isinstance(value, list) else value

    kernel = getattr(importlib.import_module(spec["module"]), spec["kernel"])
    signature = {name: revived(kind) for name, kind in spec["signature"].items()}
    constants = {tuple(path): revived(value) for path, value in spec["constants"]}
    return ASTSource(kernel, signature, constants, {tuple(p): [["tt.divisibility", 16]] for p in spec["aligned"]})


def compile_one(spec: dict[str, Any], arch: int) -> dict[str, Any]:
    """Compile one specification for one architecture; a row of the record."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    row = {"kernel": spec["label"], "arch": arch, "triton": triton.__version__, "problems": []}
    log = io.StringIO()
    knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile = True, True  # the log is there on a real run alone
    try:
        with contextlib.redirect_stdout(log), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = triton.compile(source_of(spec), target=GPUTarget("cuda", arch, 32), options=spec["options"])
        text = log.getvalue()
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    except Exception as error:  # whatever the compiler throws is this row's result
        row["problems"].append(f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[-200:]}")
        return row
    shared, threads = compiled.metadata.shared, 32 * spec["options"]["num_warps"]
    row |= {
        "registers": registers,
        "spill_bytes": int(spills[1]) + int(spills[2]),
        "shared_bytes": shared,
        "blocks_per_sm": blocks_per_sm(arch, registers, threads, shared),
        "matrix": matrix_instructions(compiled.asm["ptx"]),
        "sass": instructions(disassembled(compiled.asm["cubin"])),
    }
    row["problems"] += problems_of(row, spec)
    return row


def problems_of(row: dict[str, Any], spec: dict[str, Any]) -> list[str]:
    """What is wrong with one compiled kernel by itself."""
    problems, chip, kinds = [], CHIPS[row["arch"]], {name.split()[0] for name in row["matrix"]}
    if row["shared_bytes"] > chip.shared_block:
        problems.append(f"needs {row['shared_bytes']} bytes of shared memory, {chip.shared_block} are there")
    if kinds != set(spec["matrix"]):
        problems.append(f"products run on {sorted(kinds) or 'no matrix unit'}, not on {spec['matrix'] or 'none'}")
    return problems


def regressions(rows: list[dict[str, Any]], recorded: list[dict[str, Any]]) -> list[str]:
    """What is wrong, or worse than in a record of the same Triton: problems, facts, matrix instructions, rows that are gone."""

    def told(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, **facts(row["sass"])} if "sass" in row else row

    def products(row: dict[str, Any]) -> dict[str, int]:
        return row.get("matrix", {}) | {name: n for name, n in row.get("sass", {}).items() if name.endswith("MMA")}

    before = {(row["kernel"], row["arch"], row["triton"]): told(row) for row in recorded}
    targets = {(row["arch"], row["triton"]) for row in rows}
    found = []
    for row in map(told, rows):
        old = before.pop((row["kernel"], row["arch"], row["triton"]), {"spill_bytes": 0})
        news = [p for p in row["problems"] if p not in old.get("problems", [])]
        for fact in FEWER_IS_WORSE + MORE_IS_WORSE:
            now, then = row.get(fact, 0), old.get(fact)
            if then is not None and (now < then if fact in FEWER_IS_WORSE else now > then):
                news.append(f"{now} {fact.replace('_', ' ')}, recorded {then}")
        for units, then in products(old).items():  # more of them: each multiplies less
            if not 0 < (now := products(row).get(units, 0)) <= then:
                news.append(f"{now} {units} instructions, recorded {then}")
        found += [f"{row['kernel']} on sm_{row['arch']}: {news_}" for news_ in news]
    gone = [key for key in before if key[1:] in targets]
    return found + [
        f"{name} on sm_{arch}: in the record but not compiled; run make gpu-report" for name, arch, _ in gone
    ]


def compiled_rows(arches: list[int], jobs: int, only: str) -> list[dict[str, Any]]:
    """Each job compiles every N-th specification in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "specs.json"
        command = [sys.executable, str(Path(__file__).with_name("gpu_scenes.py")), str(path)]
        subprocess.run(command, env=environment | {"TRITON_INTERPRET": "1"}, check=True)
        base = [sys.executable, __file__, "--raw", str(path), "--arch", ",".join(map(str, arches)), "--only", only]
        started = [
            subprocess.Popen([*base, "--part", f"{i}/{jobs}"], stdout=subprocess.PIPE, text=True, env=environment)
            for i in range(jobs)
        ]
        outputs = [job.communicate()[0] for job in started]
    if any(job.returncode for job in started):
        raise RuntimeError("a compiling process failed; its messages are above")
    rows = [row for output in outputs for row in json.loads(output)]
    return sorted(rows, key=lambda row: (row["arch"], row["kernel"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="80,90,100", help="compute capabilities without the point")
    parser.add_argument("--only", default="", help="specifications whose label contains this")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--check", type=Path, help="record to compare with: what got worse is an error")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--raw", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
    options = parser.parse_args()
    arches = [int(arch) for arch in options.arch.split(",")]
    if options.raw:
        first, step = map(int, options.part.split("/"))
        listed = [spec for spec in json.loads(options.raw.read_text()) if options.only in spec["label"]]
        jobs = [(spec, arch) for arch in arches for spec in listed][first::step]
        json.dump([compile_one(spec, arch) for spec, arch in jobs], sys.stdout)
        return 0
    start = time.perf_counter()
    rows = compiled_rows(arches, options.jobs, options.only)
    for row in rows:
        spilled = f", {row['spill_bytes']} B spilled" if row.get("spill_bytes") else ""
        print(
            f"sm_{row['arch']} {row['kernel']}: {row.get('registers')} registers{spilled} {'; '.join(row['problems'])}"
        )
    recorded = json.loads(options.check.read_text()) if options.check else []
    problems = regressions(rows, [row for row in recorded if options.only in row["kernel"]])
    if options.json:
        options.json.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    for problem in problems:
        print(f"{'error' if options.check else 'note'}: {problem}", file=sys.stderr)
    print(f"{len(rows)} compilations in {time.perf_counter() - start:.0f} s, {len(problems)} problems")
    return 1 if not rows or (options.check and problems) else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
