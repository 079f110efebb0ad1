"""Bits of frozen parameters and buffers: their hashes, and whether they are still the same.

A version counter that moved proves a change, one that did not proves nothing: fused optimizers,
batch norms, writes through `.data` or numpy move none. So three looks are taken. At every call,
all bits of small models are hashed, and a few numbers out of every tensor of larger ones are
compared: who writes to a whole tensor changes them. After an event, such as an optimizer's step,
all bits are hashed again. And one piece of memory after the other is hashed as time allows.
"""

import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import xxhash

from cachefreeze.keys.bits import bits_of
from cachefreeze.lineage.known import off_line

Tensor = torch.Tensor

_SPOTS = 4
# Bytes of a tensor that is looked at as a whole: a hash of so many takes as long as some spots.
_SMALL = 4096
# Bytes of larger tensors that are looked at as a whole nevertheless: 13 microseconds a call.
WHOLE = 1 << 17
# Bytes of memory that are hashed at a time: 7 microseconds.
_PIECE = 1 << 16
# Number of states of a tensor that are remembered, to see which one comes back.
_STATES = 8
# Fractions of the golden ratio fall evenly between those before them.
_GOLDEN = 0.6180339887498949
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class _Memory(NamedTuple):
    """Reads a few numbers of memory on the CPU."""

    memory: Any
    places: list[int]

    def __call__(self) -> list[int]:
        return [self.memory[place] for place in self.places]


class _Whole(NamedTuple):
    """Hashes all of a small memory on the CPU."""

    memory: Any

    def __call__(self) -> list[int]:
        return [xxhash.xxh3_64_intdigest(self.memory)]


_Looker = _Memory | _Whole | Callable[[], list[int]]


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
        before: Hash before the last one.
        expected: Whether the last change was to be expected, since an optimizer has stepped.
        unseen: Whether the bits have changed, and neither an event nor a look has shown it.
        pieces: Its memory in pieces, each with its hash. None if it is not on the CPU, or not in
            one piece: then all of it is hashed at once.
        room: Bytes that it takes of those that are looked at as a whole.
        states: Hashes of earlier states, by what the function returned in them.
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
    pieces: list[tuple[Any, bytes]] | None = None
    room: int = 0
    states: dict[tuple[int, ...], bytes] = field(default_factory=dict)


