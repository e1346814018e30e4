"""Compile the shipped Triton kernels for GPUs that are not here, and read what the binaries say about themselves.

``python bench/gpu_compile.py --arch 80,90,100 --json out.json [--main] [--only TEXT] [--jobs N]`` compiles what the
scenes of ``gpu_scenes.py`` launch, with ``--main`` what its main scenes do. Exit code 1 where one does not compile,
spills on sm_80 or sm_90, needs more shared memory than the chip has, or runs its products on other instructions than it
says. Needs Triton (with its own ptxas), no GPU. With ``--cache FOLDER`` every row is kept there as soon as it is there,
under the kernel's source, its specification, architecture and Triton: a run that was ended goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NO_SPILLS = (80, 90)  # architectures where a spill is an error
# What Triton 3.7.1 gets wrong for sm_100, where the launchers therefore refuse: IEEE float32 products on TF32 units.
# Printed and recorded, no error: kernels [scene].
KNOWN = {
    ("ebr_narrow_bwd [ebr narrow masked fp32]", 100, "3.7.1"),
    ("ebr_narrow_bwd [ebr narrow weights fp32]", 100, "3.7.1"),
    ("ebr_narrow_bwd [ebr narrow, latent 128 masked fp32]", 100, "3.7.1"),
    ("ebr_narrow_bwd [ebr narrow, latent 128 weights fp32]", 100, "3.7.1"),
    ("ebr_wide_bwd [ebr wide weights fp32] 5", 100, "3.7.1"),
}


@dataclass(frozen=True)
class Chip:
    """Limits per multiprocessor of one compute capability (CUDA programming guide, table of compute capabilities)."""

    warps: int
    blocks: int
    shared: int  # bytes per multiprocessor
    shared_block: int  # bytes that one block may use


CHIPS = {
    80: Chip(64, 32, 167936, 166912),
    86: Chip(48, 16, 102400, 101376),
    89: Chip(48, 24, 102400, 101376),
    90: Chip(64, 32, 233472, 232448),
    100: Chip(64, 32, 233472, 232448),
    120: Chip(48, 32, 102400, 101376),
}


@dataclass
class Row:
    """One compilation."""

    kernel: str
    arch: int
    triton: str
    blocks: dict[str, int]
    warps: int
    stages: int
    main: bool = False  # launched by a main scene: make gpu-check compiles it
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    blocks_per_sm: int = 0
    matrix: dict[str, int] = field(default_factory=dict)  # matrix instruction -> how often in the code
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


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


def blocks_per_sm(arch: int, registers: int, threads: int, shared: int) -> int:
    """Blocks that fit on one multiprocessor: warps, registers in units of 256 per warp, shared memory in 128 bytes."""
    chip = CHIPS[arch]
    warps = -(-threads // 32)
    per_warp = -(-max(1, registers) * 32 // 256) * 256
    by_registers = (65536 // 4 // per_warp) * 4 // warps
    by_shared = chip.shared // (-(-(shared + 1024) // 128) * 128) if shared <= chip.shared_block else 0
    return min(chip.warps // warps, chip.blocks, by_registers, by_shared)


def specs(only: str = "", main: bool = False) -> list[dict[str, Any]]:
    """What the scenes of ``gpu_scenes.py`` launch, recorded by the guarded interpreter in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "specs.json"
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, str(Path(__file__).with_name("gpu_scenes.py")), "--record", str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"recording the launches failed: {done.stderr[-2000:]}")
        return [e for e in json.loads(path.read_text()) if only in e["label"] and (e["main"] or not main)]


def source_of(spec: dict[str, Any]) -> Any:
    """The kernel with types, constants and alignments of one recorded launch."""
    import triton.language as tl
    from triton.compiler import ASTSource

    def revived(value: Any) -> Any:
        if isinstance(value, dict):
            return tl.dtype(value["dtype"])
        return tuple(map(revived, value)) if isinstance(value, list) else value

    kernel = getattr(importlib.import_module(spec["module"]), spec["kernel"])
    signature = {name: revived(kind) for name, kind in spec["signature"].items()}
    constants = {tuple(path): revived(value) for path, value in spec["constants"]}
    return ASTSource(kernel, signature, constants, {tuple(p): [["tt.divisibility", 16]] for p in spec["aligned"]})


def blocks_of(spec: dict[str, Any]) -> dict[str, int]:
    """Tile sizes among the constants of a specification: whole numbers under upper-case names."""
    names = list(spec["signature"])
    return {
        names[path[0]]: value
        for path, value in spec["constants"]
        if len(path) == 1 and names[path[0]].isupper() and type(value) is int and value > 1
    }


