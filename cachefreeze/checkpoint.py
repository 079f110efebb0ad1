"""Checkpoints that are whole or not there, load without running code, and have a hash."""

import hashlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order given.

    Two sets of tensors have the same hash if and only if they are equal bit by bit, whatever their
    memory layout or device.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """`tensors_sha256` of a state dict, in the order of its keys sorted by name."""
    return tensors_sha256(sorted(state_dict.items()))
