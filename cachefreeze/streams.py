"""Copies between a CUDA device and the host, made beside the device's other work."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


class Mark:
    """A moment in a stream's work. Without a stream, it has come."""

    def __init__(self, event: Any = None) -> None:
        self._event = event

    def wait(self) -> None:
        """Until it has come; who waits sleeps."""
        if self._event is not None:
            self._event.synchronize()

    def hand_over(self, x: Tensor) -> None:
        """What the device is asked for from here on comes after this moment, and may use `x`, whose
        memory was taken in the other stream."""
        if self._event is not None:
            stream = torch.cuda.current_stream(x.device)
            stream.wait_event(self._event)
            # Or the other stream would use its memory again too early.
            x.record_stream(stream)


class SideStream:
    """A stream of a CUDA device's own for copies: they are made in the order in which they are
    asked for, and beside its other work. On another device each is made at once.

    Args:
        device: that is copied from or to.

    Attributes:
        is_beside: whether there is a stream; memory of the host should be pinned then, for a copy
            from or to any other waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.is_beside = self._stream is not None

    def follow(self) -> None:
        """What is asked for from here on comes after what the device was asked for so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def current(self) -> AbstractContextManager[Any]:
        """Inside it, what this thread asks the device for goes into this stream."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def to_host(self, rows: Tensor, room: Tensor) -> None:
        """Copy rows into the host's memory. They may be freed at once, but not written over."""
        with self.current():
            room.copy_(rows, non_blocking=self.is_beside)
        if self._stream is not None:
            # Or what was their memory would be used again before they have been copied.
            rows.record_stream(self._stream)

    def to_device(self, pinned: Tensor) -> tuple[Tensor, Mark]:
        """A copy, and the moment from which on it is there: see `Mark.hand_over`."""
        assert self._stream is not None
        with self.current():
            copied = pinned.to(self._stream.device, non_blocking=True)
        return copied, self.mark()

    def mark(self) -> Mark:
        """The moment at which all has been done that was asked for so far."""
        if self._stream is None:
            return Mark()
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return Mark(event)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """On the device. From memory that is not pinned, a copy waits for a GPU's work."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    with contextlib.suppress(RuntimeError):  # there is no more of it to be had
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
