"""Train for hours with kills at random moments: ``python bench/long_run.py --minutes 120``.

Round after round: a run that is never interrupted, then the same run killed (SIGKILL mostly, SIGTERM and SIGINT
sometimes) after random times and resumed until it is finished. Weights, results and predictions of both must be equal
bit for bit, no reported epoch may be lost, and the memory of a process must stay flat. Appends one JSON line per round to
``--log`` and exits with 1 at the first difference, with the folder left behind and the line that repeats it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA, CASES, INTERVAL = "mfeat", ("everything", "robust", "interleave", "kd"), 2.0
WARM_UP = 0.3  # share of a stage after which its memory has to be flat
SHORTEST = 30.0  # seconds that a stage must last to be judged
FLAT = 1.05


def config_of(case: str, epochs: int):
    from mmc_fast.experiments.training import KDConfig, TrainConfig
    from mmc_fast.nn import EBRConfig

    shared = {"epochs": epochs, "batch_size": 64, "checkpoint_seconds": INTERVAL, "rates": (0.3, 0.7)}
    if case == "kd":
        return TrainConfig.preset("kd", fusion="transformer", **shared)
    if case == "interleave":
        heads = EBRConfig(hidden_dim=64, latent_dim=32, psi_dims=(32,), schedule="interleave", interleave_epochs=2)
        sgd = {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "checkpoint_every": 7}
        return TrainConfig.preset("ebr", ebr=replace(heads, reversal=0.1, reconstruction=0.1), **sgd, **shared)
    robust = TrainConfig.preset("robust", **shared)
    if case == "robust":
        return robust
    heads = replace(robust.ebr, substitute="ranked")
    noise = {"noise_modality": "mor", "noise_rate": 0.2}
    loop = {"selection": "masked", "clip_grad_norm": 5.0, "nonfinite": "skip", "lr_decay_every": 3}
    return replace(robust, ebr=heads, kd=KDConfig(epochs=3), **noise, **loop)


def child(case: str, epochs: int, seed: int, folder: Path) -> None:
    """One process: begins or continues the run and reports each epoch on standard output."""
    import torch

    torch.set_num_threads(1)
    from mmc_fast.experiments.data import load
    from mmc_fast.experiments.training import Interrupted, train
    from mmc_fast.experiments.training.progress import Silent

    class Report(Silent):
        def on_epoch(self, record):
            print(record["stage"], record["epoch"], flush=True)
            last = "control" if ebr else "train"
            if record["stage"] == last and record["epoch"] == epochs:
                print("end", 0, flush=True)  # the evaluation follows

    config = config_of(case, epochs)
    ebr = config.ebr is not None and config.control
    try:
        train(load(DATA), config, seed=seed, run_dir=folder, resume="auto", progress=Report())
    except Interrupted:
        sys.exit(130)


class Process:
    """A child, what it reported, and its resident memory over time."""

    def __init__(self, arguments: list[str]) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.epochs: list[tuple[str, int]] = []
        self.errors: list[str] = []
        self.memory: dict[str, list[tuple[float, int]]] = {}  # of each stage: seconds since the start, KiB
        self.threads = [threading.Thread(target=self._read), threading.Thread(target=self._read_errors)]
        for thread in self.threads:
            thread.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.endswith("\n"):  # a kill may cut the last one
                stage, epoch = line.split()
                self.epochs.append((stage, int(epoch)))

    def _read_errors(self) -> None:
        self.errors += self.process.stderr.readlines()

    def wait(self, seconds: float | None) -> bool:
        """Sample memory until the child ends or ``seconds`` have passed; True where it has ended."""
        end = None if seconds is None else time.monotonic() + seconds
        while self.process.poll() is None and (end is None or time.monotonic() < end):
            self._sample()
            time.sleep(0.2 if end is None else min(0.2, max(0.0, end - time.monotonic())))
        return self.process.poll() is not None

    def _sample(self) -> None:
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                stage = self.epochs[-1][0] if self.epochs else "start"
                self.memory.setdefault(stage, []).append((time.monotonic() - self.started, int(line.split()[1])))

    def end(self) -> int:
        code = self.process.wait()
        for thread in self.threads:
            thread.join()
        return code


def growth(memory: dict[str, list[tuple[float, int]]]) -> float:
    """Largest anonymous memory in the last third of a stage over that between its warm-up and the last third.

    Stages are judged one by one, because they hold different things; the worst one counts, and 1 is flat. What follows
    the last epoch (the evaluation) belongs to no stage of training and is left out.
    """
    worst = 1.0
    for stage, samples in memory.items():
        begin, length = samples[0][0], samples[-1][0] - samples[0][0]
        if stage in ("start", "end") or length < SHORTEST:
            continue
        early = [kb for t, kb in samples if begin + WARM_UP * length <= t < begin + 0.66 * length]
        late = [kb for t, kb in samples if t >= begin + 0.66 * length]
        if early and late:
            worst = max(worst, max(late) / max(early))
    return worst


def content(folder: Path) -> dict[str, object]:
    """What two equal runs have in common: files bit for bit, results without clocks."""

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "timing")}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    import numpy as np
    from safetensors.torch import load_file

    results = timeless(json.loads((folder / "results.json").read_text()))
    with np.load(folder / "predictions.npz", allow_pickle=False) as arrays:
        predictions = {name: arrays[name].tobytes() for name in arrays.files}
    files = {}
    for name in ("model.safetensors", "unimodal.safetensors"):  # the order within a file's header is not fixed
        files[name] = {key: (t.dtype, t.shape, t.numpy().tobytes()) for key, t in load_file(folder / name).items()}
    return {"results": results, "predictions": predictions} | files


def killed_run(arguments: list[str], draw: random.Random, mean: float) -> dict:
    """Start, kill, start again until the run is finished; returns counts. Raises RuntimeError at the first fault."""
    kills: dict[str, int] = {}
    stages: dict[str, int] = {}
    done: set[tuple[str, int]] = set()
    lost = starts = 0
    worst = 1.0
    while True:
        process, starts = Process(arguments), starts + 1
        finished = process.wait(draw.choice([draw.uniform(0.0, 6.0), draw.expovariate(1 / mean)]))
        if not finished:
            kind = draw.choices([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], [8, 1, 1])[0]
            process.process.send_signal(kind)
            kills[kind.name] = kills.get(kind.name, 0) + 1
        code = process.end()
        worst = max(worst, growth(process.memory))
        # An epoch of the run itself is reported after it was saved, where a checkpoint is written after each.
        again = [e for e in process.epochs if e in done]
        lost += len(again)
        done.update(process.epochs)
        stage = process.epochs[-1][0] if process.epochs else "start"
        if not finished:
            stages[stage] = stages.get(stage, 0) + 1
        if code == 0:
            return {"kills": kills, "killed_in": stages, "starts": starts, "epochs_repeated": lost, "growth": worst}
        if code not in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 130):
            raise RuntimeError(f"exit code {code} after a resume: {''.join(process.errors)[-2000:]}")


def one_round(number: int, seed: int, budget: float, folder: Path) -> dict:
    draw = random.Random(f"{seed}/{number}")
    case, run_seed = CASES[number % len(CASES)], draw.randrange(2**31)
    line: dict = {"round": number, "case": case, "seed": seed, "run_seed": run_seed}

    def arguments(name: str, epochs: int) -> list[str]:
        return [case, str(epochs), str(run_seed), str(folder / name)]

    started = time.monotonic()
    probe = Process(arguments("probe", 4))
    probe.wait(None)
    if probe.end() != 0:
        raise RuntimeError("".join(probe.errors)[-2000:])
    each = (time.monotonic() - started) / 4
    epochs = max(6, int(budget / each))
    started = time.monotonic()
    whole = Process(arguments("whole", epochs))
    whole.wait(None)
    if whole.end() != 0:
        raise RuntimeError("".join(whole.errors)[-2000:])
    line |= {"epochs": epochs, "whole_seconds": round(time.monotonic() - started, 1)}
    line |= {
        "memory_mb": round(max(kb for stage in whole.memory.values() for _, kb in stage) / 1024),
        "whole_growth": growth(whole.memory),
    }
    started = time.monotonic()
    line |= killed_run(arguments("killed", epochs), draw, mean=max(5.0, budget / 8))
    line["killed_seconds"] = round(time.monotonic() - started, 1)
    a, b = content(folder / "whole"), content(folder / "killed")
    line["equal"] = a == b
    if not line["equal"]:
        line["differ"] = [name for name in a if a[name] != b[name]]
    line["flat"] = max(line["whole_growth"], line["growth"]) <= FLAT
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--round-seconds", type=float, default=240, help="about the length of an uninterrupted run")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None, help="stop after so many")
    parser.add_argument("--log", type=Path, default=None)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        case, epochs, seed, folder = options.child
        child(case, int(epochs), int(seed), Path(folder))
        return 0
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    print(f"seed {seed}: repeat with --seed {seed}", flush=True)
    started, number = time.monotonic(), 0
    while time.monotonic() - started < options.minutes * 60 and number != options.rounds:
        folder = Path(tempfile.mkdtemp(prefix="long-run-"))
        line = one_round(number, seed, options.round_seconds, folder)
        line["minutes"] = round((time.monotonic() - started) / 60, 1)
        print(json.dumps(line), flush=True)
        if options.log is not None:
            with open(options.log, "a") as log:
                log.write(json.dumps(line) + "\n")
        if not (line["equal"] and line["flat"]):
            print(f"FAILED; the folders are in {folder}", flush=True)
            return 1
        shutil.rmtree(folder)
        number += 1
    print(f"{number} rounds in {(time.monotonic() - started) / 60:.1f} minutes: all equal, memory flat", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
