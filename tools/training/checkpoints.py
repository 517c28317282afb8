"""Training that can stop and go on: model, optimizer, options and step in one file, replaced as a whole."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compositor.errors import InvalidInput

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, options: DataclassInstance, step: int
) -> None:
    """Writes the state after `step` steps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    state = {
        "options": asdict(options),
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, partial)
    partial.replace(path)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, options: DataclassInstance
) -> int:
    """Loads what `save_checkpoint` wrote and returns its step; 0 where there is no file.

    Raises InvalidInput where it was written with other options.
    """
    if not path.exists():
        return 0
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["options"] != asdict(options):
        raise InvalidInput(f"checkpoint: {path} is of other options, {state['options']}; give them or another file")
    model.load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def load_model(path: Path, model: nn.Module) -> None:
    """Loads the model alone, whatever it was trained with. Raises InvalidInput where it is missing or another one."""
    if not path.exists():
        raise InvalidInput(f"checkpoint: {path} is missing; train it first")
    try:
        model.load_state_dict(torch.load(path, weights_only=True)["model"])
    except RuntimeError:
        raise InvalidInput(f"checkpoint: {path} holds another network; give the width that it has") from None
    model.eval()
