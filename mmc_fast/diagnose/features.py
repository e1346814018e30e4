"""Features of a batch, checked: finite, of fixed width, of rows that do not depend on each other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmc_fast.errors import InputError

from .adapter import Adapter


@torch.no_grad()
def checked_features(adapter: Adapter, batch: Any, widths: Mapping[str, int], index: int) -> dict[str, Tensor]:
    """The features of a batch; InputError where they are no fixed set of finite ``[B, ...]``."""
    features = adapter.encode(batch)
    if not isinstance(features, Mapping) or not features:
        raise InputError(
            f"diagnose: encode() returned {type(features).__name__}; it must return modality name -> features"
        )
    found = dict(features)
    for name, x in found.items():
        if not isinstance(x, Tensor) or x.dim() < 2 or not x.is_floating_point():
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"diagnose: features of {name!r} are {got}; they must be floating point [samples, ...]")
        if not bool(torch.isfinite(x).all()):
            row = int((~torch.isfinite(x.flatten(1)).all(1)).nonzero()[0])
            raise InputError(
                f"diagnose: features of {name!r} hold NaN or infinite values in row {row} of batch {index}; drop or repair "
                "such samples"
            )
    if len({len(x) for x in found.values()}) > 1:
        raise InputError(
            f"diagnose: modalities have { ({n: len(x) for n, x in found.items()}) } rows; they must be paired"
        )
    now = {name: x.flatten(1).shape[1] for name, x in found.items()}
    if widths and now != dict(widths):
        raise InputError(
            f"diagnose: batch {index} has features of widths {now} and the first one had {dict(widths)}; widths must not "
            "change (pad or pool sequences)"
        )
    return found


def check_rows(adapter: Adapter, features: Mapping[str, Tensor], logits: Tensor) -> None:
    """Change one row and see that the logits of the others stay."""
    if len(logits) < 2:
        return
    changed = {name: x.clone() for name, x in features.items()}
    for x in changed.values():
        x[0] = 1.5 * x[0] + 1
    with torch.no_grad():
        before, after = adapter.fuse(features), adapter.fuse(changed)
    # Another kernel may serve another batch, so a difference in the last digits is no dependence.
    tolerance = 1e-4 * float(before.abs().max()) + 1e-12
    if not bool((after[1:] - before[1:]).abs().max() <= tolerance):
        raise InputError(
            "diagnose: after only row 0 of a batch was changed, the logits of other rows moved (batch statistics, dropout, "
            "attention across the batch), so there is no Jacobian per sample; call model.eval()"
        )


def fingerprint_of(features: Mapping[str, Tensor]) -> str:
    """SHA-256 of the features of a batch."""
    digest = hashlib.sha256()
    for name, x in features.items():
        digest.update(f"{name} {list(x.shape)}".encode())
        digest.update(x.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
