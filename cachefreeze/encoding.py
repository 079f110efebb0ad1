"""Tensors as the arrays that a store holds, and back."""

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachefreeze.device import host_memory
from cachefreeze.models.units import canonical, is_channels_last
from cachefreeze.store import ARRAY_TYPES, Description, Quantization

LEVELS = 255


@dataclass(frozen=True)
class Encoding:
    """How the rows of one boundary are stored.

    Rows are stored as they lie in memory: channels-last ones as (n, H, W, C), others in the order
    of their axes; bfloat16 as its bits. As `int8` a value is a whole number of steps from its
    channel's middle (the last axis of what is stored); what lies beyond the channel's range is cut
    off.

    Args:
        values: type of the tensors.
        stored: name of the type that they are stored as; that of `values` loses nothing.
        channels_last: the tensors are (n, C, H, W), and lie in memory as (n, H, W, C).
        quantization: of `int8` only.
    """

    values: torch.dtype
    stored: str
    channels_last: bool
    quantization: Quantization | None = None

    @classmethod
    def of(cls, x: Tensor, stored: str | None) -> "Encoding":
        """For rows like `x`: in their own type, or as one of `LOSSY`.

        The ranges of `int8` are those of `x`.
        """
        own, last = name_of(x.dtype), is_channels_last(x)
        if stored == "int8" and x.dim() == 4:
            last = True  # so that channels have ranges of their own
        if stored is None or stored == own or not x.dtype.is_floating_point:
            return cls(x.dtype, own, last)
        if stored != "int8":
            return cls(x.dtype, stored, last)
        plain = in_order(x, last).float()
        channels = plain.reshape(-1, plain.shape[-1] if plain.dim() > 1 else 1)
        low, high = channels.amin(0), channels.amax(0)
        # A channel that is constant here may not be elsewhere, but has to have some step.
        scale = ((high - low) / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
        # -128 is the lowest value, 127 the highest.
        offset = low + scale * 128
        if not (scale.isfinite() & offset.isfinite()).all():  # the network has diverged
            return cls(x.dtype, own, is_channels_last(x))
        return cls(
            x.dtype, stored, last, Quantization(tuple(scale.tolist()), tuple(offset.tolist()))
        )

    @classmethod
    def described(cls, about: Description) -> "Encoding":
        """That of the rows of a store."""
        dtype = getattr(torch, about.values)
        return cls(dtype, about.stored, about.channels_last, about.quantization)

    @property
    def array_type(self) -> str:
        """Of the array that is stored."""
        return ARRAY_TYPES[self.stored]

    @property
    def tensor_type(self) -> torch.dtype:
        """Of what `encode` gives."""
        found = getattr(torch, self.stored)
        assert isinstance(found, torch.dtype)
        return found

    def encode(self, x: Tensor) -> Tensor:
        """Rows (n, C, H, W) or (n, ...) as they are stored, (n, H, W, C) or (n, ...), on the device
        that they are on."""
        assert self.quantization or is_channels_last(x) == self.channels_last
        plain = in_order(x, self.channels_last)
        if self.quantization is not None:
            scale, offset = _on_device(self.quantization, plain.device)
            steps = ((plain.float() - offset) / scale).round_()
            plain = steps.clamp_(-128, 127).to(torch.int8)
        elif self.stored != name_of(self.values):
            plain = plain.to(self.tensor_type)
        return plain.contiguous()

    def empty(
        self, rows: int, row_shape: tuple[int, ...], *, pinned: bool = False
    ) -> tuple[Tensor, NDArray[np.uint8]]:
        """Room for encoded rows: the tensor that `decode` takes, and its bytes (rows, row_bytes)
        for a store to read into; `pinned` for copies that a GPU makes beside its work."""
        stored = host_memory((rows, *row_shape), self.tensor_type, pinned=pinned)
        return stored, as_bytes(stored)

    def decode(self, stored: Tensor, device: torch.device) -> Tensor:
        """Encoded rows as the tensor (n, C, H, W) or (n, ...) that they came from."""
        x = stored.to(device)
        if self.quantization is not None:
            scale, offset = _on_device(self.quantization, device)
            x = (x.float() * scale + offset).to(self.values)
        else:
            x = x.to(self.values)
        return x.permute(0, 3, 1, 2) if self.channels_last else x


@lru_cache(maxsize=8)
def _on_device(quantization: Quantization, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and offset of each channel. Made once: copying them would wait for the device."""
    return (
        torch.tensor(quantization.scale, device=device),
        torch.tensor(quantization.offset, device=device),
    )


def as_array(encoded: Tensor) -> NDArray[Any]:
    """Encoded rows as the array that a store takes: bfloat16 as its bits."""
    encoded = encoded.cpu()
    return (encoded.view(torch.uint16) if encoded.dtype == torch.bfloat16 else encoded).numpy()


def as_bytes(encoded: Tensor) -> NDArray[np.uint8]:
    """The bytes of encoded rows in memory, (n, row_bytes): the same memory."""
    size = prod(encoded.shape[1:]) * encoded.element_size()
    return encoded.view(torch.uint8).reshape(len(encoded), size).numpy()


def in_order(x: Tensor, channels_last: bool) -> Tensor:
    """(n, C, H, W) as (n, H, W, C), if it is to be `channels_last`; anything else as it is."""
    x = canonical(x.detach())
    return x.permute(0, 2, 3, 1).contiguous() if channels_last else x


def name_of(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")
