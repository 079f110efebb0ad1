"""Bits of frozen parameters and buffers: their hashes, and whether they are still the same.

A version counter that moved proves a change, one that did not proves nothing: fused optimizers,
batch norms, writes through `.data` or numpy move none. So three looks are taken. At every call, a
few numbers out of every tensor are compared with what they were: who writes to a whole tensor
changes them. After an event, such as an optimizer's step, all bits are hashed again. And one tensor
after the other is hashed again as time allows.
"""

import time
import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
import xxhash

Tensor = torch.Tensor

_SPOTS = 4
# Fractions of the golden ratio fall evenly between those before them.
_GOLDEN = 0.6180339887498949
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@dataclass(eq=False, slots=True)
class _Held:
    """What is known of one tensor.

    Attributes:
        tensor: Weak reference to it.
        digest: Hash of its bits. Empty if it must be taken again.
        pointer: Address of its first element, at the last look.
        version: Version counter, at the last look.
        look: Function that reads a few of its numbers.
        spots: What that function returned.
    """

    tensor: "weakref.ref[Tensor]"
    digest: bytes = b""
    pointer: int = 0
    version: int = 0
    look: Callable[[], list[int]] | None = None
    spots: list[int] | None = None


class Weights:
    """Hashes of tensors that are not expected to change, taken again when they may have.

    A tensor is known by its identity, and held weakly.

    Attributes:
        changes: Number that grows whenever a hash may be another one now.
    """

    def __init__(self) -> None:
        self.changes = 0
        self._held: dict[int, _Held] = {}
        self._turn = 0

    def digest(self, tensor: Tensor) -> bytes:
        """Returns the xxh3-128 of a tensor's type, shape and bits, of now."""
        held = self._of(tensor)
        if not held.digest:
            self._hash(held, tensor)
        return held.digest

    def look(self, tensors: Iterable[Tensor]) -> None:
        """Compares versions, addresses and a few numbers of tensors with those at the last look."""
        for tensor in tensors:
            held = self._of(tensor)
            if held.digest and not _is_same(held, tensor):
                self._doubt(held)

    def suspect(self, tensors: Iterable[Tensor]) -> None:
        """Has tensors hashed again before they are relied upon."""
        for tensor in tensors:
            held = self._held.get(id(tensor))
            if held is not None and held.digest:
                self._doubt(held)

    def suspect_next(self, tensors: Collection[Tensor]) -> None:
        """Has one of some tensors hashed again, each in its turn."""
        if tensors:
            self._turn += 1
            self.suspect([list(tensors)[self._turn % len(tensors)]])

    def hash(self, tensors: Iterable[Tensor]) -> float:
        """Takes all hashes anew that are in doubt. Returns the seconds that it took."""
        began = time.perf_counter()
        for tensor in tensors:
            self.digest(tensor)
        return time.perf_counter() - began

    def knows(self, tensor: Tensor) -> bool:
        """Says whether a tensor was ever hashed."""
        held = self._held.get(id(tensor))
        return held is not None and held.tensor() is tensor

    def _doubt(self, held: _Held) -> None:
        held.digest = b""
        self.changes += 1

    def _of(self, tensor: Tensor) -> _Held:
        held = self._held.get(id(tensor))
        if held is None or held.tensor() is not tensor:
            number = id(tensor)
            forget = weakref.ref(tensor, lambda _: self._held.pop(number, None))
            held = self._held[number] = _Held(forget)
        return held

    def _hash(self, held: _Held, tensor: Tensor) -> None:
        held.pointer, held.version = _address(tensor), _version(tensor)
        held.look = _looker(tensor)
        held.spots = held.look() if held.look is not None else None
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
        about = f"{tensor.dtype}{tuple(tensor.shape)}{tensor.stride()}".encode()
        bits = xxhash.xxh3_128(about)
        bits.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        held.digest = bits.digest()


def _is_same(held: _Held, tensor: Tensor) -> bool:
    if held.version != _version(tensor) or held.pointer != _address(tensor):
        return False
    return held.look is None or held.look() == held.spots


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _looker(tensor: Tensor) -> Callable[[], list[int]] | None:
    """Makes a function that reads a few numbers of a tensor's memory, the same at each call."""
    count = tensor.numel()
    if not count or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return None
    size = tensor.element_size()
    plain = tensor.detach().reshape(-1)
    words = plain.view(_WORDS.get(size, torch.uint8))
    places = sorted({int(len(words) * ((k + 1) * _GOLDEN % 1)) for k in range(_SPOTS)})
    if tensor.device.type != "cpu":
        chosen = torch.tensor(places, device=tensor.device)
        return lambda: words[chosen].tolist()
    memory = words.numpy().data
    return lambda: [memory[place] for place in places]
