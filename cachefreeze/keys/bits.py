"""Bits of tensors."""

import torch

from cachefreeze.lineage.devices import HostCopy, runs_behind

Tensor = torch.Tensor


def bits_of(tensor: Tensor) -> Tensor:
    """Returns the bytes of a tensor's elements as a one-dimensional uint8 tensor.

    Comparing bits is not comparing numbers: NaN equals itself, and -0.0 differs from 0.0.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


def in_order_of_memory(tensor: Tensor) -> Tensor | None:
    """Returns a tensor's elements in the order of memory, or None if they are not contiguous."""
    if not tensor.numel() or tensor.is_conj() or tensor.is_neg():
        return None
    # Weights may be in `channels_last`.
    stride = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -stride[dim])
    laid = tensor.detach().permute(order)
    return laid.reshape(-1) if laid.is_contiguous() else None


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors have the same shape, type and bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not runs_behind(one):
        return torch.equal(bits_of(one), bits_of(other))
    return not HostCopy((bits_of(one) != bits_of(other)).any()).get().numpy()