class Look:
    """A look at many tensors at once, to be taken at every call: it is a few lists long.

    Args:
        held: What is known of the tensors, all of which were hashed.
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
        # Where no look at all bits is taken, they are hashed piece by piece.
        self._pieces = [
            (one, memory, digest)
            for one in held
            if not isinstance(one.look, _Whole)
            for memory, digest in one.pieces or [(None, b"")]
        ]
        self._turn = 0

    def next_piece(self) -> tuple[_Held, bool] | None:
        """Hashes the next piece of memory. Call it after `is_same`.

        Returns:
            What is known of its tensor, and whether all of the tensor must be hashed: if the piece
            has changed, or if the tensor has no pieces. None after the last piece.
        """
        if self._turn >= len(self._pieces):
            self._turn = 0
            return None
        held, memory, digest = self._pieces[self._turn]
        self._turn += 1
        return held, memory is None or xxhash.xxh3_128_digest(memory) != digest

    def is_same(self) -> bool:
        """Says whether versions, addresses and some numbers of all tensors are what they were."""
        try:
            tensors: list[Any] = [reference() for reference in self._tensors]
            # Addresses come first: memory that was given back must not be read.
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
    """Hashes of tensors that are not expected to change, taken again when they may have.

    A tensor is known by its identity, and held weakly.

    Attributes:
        changes: Number that grows whenever a hash may be another one now.
        hashed: Bytes of all hashes that were taken.
    """

    def __init__(self) -> None:
        self.changes = self.hashed = 0
        self._held: dict[int, _Held] = {}
        self._room = WHOLE

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
            if held.digest and not Look([held]).is_same():
                self._doubt(held)

    def take_look(self, tensors: Iterable[Tensor]) -> Look:
        """Returns a look at tensors, all of which have a hash."""
        return Look([self._of(tensor) for tensor in tensors])

    def suspect(self, tensors: Iterable[Tensor], event: bool = False) -> None:
        """Has tensors hashed again before they are relied upon.

        Args:
            tensors: Tensors.
            event: Whether somebody may just have written to them, so that a change is no surprise.
        """
        for tensor in tensors:
            held = self._held.get(id(tensor))
            if held is not None:
                held.expected = held.expected or event
                if held.digest:
                    self._doubt(held)

    def has_changed_unseen(self, tensor: Tensor) -> bool:
        """Says whether the last hash has shown a change that nothing else had shown."""
        return self._of(tensor).unseen

    def hash(self, tensors: Iterable[Tensor]) -> float:
        """Takes all hashes anew that are in doubt. Returns the seconds that it took."""
        began = time.perf_counter()
        for tensor in tensors:
            self.digest(tensor)
        return time.perf_counter() - began

    def hash_some(self, look: Look, seconds: float) -> float:
        """Hashes pieces of memory, each in its turn, and all of a tensor that has changed in one.

        Args:
            look: Look at the tensors, which has just said that they look the same.
            seconds: Seconds after which no further piece is hashed.

        Returns:
            Seconds that it took.
        """
        began = now = time.perf_counter()
        while now - began < seconds and (found := look.next_piece()) is not None:
            held, in_doubt = found
            tensor = held.tensor()
            if in_doubt and tensor is not None and held.digest:
                self._doubt(held)
                self.digest(tensor)
            elif not in_doubt:
                self.hashed += _PIECE
            now = time.perf_counter()
        return now - began

    def _doubt(self, held: _Held) -> None:
        held.before, held.digest = held.digest, b""
        self.changes += 1

    def _of(self, tensor: Tensor) -> _Held:
        held = self._held.get(id(tensor))
        if held is None or held.tensor() is not tensor:
            number = id(tensor)
            forget = weakref.ref(tensor, lambda _: self._forget(number))
            held = self._held[number] = _Held(forget)
        return held

    def _forget(self, number: int) -> None:
        held = self._held.pop(number, None)
        self._room += held.room if held is not None else 0

    def _hash(self, held: _Held, tensor: Tensor) -> None:
        looks_same = bool(held.before) and Look([held]).is_same()
        looked = held.spots
        self._room += held.room
        laid = _laid(tensor)
        held.room = tensor.nbytes if _SMALL < tensor.nbytes <= self._room else 0
        self._room -= held.room
        held.pointer, held.version = tensor.data_ptr(), _version(tensor)
        held.look = _looker(laid, bool(held.room)) if laid is not None else None
        held.spots = held.look() if held.look is not None else None
        about = f"{tensor.dtype}{tuple(tensor.shape)}{tensor.stride()}"
        if off := off_line(tensor):
            about += f"@{off}"
        bits = xxhash.xxh3_128(about.encode())
        plain = (bits_of(tensor) if laid is None else laid).view(torch.uint8)
        memory = plain.cpu().numpy().data
        pieces = [memory[start : start + _PIECE] for start in range(0, len(memory), _PIECE)]
        digests = [*map(xxhash.xxh3_128_digest, pieces)]
        bits.update(b"".join(digests))
        held.digest = bits.digest()
        in_place = laid is not None and tensor.device.type == "cpu"
        held.pieces = list(zip(pieces, digests, strict=True)) if in_place else None
        hidden = self._looks_like_another(held, looked) or looks_same
        held.unseen = hidden and not held.expected and held.digest != held.before
        held.expected = False
        self.hashed += tensor.nbytes

    def _looks_like_another(self, held: _Held, before: list[int] | None) -> bool:
        """Says whether a tensor looks as in an earlier state, and has other bits than it had then.

        Weights that are exchanged around a validation come back as they were. If they do not,
        somebody wrote to a few of their numbers, and rows may have been served since.

        Args:
            held: What is known of the tensor.
            before: What a look at it gave in the state before this one.
        """
        if held.spots is None:
            return False
        looks, states = tuple(held.spots), held.states
        then = states.pop(looks, held.digest)
        states[looks] = held.digest
        if len(states) > _STATES:
            del states[next(iter(states))]
        return before != held.spots and then != held.digest


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _laid(tensor: Tensor) -> Tensor | None:
    """Returns the elements of a tensor in the order of memory, if they lie in one piece."""
    if not tensor.numel() or tensor.is_conj() or tensor.is_neg():
        return None
    # Weights may be in `channels_last`.
    stride = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -stride[dim])
    laid = tensor.detach().permute(order)
    return laid.reshape(-1) if laid.is_contiguous() else None


def _looker(laid: Tensor, whole: bool) -> _Looker:
    """Makes a function that reads a few numbers of memory, the same at each call, or hashes it.

    Args:
        laid: Elements in the order of memory.
        whole: Whether all of a larger memory is hashed, too.
    """
    words = laid.view(_WORDS.get(laid.element_size(), torch.uint8))
    if laid.device.type == "cpu" and (whole or laid.nbytes <= _SMALL):
        return _Whole(words.numpy().data)
    places = sorted({int(len(words) * ((k + 1) * _GOLDEN % 1)) for k in range(_SPOTS)})
    if laid.device.type != "cpu":
        chosen = torch.tensor(places, device=laid.device)
        return lambda: words[chosen].tolist()
    return _Memory(words.numpy().data, places)