def compile_one(spec: dict[str, Any], arch: int) -> Row:
    """Compile one specification for one architecture."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    warps, stages = spec["options"]["num_warps"], spec["options"]["num_stages"]
    row = Row(spec["label"], arch, triton.__version__, blocks_of(spec), warps, stages, spec["main"])
    log, start = io.StringIO(), time.perf_counter()
    knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile = True, True  # the log is there on a real run alone
    try:
        with contextlib.redirect_stdout(log), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = triton.compile(
                source_of(spec),
                target=GPUTarget("cuda", arch, 32),
                options={"enable_fp_fusion": True, **spec["options"]},
            )
    except Exception as error:  # whatever the compiler throws is this row's result
        row.problems.append(f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[-200:]}")
        return row
    row.seconds = round(time.perf_counter() - start, 2)
    text, ptx = log.getvalue(), compiled.asm["ptx"]
    registers = re.search(r"Used (\d+) registers", text)
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    if registers is None or spills is None:
        row.problems.append("ptxas printed no resources")
        return row
    row.registers, row.spill_bytes = int(registers[1]), int(spills[2]) + int(spills[3])
    row.shared_bytes = compiled.metadata.shared
    row.matrix = matrix_instructions(ptx)
    row.blocks_per_sm = blocks_per_sm(arch, row.registers, 32 * warps, row.shared_bytes)
    row.problems += _problems(row, set(spec["matrix"]), _idle(spec))
    return row


def _idle(spec: dict[str, Any]) -> bool:
    """Whether the products in the code are never run: the stage "latent" of the wide backward gives them depth zero."""
    return any(value == "latent" for _, value in spec["constants"]) and not spec["matrix"]


def cached(spec: dict[str, Any], arch: int, folder: Path | None) -> Row:
    """The row of an earlier run where source, specification, architecture and Triton are the same; else a new one."""
    if folder is None:
        return compile_one(spec, arch)
    import triton

    kernel = getattr(importlib.import_module(spec["module"]), spec["kernel"])
    what = {name: value for name, value in spec.items() if name not in ("label", "scene", "main")}
    key = json.dumps([what, kernel.cache_key, arch, triton.__version__], sort_keys=True)
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if path.exists():
        row = Row(**json.loads(path.read_text()))
        row.kernel, row.main = spec["label"], spec["main"]
        if row.registers:
            row.problems = _problems(row, set(spec["matrix"]), _idle(spec))
        return row
    row = compile_one(spec, arch)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(asdict(row)))
    os.replace(fresh, path)
    return row


def _problems(row: Row, matrix: set[str], idle: bool = False) -> list[str]:
    problems = []
    if row.spill_bytes and row.arch in NO_SPILLS:
        problems.append(f"spills {row.spill_bytes} bytes")
    if row.shared_bytes > CHIPS[row.arch].shared_block:
        problems.append(f"needs {row.shared_bytes} bytes of shared memory, {CHIPS[row.arch].shared_block} are there")
    kinds = {name.split()[0] for name in row.matrix}
    if kinds != matrix and not idle:
        problems.append(f"products run on {sorted(kinds) or 'no matrix unit'}, not on {sorted(matrix) or 'none'}")
    return problems


def regressions(rows: list[dict[str, Any]], recorded: list[dict[str, Any]], main: bool = False) -> list[str]:
    """What got worse against a record of the same Triton: new spills, fewer resident blocks, rows that are gone.

    ``main``: the rows are those of the main scenes, so no others of the record are missed.
    """
    now = {(row["kernel"], row["arch"], row["triton"]): row for row in rows}
    arches = {(row["arch"], row["triton"]) for row in rows}
    found = []
    for old in recorded:
        key = (old["kernel"], old["arch"], old["triton"])
        if (old["arch"], old["triton"]) not in arches:
            continue
        name = f"{old['kernel']} on sm_{old['arch']}"
        if key not in now and main and not old["main"]:
            continue
        if key not in now:
            found.append(f"{name}: in the record but not compiled; run make gpu-report")
        elif now[key]["spill_bytes"] > old["spill_bytes"]:
            found.append(f"{name}: spills {now[key]['spill_bytes']} bytes, recorded {old['spill_bytes']}")
        elif now[key]["blocks_per_sm"] < old["blocks_per_sm"]:
            found.append(f"{name}: {now[key]['blocks_per_sm']} blocks per SM, recorded {old['blocks_per_sm']}")
    return found


def unrecorded(rows: list[dict[str, Any]], recorded: list[dict[str, Any]]) -> list[str]:
    """Kernels that were compiled but that the record does not know yet."""
    return sorted({row["kernel"] for row in rows} - {row["kernel"] for row in recorded})


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    matrix = " ".join(f"{name} x{count}" for name, count in row["matrix"].items()) or "-"
    blocks = " ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in row["blocks"].items())
    problems = f"  PROBLEM: {'; '.join(row['problems'])}" if row["problems"] else ""
    return (
        f"sm_{row['arch']:<4}{row['kernel']:50}{blocks:30}w{row['warps']} s{row['stages']} {row['registers']:4d} regs "
        f"{row['spill_bytes']:5d} B spilled {row['shared_bytes']:7d} B shared {row['blocks_per_sm']:2d}/SM  {matrix}{problems}"
    )


def _in_parallel(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each job compiles every N-th specification in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "specs.json"
        path.write_text(json.dumps(specs(options.only, options.main)))
        base = [sys.executable, __file__, "--arch", options.arch, "--raw", str(path)]
        base += ["--cache", str(options.cache)] if options.cache else []
        jobs = [
            subprocess.Popen(
                [*base, "--part", f"{i}/{options.jobs}"], stdout=subprocess.PIPE, text=True, env=environment
            )
            for i in range(options.jobs)
        ]
        outputs = [job.communicate()[0] for job in jobs]
    if any(job.returncode for job in jobs):
        raise RuntimeError("a compiling process failed; its messages are above")
    rows = [row for output in outputs for row in json.loads(output)]
    return sorted(rows, key=lambda row: (row["arch"], row["kernel"]))


def _out_of_sight(row: dict[str, Any], options: argparse.Namespace, mine: set[str]) -> bool:
    """Whether a recorded row is of a scene that this run leaves out, and not of one that is gone."""
    left_out = bool(options.only) or (options.main and not row["main"])
    return left_out and row["kernel"] not in mine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="80,90,100", help="compute capabilities without the point")
    parser.add_argument("--only", default="", help="specifications whose label contains this")
    parser.add_argument("--main", action="store_true", help="the main scenes alone")
    parser.add_argument("--json", type=Path, help="write the rows here; rows there that this run does not cover stay")
    parser.add_argument("--check", type=Path, help="record to compare with: what got worse is an error")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cache", type=Path, help="folder of rows that are not compiled again while nothing changed")
    parser.add_argument("--raw", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.raw:
        first, step = map(int, options.part.split("/"))
        listed = json.loads(options.raw.read_text())
        jobs = [(spec, int(arch)) for arch in options.arch.split(",") for spec in listed][first::step]
        json.dump([asdict(cached(spec, arch, options.cache)) for spec, arch in jobs], sys.stdout)
        return 0
    start = time.perf_counter()
    rows = _in_parallel(options)
    problems = []
    for row in rows:
        print(line(row))
        found = [f"{row['kernel']} on sm_{row['arch']}: {problem}" for problem in row["problems"]]
        if (row["kernel"], row["arch"], row["triton"]) in KNOWN:
            print(f"known: {'; '.join(found) or row['kernel'] + ' is well again; take it out of the list'}")
        else:
            problems += found
    if options.check:
        recorded = json.loads(options.check.read_text())
        problems += regressions(rows, recorded, options.main)
        for name in unrecorded(rows, recorded):
            print(f"note: {name} is not in the record yet; make gpu-report enters it")
    if options.json:
        other = json.loads(options.json.read_text()) if options.json.exists() else []
        targets = {(row["triton"], row["arch"]) for row in rows}
        mine = {row["kernel"] for row in rows}
        kept = [r for r in other if (r["triton"], r["arch"]) not in targets or _out_of_sight(r, options, mine)]
        for row in rows:
            row.pop("seconds")  # a record should change with the code alone
        ordered = sorted(kept + rows, key=lambda row: (row["triton"], row["arch"], row["kernel"]))
        text = ",\n".join(json.dumps(row) for row in ordered)
        fresh = options.json.with_suffix(".new")
        fresh.write_text(f"[\n{text}\n]\n")
        os.replace(fresh, options.json)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{len(rows)} compilations in {time.perf_counter() - start:.0f} s, {len(problems)} problems")
    return 1 if problems or not rows else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
