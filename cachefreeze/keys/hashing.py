"""SHA-256 hashes of named tensors, such as a state dict."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Returns the SHA-256 of names, dtypes, shapes and bytes, in the given order.

    Two sets of tensors have the same hash if and only if they are equal bit by bit. Memory layout
    and device do not matter.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """Returns the `tensors_sha256` of a state dict, sorted by name."""
    return tensors_sha256(sorted(state_dict.items()))
