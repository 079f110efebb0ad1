"""Hashes of frozen parameters and buffers, and cheap checks that the bits are still the same.

A version counter that has moved proves a change. One that has not moved proves nothing: fused
optimizers, batch norms, `.data` and numpy write without moving it. So there are three checks. At
every call, small tensors are compared as a whole, and larger ones at a few places: a write to a
whole tensor changes these places. After an event such as an optimizer's step, all bits are hashed
again. Besides that, one tensor after another is hashed again as time allows.
"""

import time
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import xxhash

from cachefreeze.keys.bits import bits_of
from cachefreeze.lineage.known import off_line

Tensor = torch.Tensor

_SPOTS = 4
# Largest number of bytes of a tensor that is hashed at every call: it takes as long as reading
# some spots.
_SMALL = 4096
# Multiples of the golden ratio, modulo 1, are spread evenly however many there are.
_GOLDEN = 0.6180339887498949
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class _Memory(NamedTuple):
    """Reads a few numbers of a tensor in CPU memory."""

    memory: Any
    places: list[int]

    def __call__(self) -> list[int]:
        return [self.memory[place] for place in self.places]


class _Whole(NamedTuple):
    """Hashes all of a small tensor in CPU memory."""

    memory: Any

    def __call__(self) -> list[int]:
        return [xxhash.xxh3_64_intdigest(self.memory)]


_Looker = _Memory | _Whole | Callable[[], list[int]]


@dataclass(eq=False, slots=True)
class _Held:
    """Hash of one tensor, and what a quick check compares.

    Attributes:
        tensor: Weak reference to the tensor.
        digest: Hash of its bits. Empty if it must be computed again.
        pointer: Address of its first element, when it was hashed.
        version: Version counter, when it was hashed.
        look: Function that reads a few of its numbers. None if no such function exists.
        spots: Numbers that this function returned, when the tensor was hashed.
        before: Hash before the last one.
        expected: Whether an optimizer has stepped since the last hash, so that a change is no
            surprise.
        unseen: Whether the last hash has found a change that no event and no quick check had shown.
    """

    tensor: "weakref.ref[Tensor]"
    digest: bytes = b""
    pointer: int = 0
    version: int = 0
    look: _Looker | None = None
    spots: list[int] | None = None
    before: bytes = b""
    expected: bool = False
    unseen: bool = False


class Look:
    """Quick check of many tensors at once. It is done at every call.

    Args:
        held: Tensors to check, all of which have a hash.
    """

    def __init__(self, held: Sequence[_Held]) -> None:
        self._tensors = [one.tensor for one in held]
        self._versions = [one.version for one in held]
        self._pointers = [one.pointer for one in held]
        spots = [(one.look, one.spots) for one in held if one.look is not None]
        on_cpu = [look for look, _ in spots if isinstance(look, _Memory)]
        self._memory = [(look.memory, place) for look in on_cpu for place in look.places]
        self._numbers = [
            number for look, then in spots if isinstance(look, _Memory) for number in then or ()
        ]
        whole = [(look.memory, then) for look, then in spots if isinstance(look, _Whole)]
        self._whole = [memory for memory, _ in whole]
        self._hashes = [number for _, then in whole for number in then or ()]
        self._others = [pair for pair in spots if not isinstance(pair[0], (_Memory, _Whole))]

    def is_same(self) -> bool:
        """Returns whether versions, addresses and checked numbers of all tensors are unchanged."""
        try:
            tensors: list[Any] = [reference() for reference in self._tensors]
            # Addresses come first, because freed memory must not be read.
            return (
                [one.data_ptr() for one in tensors] == self._pointers
                and list(map(_version, tensors)) == self._versions
                and [memory[place] for memory, place in self._memory] == self._numbers
                and [*map(xxhash.xxh3_64_intdigest, self._whole)] == self._hashes
                and all(look() == spots for look, spots in self._others)
            )
        except AttributeError:  # a tensor is gone
            return False


