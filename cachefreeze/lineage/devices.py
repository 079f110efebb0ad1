"""Work and copies on a device that runs behind the host, such as a GPU.

A call that starts work on such a device returns before the work is done. To ask for a result makes
the host wait until the device has done everything before it, and the device then idles until the
host has started more. So results are copied back without waiting, and are read when they are there.
"""

from collections.abc import Callable, Iterable
from time import perf_counter, thread_time
from typing import Any, Protocol

import numpy as np
import torch

Tensor = torch.Tensor


class Mark(Protocol):
    """Moment in the work of a device."""

    def is_past(self) -> bool:
        """Returns whether the device has reached the moment."""
        ...

    def wait(self) -> None:
        """Waits until the device has reached the moment."""
        ...

    def seconds_since(self, earlier: "Mark") -> float:
        """Returns the seconds between an earlier moment and this one. Both must be past."""
        ...


class Queue(Protocol):
    """Work of one kind of device, done in the order in which it was started."""

    def mark(self, device: torch.device) -> Mark:
        """Returns the moment at which the device has done all that was started so far."""
        ...

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns uninitialised CPU memory that the device can copy from and to by itself."""
        ...

    def start_copy(self, target: Tensor, source: Tensor) -> None:
        """Starts a copy between the device and memory that `host_memory` has returned."""
        ...

    def send_beside(self, memory: Tensor, device: torch.device) -> Callable[[], Tensor]:
        """Starts a copy of such memory to the device, beside other work of the device.

        Returns:
            Function that makes later work of the device wait for the copy, and returns it.
        """
        ...


class HostMark:
    """Moment in the work of the host, which is past as soon as it is there.

    Args:
        at: Time of the moment in seconds, as `perf_counter` returns it. If None, the present.
    """

    def __init__(self, at: float | None = None) -> None:
        self.at = perf_counter() if at is None else at

    def is_past(self) -> bool:
        """Returns True."""
        return True

    def wait(self) -> None:
        """Returns at once."""

    def seconds_since(self, earlier: "Mark") -> float:
        """Returns the seconds between an earlier moment of the host and this one."""
        assert isinstance(earlier, HostMark)
        return self.at - earlier.at


class CudaMark:
    """Moment in the present stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(torch.cuda.current_stream(device))

    def is_past(self) -> bool:
        """Returns whether the device has reached the moment."""
        return bool(self._event.query())

    def wait(self) -> None:
        """Waits until the device has reached the moment."""
        self._event.synchronize()

    def seconds_since(self, earlier: "Mark") -> float:
        """Returns the seconds between an earlier moment and this one. Both must be past."""
        assert isinstance(earlier, CudaMark)
        return float(earlier._event.elapsed_time(self._event)) / 1000


