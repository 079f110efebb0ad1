"""Hashes of the bits of tensors."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Returns the SHA-256 over names, types, shapes and bytes, in the order given.

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
    """Returns the `tensors_sha256` of a state dict, with its keys sorted by name."""
    return tensors_sha256(sorted(state_dict.items()))
