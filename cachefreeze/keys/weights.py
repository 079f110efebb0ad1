"""Hashes of frozen parameters and buffers, and cheap checks that the bits are still the same.

A version counter that has moved proves a change. One that has not moved proves nothing: fused
optimizers, batch norms, `.data` and numpy write without moving it. So there are three checks. At
every call, all bits of small models are hashed, and tensors of larger ones are compared at a few
places: a write to a whole tensor changes these places. After an event such as an optimizer's step,
all bits are hashed again. Besides that, one piece of memory after another is hashed as time allows.

Tensors on a GPU are compared and hashed there. The host does not wait for the answer of a quick
check, so it may learn of a change one call late.
"""

import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import xxhash

from cachefreeze.keys.bits import bits_of, in_order_of_memory
from cachefreeze.keys.device_watch import DevicesAnswer, DeviceWatch, Reading, read
from cachefreeze.lineage.devices import runs_behind
from cachefreeze.lineage.known import off_line

Tensor = torch.Tensor

_SPOTS = 4
# Largest number of bytes of a tensor that is hashed at every call: it takes as long as reading
# some spots.
_SMALL = 4096
# Number of bytes of larger tensors that are hashed at every call as well: 13 microseconds.
_WHOLE = 1 << 17
# Number of bytes that are hashed at a time: 7 microseconds.
_PIECE = 1 << 16
# Number of earlier states of a tensor that are remembered.
_STATES = 8
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
        reading: Its bits, if it is on a device that runs behind the host.
        spots: Numbers that this function returned, when the tensor was hashed.
        before: Hash before the last one.
        expected: Whether an optimizer has stepped since the last hash, so that a change is no
            surprise.
        unseen: Number of changes that hashes have found and no event and no quick check had shown.
        pieces: Pieces of its memory, each with its hash. None if it is not on the CPU, or not
            dense: then all of it is hashed at once.
        room: Number of its bytes that count towards those that are hashed at every call.
        states: Hashes of its last states, by the numbers that a quick check compares.
        away: Whether its bits are away from their device. Nobody can change them there.
    """

    tensor: "weakref.ref[Tensor]"
    digest: bytes = b""
    pointer: int = 0
    version: int = 0
    look: _Looker | None = None
    reading: Reading | None = None
    spots: list[int] | None = None
    before: bytes = b""
    expected: bool = False
    unseen: int = 0
    pieces: list[tuple[Any, bytes]] | None = None
    room: int = 0
    states: dict[tuple[int, ...], bytes] = field(default_factory=dict)
    away: bool = False


class Look:
    """Quick check of many tensors at once. It is done at every call.

    Args:
        held: Tensors to check, all of which have a hash.
    """

    def __init__(self, held: Sequence[_Held]) -> None:
        held = [one for one in held if not one.away]
        self._tensors = [one.tensor for one in held]
        # Inference tensors have no version.
        self._counting = [n for n, one in enumerate(held) if one.version >= 0]
        self._versions = [one.version for one in held if one.version >= 0]
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
        readings = [one.reading for one in held if one.reading is not None]
        self.watches = [
            DeviceWatch([one for one in readings if one.bits.device == device])
            for device in {one.bits.device for one in readings}
        ]
        self._pieces = [
            (one, memory, digest)
            for one in held
            if not isinstance(one.look, _Whole) and one.reading is None
            for memory, digest in one.pieces or [(None, b"")]
        ]
        self._turn = 0

    def is_same(self) -> bool:
        """Returns whether versions, addresses and checked numbers of all tensors are unchanged."""
        if not self.is_same_on_host():
            return False
        self.ask_devices()
        return not any(watch.differs(wait=True) for watch in self.watches)

    def ask_devices(self) -> None:
        """Starts to compare the tensors on devices that run behind the host."""
        for watch in self.watches:
            watch.ask()

    @property
    def is_on_devices(self) -> bool:
        """Whether all tensors are on devices that run behind the host."""
        return bool(self.watches) and sum(map(len, self.watches)) == len(self._tensors)

    def hash_on_devices(self) -> "DevicesAnswer":
        """Starts to hash all tensors on devices, and returns the answer to be."""
        for watch in self.watches:
            watch.hash_all()
        return DevicesAnswer(self.watches)

    def devices_differ(self) -> bool:
        """Returns whether any device is known to have found a difference."""
        return any(watch.differs() for watch in self.watches)

    def is_same_on_host(self) -> bool:
        """Returns what `is_same` does, without numbers on devices that run behind the host."""
        try:
            tensors: list[Any] = [reference() for reference in self._tensors]
            # Addresses come first, because freed memory must not be read.
            return (
                [*map(_address, tensors)] == self._pointers
                and [*map(_version, [tensors[n] for n in self._counting])] == self._versions
                and [memory[place] for memory, place in self._memory] == self._numbers
                and [*map(xxhash.xxh3_64_intdigest, self._whole)] == self._hashes
                and all(look() == spots for look, spots in self._others)
            )
        except (AttributeError, TypeError):  # a tensor is gone
            return False

    def lost_a_change(self) -> bool:
        """Returns whether a tensor that is gone had changed before, by the memory that it left."""
        return _is_other(
            (memory, digest)
            for held, memory, digest in self._pieces
            if memory is not None and held.tensor() is None
        )

    def next_piece(self) -> tuple[_Held, bool] | None:
        """Hashes the next piece of memory. It must be called after `is_same` only.

        Returns:
            Tensor that the piece belongs to, and whether the whole tensor must be hashed: because
            the piece has changed, or the tensor has no pieces. None after the last piece.
        """
        if self._turn >= len(self._pieces):
            self._turn = 0
            return None
        held, memory, digest = self._pieces[self._turn]
        self._turn += 1
        return held, memory is None or xxhash.xxh3_128_digest(memory) != digest


class Weights:
    """Hashes of tensors that should not change, each computed again when it may be out of date.

    A tensor is identified by its `id`, and held by a weak reference.

    Attributes:
        changes: Number that grows whenever a hash may have changed.
        hashed: Total number of hashed bytes.
    """

    def __init__(self) -> None:
        self.changes = self.hashed = 0
        self._held: dict[int, _Held] = {}
        self._room = _WHOLE

    def digest(self, tensor: Tensor) -> bytes:
        """Returns a hash of 128 bits of a tensor's type, shape, strides and present bits."""
        held = self._of(tensor)
        if not held.digest:
            self._hash(held, tensor)
        return held.digest

    def hash_on_devices(self, tensors: Iterable[Tensor]) -> None:
        """Hashes those tensors on devices that run behind the host and need it, all at once."""
        wanted = [(self._of(one), one) for one in tensors if runs_behind(one)]
        pairs = [(held, one, in_order_of_memory(one)) for held, one in wanted if not held.digest]
        dense = [(held, one, laid) for held, one, laid in pairs if laid is not None]
        look_same = Look([held for held, _, _ in dense if held.before]).is_same()
        readings = read([laid.view(torch.uint8) for _, _, laid in dense])
        for (held, one, _), reading in zip(dense, readings, strict=True):
            if not held.digest:  # a tensor may be given twice
                self._hash(held, one, reading, look_same)

    def look(self, tensors: Iterable[Tensor]) -> None:
        """Checks tensors quickly, and marks those that have changed for a new hash."""
        known = [held for held in map(self._of, tensors) if held.digest]
        if Look([held for held in known if held.reading is not None]).is_same():
            known = [held for held in known if held.reading is None]
        for held in known:
            if not Look([held]).is_same():
                self._doubt(held)

    def take_look(self, tensors: Iterable[Tensor]) -> Look:
        """Makes a quick check of tensors, all of which have a hash."""
        return Look([self._of(tensor) for tensor in tensors])

    def suspect(self, tensors: Iterable[Tensor], event: bool = False) -> None:
        """Marks tensors for a new hash, which is computed before they are used again.

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

    def hash_again(self, tensors: Iterable[Tensor]) -> None:
        """Hashes tensors that will be written to. Those without a present hash are left out."""
        for tensor in tensors:
            held = self._held.get(id(tensor))
            if held is not None and held.digest and not held.expected and not held.away:
                self._doubt(held)
                self._hash(held, tensor)

    def let_go(self, tensors: Iterable[Tensor]) -> None:
        """Stops watching tensors, whose bits leave their device until `take_back`."""
        for held in map(self._of, tensors):
            held.away, held.reading, held.look, held.pieces = True, None, None, None
            self.changes += 1

    def take_back(self, tensor: Tensor) -> None:
        """Goes on watching a tensor, which is hashed before it is used again."""
        held = self._of(tensor)
        held.away = False
        if held.digest:
            self._doubt(held)

    def unseen_changes(self, tensor: Tensor) -> int:
        """Returns how many changes hashes have found that nothing else had shown."""
        return self._of(tensor).unseen

    def hash_pieces(self, look: Look, seconds: float) -> float:
        """Hashes pieces of memory, others at each call, and a whole tensor if a piece has changed.

        Args:
            look: Quick check of the tensors, which has just found no change.
            seconds: Time after which no further piece is hashed, in seconds.

        Returns:
            Seconds that this took.
        """
        spent = 0.0
        for watch in look.watches:
            spent += watch.hash_next() if spent < seconds else 0.0
        began = now = time.perf_counter()
        seconds -= spent
        while now - began < seconds and (found := look.next_piece()) is not None:
            held, in_doubt = found
            tensor = held.tensor()
            if not in_doubt:
                self.hashed += _PIECE
            elif tensor is not None and held.digest:
                self._doubt(held)
                self.digest(tensor)
            now = time.perf_counter()
        return now - began + spent

    def _doubt(self, held: _Held) -> None:
        if held.away:
            return
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

    def _hash(
        self,
        held: _Held,
        tensor: Tensor,
        reading: Reading | None = None,
        look_same: bool = False,
    ) -> None:
        looks_same = bool(held.before) and (look_same or Look([held]).is_same())
        # The memory of an exchanged tensor is still there, as it was when it was exchanged.
        if held.pieces is not None and held.pointer != tensor.data_ptr():
            looks_same = looks_same or _is_other(held.pieces)
        spots = held.spots
        laid = in_order_of_memory(tensor)
        self._room += held.room
        counts = _SMALL < tensor.nbytes <= self._room and not runs_behind(tensor)
        held.room = tensor.nbytes if counts else 0
        self._room -= held.room
        held.pointer = tensor.data_ptr()
        held.version = -1 if tensor.is_inference() else tensor._version
        about = f"{tensor.dtype}{tuple(tensor.shape)}{tensor.stride()}"
        if off := off_line(tensor):
            about += f"@{off}"
        if laid is not None and runs_behind(tensor):
            reading = reading or read([laid.view(torch.uint8)])[0]
            held.reading, held.look, held.pieces = reading, None, None
            held.spots = [xxhash.xxh3_64_intdigest(reading.spots.data)]
            held.digest = xxhash.xxh3_128_digest(about.encode() + reading.digest.tobytes())
        else:
            held.reading = None
            held.look = _looker(laid, bool(held.room)) if laid is not None else None
            held.spots = held.look() if held.look is not None else None
            plain = bits_of(tensor) if laid is None else laid.view(torch.uint8)
            memory = plain.cpu().numpy().data
            pieces = [memory[start : start + _PIECE] for start in range(0, len(memory), _PIECE)]
            digests = [*map(xxhash.xxh3_128_digest, pieces)]
            held.digest = xxhash.xxh3_128_digest(about.encode() + b"".join(digests))
            in_place = laid is not None and tensor.device.type == "cpu"
            held.pieces = list(zip(pieces, digests, strict=True)) if in_place else None
        hidden = self._looks_like_another(held, spots) or looks_same
        held.unseen += hidden and not held.expected and held.digest != held.before
        held.expected = False
        self.hashed += tensor.nbytes

    def _looks_like_another(self, held: _Held, before: list[int] | None) -> bool:
        """Returns whether a tensor looks as in an earlier state, and has other bits.

        Parameters that are exchanged around a validation come back as they were. If they do not,
        somebody has written to a few of their numbers, and rows may have been served since then.

        Args:
            held: Tensor, in its new state.
            before: Numbers that the quick check has compared in the last state.
        """
        if held.spots is None:
            return False
        spots, states = tuple(held.spots), held.states
        then = states.pop(spots, held.digest)
        states[spots] = held.digest
        if len(states) > _STATES:
            del states[next(iter(states))]
        return before != held.spots and then != held.digest


_version, _address = attrgetter("_version"), torch.Tensor.data_ptr


def _is_other(pieces: Iterable[tuple[Any, bytes]]) -> bool:
    """Returns whether any piece of memory has other bits than when it was hashed."""
    return any(xxhash.xxh3_128_digest(memory) != digest for memory, digest in pieces)


def _looker(laid: Tensor, whole: bool) -> _Looker:
    """Makes a function that reads a few numbers, from the same places at each call, or hashes all.

    Args:
        laid: Elements of a tensor in the order of memory.
        whole: Whether to hash all of a tensor that is not small.
    """
    words = laid.view(_WORDS.get(laid.element_size(), torch.uint8))
    if laid.device.type == "cpu" and (whole or laid.nbytes <= _SMALL):
        return _Whole(words.numpy().data)
    places = sorted({int(len(words) * ((k + 1) * _GOLDEN % 1)) for k in range(_SPOTS)})
    if laid.device.type != "cpu":
        chosen = torch.tensor(places, device=laid.device)
        return lambda: words[chosen].tolist()
    return _Memory(words.numpy().data, places)