class CudaQueue:
    """Work of CUDA devices."""

    def __init__(self) -> None:
        self._beside: dict[torch.device, torch.cuda.Stream] = {}

    def mark(self, device: torch.device) -> Mark:
        """Returns the moment at which the device has done all that was started so far."""
        return CudaMark(device)

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns pinned memory. torch uses it again once no copy needs it any more."""
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)

    def start_copy(self, target: Tensor, source: Tensor) -> None:
        """Starts a copy between the device and pinned memory."""
        target.copy_(source, non_blocking=True)

    def send_beside(self, memory: Tensor, device: torch.device) -> Callable[[], Tensor]:
        """Starts a copy of pinned memory in a stream of its own.

        Returns:
            Function that makes the present stream wait for the copy, and returns it.
        """
        if device not in self._beside:
            self._beside[device] = torch.cuda.Stream(device)
        stream = self._beside[device]
        with torch.cuda.stream(stream):
            found = torch.empty(memory.shape, dtype=memory.dtype, device=device)
            found.copy_(memory, non_blocking=True)
            copied = stream.record_event()

        def take() -> Tensor:
            present = torch.cuda.current_stream(device)
            present.wait_event(copied)
            # Its memory belongs to the other stream, which must not use it again before this one.
            found.record_stream(present)
            return found

        return take


# Kinds of devices that run behind the host.
QUEUES: dict[str, Queue] = {"cuda": CudaQueue()}


def queue_of(device: torch.device) -> Queue | None:
    """Returns the work of a device that runs behind the host, or None for any other device."""
    return QUEUES.get(device.type)


def some_run_behind() -> bool:
    """Returns whether this machine has a device that runs behind the host."""
    return any(kind != "cuda" for kind in QUEUES) or torch.cuda.is_available()


def now(device: torch.device) -> Mark:
    """Returns the present moment in the work of a device, or of the host if they do not differ."""
    queue = queue_of(device)
    return HostMark() if queue is None else queue.mark(device)


def runs_behind(tensor: Tensor) -> bool:
    """Returns whether a tensor is on a device that runs behind the host."""
    return tensor.device.type in QUEUES


class HostCopy:
    """Copy of a tensor on its way to the host.

    Args:
        tensor: Tensor on any device.

    Attributes:
        from_device: Whether the tensor was on a device that runs behind the host.
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        queue = queue_of(tensor.device)
        self.from_device = queue is not None
        self._mark: Mark | None = None
        if queue is None:
            self._memory = tensor.cpu()
            return
        self._memory = queue.host_memory(tuple(tensor.shape), tensor.dtype)
        queue.start_copy(self._memory, tensor)
        self._mark = queue.mark(tensor.device)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the copy."""
        return self._memory.nbytes

    @property
    def is_there(self) -> bool:
        """Whether the copy is complete."""
        if self._mark is not None and self._mark.is_past():
            self._mark = None
        return self._mark is None

    def get(self) -> Tensor:
        """Returns the copy. Waits until it is complete."""
        if self._mark is not None and not self.is_there:
            self._mark.wait()
            self._mark = None
        return self._memory


def sending_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns uninitialised CPU memory for values that `send` copies to a device."""
    queue = queue_of(device)
    if queue is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return queue.host_memory(shape, dtype)


def send(memory: Tensor, device: torch.device) -> Tensor:
    """Copies memory that `sending_memory` has returned to a device, without waiting for it.

    Nobody may write to the memory any more.
    """
    queue = queue_of(device)
    if queue is None:
        return memory.to(device)
    found = torch.empty(memory.shape, dtype=memory.dtype, device=device)
    queue.start_copy(found, memory)
    return found


def send_beside(memory: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """Copies memory that `sending_memory` has returned to a device, beside its other work.

    Nobody may write to the memory any more.

    Returns:
        Function that returns the copy, for work that is started after it is called.
    """
    queue = queue_of(device)
    return (lambda: memory.to(device)) if queue is None else queue.send_beside(memory, device)


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Copies values from the CPU to a device, without waiting for it.

    Args:
        values: Array, or tensor on the CPU.
        device: Device of the result. On the CPU, the result may share memory with the values.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if queue_of(device) is None:
        return tensor.to(device)
    memory = sending_memory(tuple(tensor.shape), tensor.dtype, device)
    memory.copy_(tensor)
    return send(memory, device)


class WorkTimer:
    """Measures the seconds of work in the body of a `with` statement.

    This is the time of the device that the arguments are on, if it runs behind the host: then the
    host waits for the work. Else it is the time of this thread, because other processes may delay
    any work.

    Args:
        args: Arguments of the work.

    Attributes:
        seconds: Seconds of the work, after it has ended.
    """

    def __init__(self, args: Iterable[Any]) -> None:
        self.seconds = 0.0
        self._device = None
        for one in args:
            first = one[0] if isinstance(one, (list, tuple)) and one else one
            if isinstance(first, Tensor):
                self._device = first.device if queue_of(first.device) is not None else None
                break
        self._began: Mark | None = None
        self._thread_began = 0.0

    def __enter__(self) -> "WorkTimer":
        """Begins to measure."""
        if self._device is not None:
            self._began = now(self._device)
        self._thread_began = thread_time()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends measuring."""
        self.seconds = thread_time() - self._thread_began
        if self._device is not None and self._began is not None:
            ended = now(self._device)
            ended.wait()
            self.seconds = ended.seconds_since(self._began)
