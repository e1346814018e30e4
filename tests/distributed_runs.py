"""What the processes of the distributed tests do: ``python -m torch.distributed.run ... distributed_runs.py TASK OUT ...``."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from training_data import small, tiny

from mmc_fast.errors import InputError
from mmc_fast.experiments.data import MultimodalDataset
from mmc_fast.experiments.training import ProcessLost, TrainConfig, train

torch.set_num_threads(1)
RANK = int(os.environ.get("RANK", "0"))
EVERYTHING = {
    "modality_dropout": 0.4,
    "consistency": 1.0,
    "substitute_in_training": True,
    "selection": "masked",
    "noise_modality": "b",
    "noise_rate": 0.2,
    "clip_grad_norm": 2.0,
}


def cases() -> dict[str, TrainConfig]:
    """Batches of 16 of 61 rows: the last one has 13, which no number of processes divides; masks differ by row."""
    heads = {"ebr_reconstruction": 0.5, "ebr_cross_recovery": 0.3}
    sgd = {"optimizer": "sgd", "lr": 0.02, "momentum": 0.9}
    found = {
        "vanilla": small("vanilla", **sgd),
        "dropout": small("dropout", fusion="transformer"),
        "kd": replace(small("kd", **sgd), kd=replace(small("kd").kd, epochs=1, batch_size=32, embedding_dim=4)),
        "everything": small("ebr", **EVERYTHING, **heads, **sgd),
        "interleave": small("ebr", ebr_schedule="interleave", ebr_interleave_epochs=1, **sgd),
    }
    return {name: replace(config, epochs=2) for name, config in found.items()}


def data(seed: int) -> MultimodalDataset:
    return tiny(seed, absent=0.35, sizes=(61, 31, 30))


def sparse(seed: int) -> MultimodalDataset:
    """The second modality in 8 % of the rows: most batches of 4, and most shares of a process, have none of it."""
    whole = tiny(seed, sizes=(61, 31, 30))
    present = whole.present.clone()
    present[:, 1] = torch.rand(len(present), generator=torch.Generator().manual_seed(seed)) < 0.08
    features = {k: torch.where(present[:, i, None], x, 0.0) for i, (k, x) in enumerate(whole.features.items())}
    return replace(whole, present=present, features=features)


def matrix(seed: int, count: int) -> dict[str, TrainConfig]:
    """``count`` drawn combinations of preset, schedule, fusion, momentum and accumulation (0: all of them)."""
    heads = {"ebr_reconstruction": 0.5, "ebr_cross_recovery": 0.3}
    presets: dict[str, dict] = {"vanilla": {}, "dropout": {}, "kd": {}, "joint": heads, "robust": {}}
    presets["interleave"] = heads | {"ebr_schedule": "interleave", "ebr_interleave_epochs": 1, "ebr_patience": 1}
    presets["everything"] = EVERYTHING | heads
    found = {}
    for name, changes in presets.items():
        for fusion in ("concat", "late", "transformer"):
            for momentum, accumulate in ((0.9, 1), (0.9, 3), (0.0, 2)):
                sgd = {"optimizer": "sgd", "lr": 0.02, "momentum": momentum, "accumulate": accumulate, "fusion": fusion}
                method = name if name in ("vanilla", "dropout", "kd", "robust") else "ebr"
                config = small(method, epochs=2, batch_size=4, control=False, **changes, **sgd)
                if name == "robust":
                    config = replace(config, ebr=replace(config.ebr, latent_dim=4, hidden_dim=8, psi_dims=(6,)))
                if config.kd is not None:
                    config = replace(config, kd=replace(config.kd, epochs=1, batch_size=8, embedding_dim=4))
                found[f"{name}-{fusion}-{'momentum' if momentum else 'plain'}-{accumulate}"] = config
    names = random.Random(seed).sample(sorted(found), count or len(found))
    return {name: found[name] for name in names}


def compare_matrix(out: Path, seed: int, count: int) -> None:
    for name, config in matrix(seed, count).items():
        dump(train(sparse(seed), config, seed=seed), out / f"{name}-{RANK}")


def dump(result, path: Path) -> None:
    save_file({k: v.clone() for k, v in result.model.state_dict().items()}, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(result.results))


def compare(out: Path, seed: int, accumulate: int) -> None:
    for name, config in cases().items():
        result = train(data(seed), replace(config, accumulate=accumulate), seed=seed)
        dump(result, out / f"{name}-{RANK}")


def die(out: Path, seed: int, rank: int) -> None:
    """The process ``rank`` dies after some steps of the third epoch; the others report."""
    from mmc_fast.experiments.training.steps import Stepper

    original, steps = Stepper.backward, []

    def backward(self, *args):
        steps.append(1)
        if len(steps) == 10 and rank == RANK:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args)

    Stepper.backward = backward
    config = small("dropout", epochs=4)
    try:
        train(data(seed), config, seed=seed, run_dir=out / "run", resume="auto")
    except ProcessLost as error:
        (out / f"lost-{RANK}").write_text(str(error))
        os._exit(7)


def resume(out: Path, seed: int) -> None:
    result = train(data(seed), small("dropout", epochs=4), seed=seed, run_dir=out / "run", resume=True)
    dump(result, out / f"resumed-{RANK}")


def refuse(out: Path, seed: int) -> None:
    """Arguments that differ between processes, a folder in use, losses that cannot be split."""
    tries = {
        "arguments": lambda: train(data(seed), small("vanilla"), seed=seed + RANK),
        "folder": lambda: train(data(seed), small("vanilla"), seed=seed, run_dir=out),
        "dropout": lambda: train(data(seed), small("vanilla", encoder_dropout=0.1), seed=seed),
    }
    found = {}
    for name, attempt in tries.items():
        try:
            attempt()
        except InputError as error:
            found[name] = str(error)
    (out / f"refused-{RANK}.json").write_text(json.dumps(found))


def interrupt(out: Path, seed: int) -> None:
    """SIGTERM reaches one process only; all stop at the same step, saved."""
    from mmc_fast.experiments.training import Interrupted
    from mmc_fast.experiments.training.steps import Stepper

    original, steps = Stepper.backward, []

    def backward(self, *args):
        steps.append(1)
        if len(steps) == 6 and RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    Stepper.backward = backward
    try:
        train(data(seed), small("dropout", epochs=4), seed=seed, run_dir=out / "run")
    except Interrupted as error:
        (out / f"interrupted-{RANK}").write_text(f"{len(steps)} {error}")


def wrapped(out: Path, seed: int) -> None:
    """EBR heads inside of DistributedDataParallel, exact through ``normalizer`` where the shares are uneven."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from mmc_fast.nn import EBRHead

    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    g = torch.Generator().manual_seed(seed)
    features = [torch.randn(13, d, generator=g) for d in (5, 3, 4)]
    present = torch.rand(13, 3, generator=g) < 0.6
    source = torch.randint(0, 3, (13, 3), generator=g)
    torch.manual_seed(seed)
    head = EBRHead([5, 3, 4], latent_dim=4, hidden_dim=8, psi_dims=(6,))
    cut = slice(0, 3) if rank == 0 else slice(3, 13)
    model = DistributedDataParallel(head)
    here = present[cut].gather(1, source[cut])
    counts = torch.stack([present[cut].sum(), (present[cut] & here).sum()]).float()
    dist.all_reduce(counts)
    # The wrapper divides the sum of the gradients by the number of processes.
    out_ = model([x[cut] for x in features], present[cut], source[cut], 0.5, counts / size)
    (out_.discrimination_loss + out_.reconstruction_loss).backward()
    save_file({n: p.grad for n, p in head.named_parameters()}, out / f"wrapped-{rank}.safetensors")
    if rank == 0:
        head.zero_grad()
        whole = head(features, present, source, 0.5)
        (whole.discrimination_loss + whole.reconstruction_loss).backward()
        save_file({n: p.grad for n, p in head.named_parameters()}, out / "whole.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    task, out, seed, *rest = sys.argv[1:]
    globals()[task](Path(out), int(seed), *map(int, rest))
