"""The search for the recommended learner: arms x options x data x seeds on train and validation rows, kept in a log.

``python -m mmc_fast.experiments.compare.exploration docs/results/exploration.jsonl`` runs what is missing of
``configs/exploration.toml`` and appends one line a run; ``mmc-fast compare --check LOG.jsonl:LINE`` repeats a line.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmc_fast._util.schema import from_mapping, to_plain
from mmc_fast._util.toml import merged, read_toml
from mmc_fast.nn import EBRConfig

from ..jobs import Job, perform
from ..training import TrainConfig
from .configs import configs_folder, load_data_configs
from .runs import read_line, score, settings_of

_PLANNING = ("arms", "data", "seeds", "method", "on")  # keys of an option that are no settings of the training


class Planned(NamedTuple):
    """One run: its names and the settings of the job."""

    option: str
    arm: str
    data: str
    seed: int
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        """Names of the run and everything that it depends on, as text."""
        return json.dumps([*self[:4], self.settings], sort_keys=True)


def compact(config: TrainConfig) -> dict[str, Any]:
    """What differs from the defaults: ``from_mapping(TrainConfig(), compact(c), "config") == c``."""
    plain, usual = to_plain(config), to_plain(TrainConfig())
    found = {name: value for name, value in plain.items() if value != usual[name]}
    if config.ebr is not None:
        heads = to_plain(EBRConfig())
        found["ebr"] = {name: value for name, value in plain["ebr"].items() if value != heads[name]}
    return found


def plan(protocol: Mapping[str, Any]) -> Iterator[Planned]:
    """Every run of a protocol: set by set, and there option by option."""
    for data, part in protocol["data"].items():
        (found,) = load_data_configs([data])
        for option, on_top in protocol["options"].items():
            if data not in on_top.get("data", [data]):
                continue
            below = protocol["options"].get(on_top.get("on"), {})
            settings = {k: v for k, v in {**below, **on_top}.items() if k not in _PLANNING}
            for seed in on_top.get("seeds", protocol["seeds"]):
                for arm in on_top.get("arms", protocol["usual"]):
                    values = merged(to_plain(found.budget_with({})), protocol["arms"][arm], settings)
                    options = values.pop("options", {})
                    config = from_mapping(TrainConfig(), values, "config")
                    everything = settings_of(
                        found, seed, config, method=on_top.get("method", "vanilla"), options=options, part="test"
                    )
                    everything |= {"config": compact(config), "inner": part["rows"]}
                    yield Planned(option, arm, data, seed, everything)


def explore(protocol: Mapping[str, Any], log: Path, only: Sequence[str] = ()) -> None:
    """Run what the log does not hold yet, and append a line for each run as it ends."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    known = {Planned(*(read_line(line)[name] for name in Planned._fields)).key for line in lines}
    for planned in plan(protocol):
        if planned.key in known or (only and planned.option not in only):
            continue
        result = perform(Job("/".join(map(str, planned[:4])), score, planned.settings), log.parent)
        scores = {name: found["score"] for name, found in result.values.get("scores", {}).items()}
        commit = _git("rev-parse", "HEAD")  # with a + where the code was changed since; None outside of a repository
        commit += "+" * bool(commit and _git("status", "-s", "."))
        line = {**planned._asdict(), "scores": scores, "failed": result.failed, "commit": commit or None}
        line |= {"seconds": round(result.seconds, 1), "threads": result.threads, "torch": torch.__version__}
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        mean = sum(list(scores.values())[1:]) / max(1, len(scores) - 1)
        print(*planned[:4], f"{scores.get('complete', 0):.4f} {mean:.4f} {result.seconds:.0f} s", flush=True)


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    torch.set_num_threads(1)
    explore(read_toml(configs_folder() / "exploration.toml"), Path(sys.argv[1]), sys.argv[2:])
