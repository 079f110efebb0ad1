"""Checkpoints that are whole or not there, and load without running code."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cachefreeze.files import write_atomically


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Replace `path` by `state`: tensors, numbers, strings, lists and dicts of them.

    Raises:
        OSError: the file cannot be written; the old one is untouched.
    """
    # Through memory: on a full disk torch.save raises a RuntimeError that names no reason. And
    # through a copy: an error with a view of the buffer in its traceback crashed Python 3.12.1.
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `save_checkpoint` saved. Nothing in the file can run code."""
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state