class Weights:
    """Hashes of tensors that should not change, each computed again when it may be out of date.

    A tensor is identified by its `id`, and held by a weak reference.

    Attributes:
        changes: Number that grows whenever a hash may have become another one.
        hashed: Total number of hashed bytes.
    """

    def __init__(self) -> None:
        self.changes = self.hashed = 0
        self._held: dict[int, _Held] = {}
        self._turn = 0

    def digest(self, tensor: Tensor) -> bytes:
        """Returns the xxh3-128 of a tensor's type, shape, strides and present bits."""
        held = self._of(tensor)
        if not held.digest:
            self._hash(held, tensor)
        return held.digest

    def look(self, tensors: Iterable[Tensor]) -> None:
        """Checks tensors quickly, and marks those that have changed for a new hash."""
        for tensor in tensors:
            held = self._of(tensor)
            if held.digest and not Look([held]).is_same():
                self._doubt(held)

    def take_look(self, tensors: Iterable[Tensor]) -> Look:
        """Makes a quick check of tensors, all of which have a hash."""
        return Look([self._of(tensor) for tensor in tensors])

    def suspect(self, tensors: Iterable[Tensor], event: bool = False) -> None:
        """Marks tensors for a new hash, which is computed before they are relied upon.

        Args:
            tensors: Tensors that may have changed. Those without a hash are left out.
            event: Whether an event explains a change, such as an optimizer's step.
        """
        for tensor in tensors:
            held = self._held.get(id(tensor))
            if held is not None:
                held.expected = held.expected or event
                if held.digest:
                    self._doubt(held)

    def has_changed_unseen(self, tensor: Tensor) -> bool:
        """Returns whether the last hash has found a change that nothing else had shown."""
        return self._of(tensor).unseen

    def suspect_next(self, tensors: Collection[Tensor]) -> None:
        """Marks one of the tensors for a new hash, another one at each call."""
        if tensors:
            self._turn += 1
            self.suspect([list(tensors)[self._turn % len(tensors)]])

    def hash(self, tensors: Iterable[Tensor]) -> float:
        """Hashes all tensors that are marked. Returns the seconds that this took."""
        began = time.perf_counter()
        for tensor in tensors:
            self.digest(tensor)
        return time.perf_counter() - began

    def _doubt(self, held: _Held) -> None:
        held.before, held.digest = held.digest, b""
        self.changes += 1

    def _of(self, tensor: Tensor) -> _Held:
        held = self._held.get(id(tensor))
        if held is None or held.tensor() is not tensor:
            number = id(tensor)
            forget = weakref.ref(tensor, lambda _: self._held.pop(number, None))
            held = self._held[number] = _Held(forget)
        return held

    def _hash(self, held: _Held, tensor: Tensor) -> None:
        looks_same = bool(held.before) and Look([held]).is_same()
        held.pointer, held.version = tensor.data_ptr(), _version(tensor)
        held.look = _looker(tensor)
        held.spots = held.look() if held.look is not None else None
        about = f"{tensor.dtype}{tuple(tensor.shape)}{tensor.stride()}"
        if off := off_line(tensor):
            about += f"@{off}"
        bits = xxhash.xxh3_128(about.encode())
        bits.update(bits_of(tensor).cpu().numpy().data)
        held.digest = bits.digest()
        held.unseen = looks_same and not held.expected and held.digest != held.before
        held.expected = False
        self.hashed += tensor.nbytes


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _looker(tensor: Tensor) -> _Looker | None:
    """Makes a function that reads a few numbers of a tensor, from the same places at each call.

    Returns:
        Function, or None if the tensor's memory cannot be read in this way.
    """
    count = tensor.numel()
    if not count or tensor.is_conj() or tensor.is_neg():
        return None
    # Places are counted in the order of memory, because weights may be in `channels_last`.
    stride = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -stride[dim])
    laid = tensor.detach().permute(order)
    if not laid.is_contiguous():
        return None
    size = tensor.element_size()
    plain = laid.reshape(-1)
    words = plain.view(_WORDS.get(size, torch.uint8))
    if tensor.device.type == "cpu" and tensor.nbytes <= _SMALL:
        return _Whole(words.numpy().data)
    places = sorted({int(len(words) * ((k + 1) * _GOLDEN % 1)) for k in range(_SPOTS)})
    if tensor.device.type != "cpu":
        chosen = torch.tensor(places, device=tensor.device)
        return lambda: words[chosen].tolist()
    return _Memory(words.numpy().data, places)
