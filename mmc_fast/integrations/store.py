"""Heads in files: alone with their options, or out of a checkpoint of the whole model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmc_fast._util.extras import require
from mmc_fast._util.files import write_file
from mmc_fast.errors import InputError
from mmc_fast.nn import EBRHead
from mmc_fast.nn.ebr import read_options

_MARK = "_extra_state"


def save(head: EBRHead, path: Path) -> None:
    """Weights and options of ``head``, written beside ``path`` and renamed."""
    state = {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in head.state_dict().items()}
    state = {key: t.detach().cpu().contiguous() for key, t in state.items()}
    if path.suffix == ".safetensors":
        about = {"format": "pt", "mmc_fast": json.dumps(head.options())}
        content = require("safetensors.torch", extra="experiments").save(state, metadata=about)
        write_file(path, lambda temporary: temporary.write_bytes(content))
    else:
        write_file(path, lambda temporary: torch.save(state, temporary))


def read(path: Path) -> Mapping[str, Any]:
    """The state dict in a file (safetensors, or of ``torch.save``) or in the folder of a pretrained model.

    Raises:
        InputError: no such file, or one that needs pickles.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        if not files:
            raise InputError(f"load_ebr: {path} holds no .safetensors and no .bin file")
        return {key: value for file in files for key, value in read(file).items()}
    if not path.is_file():
        raise InputError(f"load_ebr: there is no file {path}")
    if path.suffix == ".safetensors":
        return require("safetensors.torch", extra="experiments").load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"load_ebr: {path} cannot be read without unpickling ({type(error).__name__}: {first}); read it yourself and "
            "give its state dict in place of the path"
        ) from error
    return state if isinstance(state, Mapping) else {}


def find(
    state: Mapping[str, Any], where: str, name: str | None = None
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The heads in a state dict: the prefix of their keys, their options, and their weights without the prefix.

    Raises:
        InputError: no heads, or several.
    """
    for inner in ("state_dict", "model", "module"):  # of Lightning, and of usual training scripts
        if isinstance(state.get(inner), Mapping):
            state = state[inner]
    marked = {key: read_options(value) for key, value in state.items() if str(key).rsplit(".", 1)[-1] == _MARK}
    found = {key: options for key, options in marked.items() if options is not None}
    if name is not None and len(found) > 1:
        found = {key: options for key, options in found.items() if f".{key}".endswith(f".{name}.{_MARK}")}
    if len(found) != 1:
        places = ", ".join(key.removesuffix(f".{_MARK}") for key in found) or "nowhere"
        raise InputError(
            f"load_ebr: {where} must hold one set of EBR heads with options, found at: {places}; choose one by name=, write "
            "it with handle.save(path), or as the state dict of a model with heads"
        )
    (mark, options), = found.items()  # fmt: skip
    prefix = mark.removesuffix(_MARK)
    return prefix, options, {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}


def load(head: EBRHead, path: Path, name: str) -> None:
    """Into an equal head; InputError with what differs for another."""
    _, options, tensors = find(read(path), str(path), name)
    head.check_options(options, f"load: {path}")
    head.load_state_dict(tensors)


def owner(model: nn.Module, prefix: str) -> tuple[nn.Module, str]:
    """The module that had the heads, and their name, by the prefix of their keys; wrappers (DDP, compile) may be gone."""
    path, _, name = prefix.rstrip(".").rpartition(".")
    parts = path.split(".") if path else []
    for start in range(len(parts) + 1):
        try:
            return model.get_submodule(".".join(parts[start:])), name or "ebr"
        except AttributeError:
            continue
    return model, name or "ebr"
