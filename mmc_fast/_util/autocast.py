"""Autocast as it stands for a kind of device."""

from __future__ import annotations

import torch


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a kind of device; it never is where there is none (meta)."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
