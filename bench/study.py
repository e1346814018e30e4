"""Repeat the study of docs/study.md: ``python bench/study.py STAGE [STAGE ...]`` or ``... rerun KEY``.

Every run appends one line to docs/study/runs.jsonl; a run that stands there is not repeated. Stages explore on the
validation parts; only ``test`` opens test parts, and only for the settings in configs/study/frozen.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "docs" / "study" / "runs.jsonl"
FROZEN = ROOT / "configs" / "study" / "frozen.json"
PREDICTIONS = ROOT / "runs" / "study"

SETS = {  # name: (load arguments, settings of the budget)
    "mfeat": (("mfeat", {}), {"epochs": 30, "batch_size": 64}),
    "p2012": (("p2012", {}), {"epochs": 20, "batch_size": 64}),
    "avmnist-hard": (("avmnist", {"variant": "hard"}), {"epochs": 12, "batch_size": 128}),
    "support2": (("support2", {}), {"epochs": 20, "batch_size": 64}),
    "diabetes130": (("diabetes130", {"task": "readmission"}), {"epochs": 4, "batch_size": 256}),
    "avmnist-speaker": (("avmnist", {"variant": "speaker"}), {"epochs": 12, "batch_size": 128}),
    "eicu_demo": (("eicu_demo", {"task": "hospital_death"}), {"epochs": 30, "batch_size": 64}),
}
TESTED = tuple(SETS)
SETS["planted"] = (
    ("planted", {}),
    {"epochs": 30, "batch_size": 64},
)  # mmc_fast.experiments.data.synthetic; validation part only
EXPLORED = ("mfeat", "p2012", "avmnist-hard")
EXPLORE_SEEDS, ABLATION_SEEDS, TEST_SEEDS = (0, 1), tuple(range(10, 15)), tuple(range(100, 105))

COMMON = {"selection": "masked", "unimodal_share": 0.0, "control": False}
# The reference gives the same numbers with and without the native library; ablation and test take it.
HEADS = {"hidden_dim": 128, "latent_dim": 64, "psi_dims": [64, 32], "backend": "reference"}


def plain(**settings) -> dict:
    return COMMON | {"method": "dropout" if settings.get("modality_dropout") else "vanilla"} | settings


def ebr(heads: dict, **settings) -> dict:
    """Residual heads, random masks in training, mean of the present latents in the hidden slots; ``heads`` on top."""
    base = {"residual": True, "normalize": False, "substitute": "mean", "reversal": 0.0}
    loop = {"modality_dropout": 0.5, "substitute_in_training": True}
    return COMMON | {"method": "ebr"} | loop | settings | {"ebr": HEADS | base | heads}


def paper(heads: dict, **settings) -> dict:
    """The published form: plain heads, no masks in training, ranked substitution at inference."""
    base = {"residual": False, "normalize": False, "substitute": "ranked", "reversal": 1.0}
    return COMMON | {"method": "ebr", "unimodal_share": 0.3} | settings | {"ebr": HEADS | base | heads}


TRANSFORMER = {"fusion": "transformer"}
NORMAL = {"normalize": True}
STRONG_PSI = {"psi_steps": 5, "psi_lr_scale": 3.0}

STAGES: dict[str, dict[str, dict]] = {
    "competitors": {
        "vanilla": plain(),
        "dropout .3": plain(modality_dropout=0.3),
        "dropout .5": plain(modality_dropout=0.5),
        "dropout .5 + consistency 1": plain(modality_dropout=0.5, consistency=1.0),
        "dropout .5 + consistency 3": plain(modality_dropout=0.5, consistency=3.0),
        "transformer + dropout .5": plain(modality_dropout=0.5, **TRANSFORMER),
        "transformer + dropout .5 + consistency 1": plain(modality_dropout=0.5, consistency=1.0, **TRANSFORMER),
        "transformer + dropout .5 + consistency 3": plain(modality_dropout=0.5, consistency=3.0, **TRANSFORMER),
    },
    "game": {
        "paper λ 1": paper({}),
        "paper λ .01": paper({"reversal": 0.01}),
        "λ 0": ebr({}),
        "λ .1": ebr({"reversal": 0.1}),
        "λ 1": ebr({"reversal": 1.0}),
        "normalised, λ 0": ebr(NORMAL),
        "normalised, λ .1": ebr(NORMAL | {"reversal": 0.1}),
        "normalised, λ .1, ψ 5 steps × 3": ebr(NORMAL | STRONG_PSI | {"reversal": 0.1}),
        "normalised, λ 1, ψ 5 steps × 3": ebr(NORMAL | STRONG_PSI | {"reversal": 1.0}),
        "normalised, λ 1, ψ 5 steps × 3, bounded": ebr(NORMAL | STRONG_PSI | {"reversal": 1.0, "bounded": True}),
    },
    "alignment": {
        f"{name}, {kind} {weight}": ebr(
            NORMAL | {"alignment": kind, "alignment_weight": weight},
            **({} if name == "masks" else {"modality_dropout": 0.0, "substitute_in_training": False}),
        )
        for name in ("masks", "no masks")
        for kind in ("distance", "contrastive")
        for weight in (0.1, 1.0)
    },
    "additions": {
        "consistency 1": ebr({}, consistency=1.0),
        "consistency 3": ebr({}, consistency=3.0),
        "cross recovery .1": ebr({"cross_recovery": 0.1}),
        "cross recovery 1": ebr({"cross_recovery": 1.0}),
        "learned weights": ebr({"substitute": "learned"}),
        "reconstruction .1": ebr({"reconstruction": 0.1}),
        "transformer": ebr({}, **TRANSFORMER),
        "consistency 1, transformer": ebr({}, consistency=1.0, **TRANSFORMER),
    },
    "candidates": {  # combinations of what helped alone
        "normalised, λ 0, consistency 1": ebr(NORMAL, consistency=1.0),
        "normalised, λ .1, consistency 1": ebr(NORMAL | {"reversal": 0.1}, consistency=1.0),
        "normalised, λ .1, bounded, consistency 1": ebr(NORMAL | {"reversal": 0.1, "bounded": True}, consistency=1.0),
        "normalised, λ .1, consistency 1, cross recovery .1": ebr(
            NORMAL | {"reversal": 0.1, "cross_recovery": 0.1}, consistency=1.0
        ),
        "normalised, λ .1, consistency 1, transformer": ebr(NORMAL | {"reversal": 0.1}, consistency=1.0, **TRANSFORMER),
    },
}


DROPOUT = plain(modality_dropout=0.5, consistency=1.0)
FAST = {"backend": "auto"}
ROBUST = ebr(NORMAL | FAST | {"reversal": 0.1, "cross_recovery": 0.1}, consistency=1.0)
MAIN = {
    "vanilla": plain(),
    "dropout + consistency": DROPOUT,
    "transformer + dropout + consistency": DROPOUT | TRANSFORMER,
    "EBR robust": ROBUST,
}
WEAKEST = {"mfeat": "mor", "p2012": "labs", "avmnist-hard": "audio"}  # by a logistic regression, validation part
# The published schedule: learning rate .01 × .9 every 100 epochs, 1200 epochs. The optimiser is not stated there.
LONG = {"epochs": 1200, "optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "lr_decay": 0.9, "lr_decay_every": 100}

STAGES |= {
    "invariance": {  # how far can the game be pushed?
        "distance 10, no game": ebr(NORMAL | FAST | {"alignment": "distance", "alignment_weight": 10.0}),
        "distance 10 and λ 1, ψ 5 steps × 3": ebr(
            NORMAL | FAST | STRONG_PSI | {"reversal": 1.0, "alignment": "distance", "alignment_weight": 10.0}
        ),
        "λ 10, ψ 5 steps × 3": ebr(NORMAL | FAST | STRONG_PSI | {"reversal": 10.0}),
        "λ 1, ψ 10 steps × 10": ebr(NORMAL | FAST | {"reversal": 1.0, "psi_steps": 10, "psi_lr_scale": 10.0}),
        "λ rises to 1, ψ 5 steps × 3": ebr(NORMAL | FAST | STRONG_PSI | {"reversal": 1.0}, reversal_schedule="dann"),
        "balanced λ 1, ψ 5 steps × 3": ebr(
            NORMAL | FAST | STRONG_PSI | {"reversal": 1.0}, reversal_schedule="balanced"
        ),
        "balanced λ 10, ψ 5 steps × 3": ebr(
            NORMAL | FAST | STRONG_PSI | {"reversal": 10.0}, reversal_schedule="balanced"
        ),
        "latent width 4, λ 1, ψ 5 steps × 3": ebr(NORMAL | FAST | STRONG_PSI | {"reversal": 1.0, "latent_dim": 4}),
        "no residual, λ 1, ψ 5 steps × 3": ebr(NORMAL | FAST | STRONG_PSI | {"reversal": 1.0, "residual": False}),
    },
    "fusion": {
        f"{name}, {fusion}": config | {"fusion": fusion}
        for name, config in {"dropout + consistency": DROPOUT, "EBR robust": ROBUST}.items()
        for fusion in ("concat", "late", "transformer")
    },
    "noise": {  # uniform noise on the weakest modality in training
        f"{name}, r {rate}": config | {"noise_rate": rate} for rate in (0.1, 0.25, 0.5) for name, config in MAIN.items()
    },
    "schedule": {
        "vanilla": plain(**LONG),
        "dropout": plain(modality_dropout=0.5, **LONG),
        "EBR paper form, interleaved": paper(FAST | {"schedule": "interleave"}, **LONG),
        "EBR paper form, interleaved, λ .01": paper(FAST | {"schedule": "interleave", "reversal": 0.01}, **LONG),
        "EBR robust": ROBUST | LONG,
    },
    "planted": MAIN | {"dropout": plain(modality_dropout=0.5), "EBR paper form": paper(FAST | {"reversal": 0.01})},
}
SEEDS = {"planted": ABLATION_SEEDS, "schedule": (0,)}
ON = {"schedule": ("mfeat",), "planted": ("planted",)}  # the other stages: every explored set


@lru_cache(maxsize=2)
def dataset(name: str):
    from mmc_fast.experiments.data import load
    from mmc_fast.experiments.data.synthetic import planted_collapse

    if name == "planted":
        return planted_collapse(seed=0)
    (known, arguments), _ = SETS[name]
    return load(known, **arguments)


def key_of(job: dict) -> str:
    from mmc_fast.experiments.training import TrainConfig

    config = TrainConfig.from_dict(job["config"]).to_dict()
    text = json.dumps([job["set"], config, job["seed"], job["part"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run(job: dict) -> dict:
    """Train and score one job; returns its log line."""
    import torch

    torch.set_num_threads(1)
    from mmc_fast.experiments.training import TrainConfig, train
    from mmc_fast.experiments.training.progress import TrainingDiverged

    config = TrainConfig.from_dict(job["config"])
    folder = None
    if job["part"] == "test":
        folder = PREDICTIONS / key_of(job)
        folder.mkdir(parents=True, exist_ok=True)
    line = {k: job[k] for k in ("stage", "name", "set", "seed", "part", "config")} | {"key": key_of(job)}
    line["config"] = config.to_dict()  # every setting, so that a later change of a default cannot change the line
    try:
        result = train(dataset(job["set"]), config, seed=job["seed"], evaluate_on=(job["part"],))
    except TrainingDiverged as error:
        return line | {"diverged": str(error), "mean_missing": None, "complete": None, "missing": None, "seconds": None}
    if folder is not None:
        torch.save([vars(p) for p in result.predictions], folder / "predictions.pt")
    scores, game = result.results["scores"], result.results["game"]
    line["complete"] = scores["complete"]
    line["missing"] = [row["score"] for row in scores["missing"]]
    line["mean_missing"] = scores["mean_missing"]
    if job["stage"] == "planted":
        line["only"] = {name: row["only"] for name, row in scores["reliance"].items()}
    if game is not None:
        fresh = game["fresh_discriminator"]
        line["fresh"] = None if fresh is None else [fresh["balanced_accuracy"], fresh["chance"]]
        last = result.results["history"][-1]
        line["game"] = {k: last[k] for k in ("loss_md_over_entropy", "psi_accuracy")}
    line["seconds"] = round(result.results["timing"]["total_seconds"], 1)
    return line


def jobs_of(stage: str) -> list[dict]:
    if stage in STAGES:
        sets, seeds = ON.get(stage, EXPLORED), SEEDS.get(stage, EXPLORE_SEEDS)
        part, methods = "validation", STAGES[stage]
    elif stage in ("ablation", "test"):
        frozen = json.loads(FROZEN.read_text())
        part, methods = ("test", frozen["test"]) if stage == "test" else ("validation", frozen["ablation"])
        sets = TESTED if stage == "test" else EXPLORED
        seeds = TEST_SEEDS if stage == "test" else ABLATION_SEEDS
    else:
        raise SystemExit(f"unknown stage {stage!r}; known are {', '.join([*STAGES, 'ablation', 'test', 'rerun'])}")
    return [
        {"stage": stage, "name": name, "set": s, "seed": seed, "part": part, "config": settings(config, s)}
        for seed in seeds
        for s in sets
        for name, config in methods.items()
    ]


def settings(config: dict, name: str) -> dict:
    """``config`` with the budget of a set, where it does not bring its own, and the modality that gets its noise."""
    noise = {"noise_modality": WEAKEST[name]} if config.get("noise_rate") else {}
    return SETS[name][1] | config | noise


def logged() -> dict[str, dict]:
    if not LOG.exists():
        return {}
    return {line["key"]: line for line in map(json.loads, LOG.read_text().splitlines())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="+")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.stage[0] == "rerun":
        stored = logged()[options.stage[1]]
        again = run(stored)
        same = all(stored[k] == again[k] for k in ("complete", "missing"))
        print(f"{'same' if same else 'DIFFERENT'}: stored {stored['missing']}, now {again['missing']}")
        return 0 if same else 1
    done = logged()
    todo = [job for stage in options.stage for job in jobs_of(stage) if key_of(job) not in done]
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(run, job) for job in todo]
        for n, future in enumerate(as_completed(futures), 1):
            line = future.result()
            with open(LOG, "a") as f:
                f.write(json.dumps(line, ensure_ascii=False) + "\n")
            score = line.get("diverged") or f"{line['mean_missing']:.4f} {line['complete']:.4f} {line['seconds']} s"
            print(f"{n}/{len(todo)} {line['set']:16} {line['name']:45} {score}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
