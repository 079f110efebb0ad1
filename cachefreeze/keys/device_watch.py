"""Checks of frozen tensors on a device that runs behind the host, without waiting for it."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from cachefreeze.keys.device_digests import tensor_digest
from cachefreeze.lineage.devices import HostCopy, to_device

Tensor = torch.Tensor

# Bytes of a large tensor that are compared at every call, at each of two places. Smaller tensors
# are compared as a whole.
_RUN, _SMALL = 16, 4096
_GOLDEN = 0.6180339887498949
# Bytes a second that a device hashes, at least. It is not known how long the work of one tensor
# takes, because nothing waits for it.
_RATE = 5e10


class Reading(NamedTuple):
    """Bits of a tensor, and what was found when they were read.

    Attributes:
        bits: Bytes of the tensor itself, of one dimension.
        digest: Hash of all bytes, as int64 of shape (2,).
        spots: Bytes that are compared at every call.
    """

    bits: Tensor
    digest: np.ndarray
    spots: np.ndarray


def read(tensors: Sequence[Tensor]) -> list[Reading]:
    """Hashes tensors on their devices. The host waits once for each device.

    Args:
        tensors: Bytes of tensors, each of one dimension.
    """
    devices = {one.device for one in tensors}
    started = {one: _Start([bits for bits in tensors if bits.device == one]) for one in devices}
    found = {device: iter(start.readings()) for device, start in started.items()}
    return [next(found[one.device]) for one in tensors]


class _Start:
    """Hashes of tensors of one device, on their way to the host.

    Args:
        tensors: Bytes of the tensors, each of one dimension.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        digests = torch.cat([tensor_digest(one) for one in tensors]).view(torch.uint8)
        runs = [run for one in tensors for run in _runs(one)]
        self._copy = HostCopy(torch.cat([digests.reshape(-1), *runs]))

    def readings(self) -> Iterator[Reading]:
        """Yields the hashes in order. Waits for the device."""
        memory: np.ndarray = self._copy.get().numpy()
        place = 16 * len(self._tensors)
        digests = memory[:place].view(np.int64).reshape(-1, 2)
        for one, digest in zip(self._tensors, digests, strict=True):
            size = sum(map(len, _runs(one)))
            yield Reading(one, digest, memory[place : place + size])
            place += size


def _runs(bits: Tensor) -> list[Tensor]:
    """Returns the bytes that are compared at every call."""
    if len(bits) <= _SMALL:
        return [bits]
    starts = (int((len(bits) - _RUN) * ((k + 1) * _GOLDEN % 1)) for k in range(2))
    return [bits[start : start + _RUN] for start in starts]


class DeviceWatch:
    """Watches tensors of one device.

    Each check is done on the device, and its answer is read when it is there.

    Args:
        readings: Tensors of one device, as they were when they were hashed.
    """

    def __init__(self, readings: Sequence[Reading]) -> None:
        device = readings[0].bits.device
        self._runs = [run for one in readings for run in _runs(one.bits)]
        self._expected = to_device(np.concatenate([one.spots for one in readings]), device)
        self._bits = [one.bits for one in readings]
        self._digests = to_device(np.stack([one.digest for one in readings]), device)
        self._differs = torch.zeros((), dtype=torch.bool, device=device)
        self._answers: deque[HostCopy] = deque()
        self._found = False
        self._turn = 0

    def __len__(self) -> int:
        """Returns the number of tensors."""
        return len(self._bits)

    def ask(self) -> None:
        """Compares some bytes of every tensor on the device."""
        self._differs.logical_or_((torch.cat(self._runs) != self._expected).any())
        self._send()

    def hash_next(self) -> float:
        """Hashes the next tensor on the device. Returns the seconds that this takes, at most."""
        began = time.perf_counter()
        turn = self._turn
        self._hash(turn)
        self._turn = (turn + 1) % len(self)
        self._send()
        return time.perf_counter() - began + len(self._bits[turn]) / _RATE

    def hash_all(self) -> None:
        """Hashes all tensors on the device."""
        for place in range(len(self)):
            self._hash(place)
        self._send()

    def _hash(self, place: int) -> None:
        found = tensor_digest(self._bits[place])[0]
        self._differs.logical_or_((found != self._digests[place]).any())

    def _send(self) -> None:
        self._answers.append(HostCopy(self._differs))

    @property
    def is_answered(self) -> bool:
        """Whether the answers to all questions are there."""
        self.differs()
        return not self._answers

    def differs(self, wait: bool = False) -> bool:
        """Returns whether a difference is known.

        Args:
            wait: Whether to wait for the answers to all questions.
        """
        while self._answers and (wait or self._answers[0].is_there):
            self._found = bool(self._answers.popleft().get().numpy()) or self._found
        return self._found


class DevicesAnswer:
    """Answer to a question that was put to several devices.

    Args:
        watches: Watches of the devices.
    """

    def __init__(self, watches: Sequence[DeviceWatch]) -> None:
        self._watches = watches

    @property
    def is_there(self) -> bool:
        """Whether the answer is there."""
        return all(watch.is_answered for watch in self._watches)

    def get(self) -> bool:
        """Returns whether nothing differs. Waits until that is known."""
        return not any(watch.differs(wait=True) for watch in self._watches)
