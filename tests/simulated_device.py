"""A CUDA device of a worst kind, on a CPU: it does what it was asked for as late as it may, or as
early, or in turns that are drawn; and what is freed is written over at once.

It keeps to what CUDA and PyTorch promise, and to no more: a stream's work is done in its order, and
streams wait for one another where they are told to (`wait_event`); a copy from or to pinned memory
returns at once; memory that is freed belongs to the stream that it was taken in, once what the
streams that it was recorded with had been asked for is done.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

CUDA = torch.device("cuda:0")
# What is in memory that nobody has written to, and in memory that was freed.
POISON = 77
SCHEDULES = ("late", "work first", "copies first", *range(5))


class Task:
    """One thing that a stream was asked for."""

    def __init__(
        self, stream: "Stream", do: Callable[[], object], after: "Task | None", seconds: float
    ) -> None:
        self.stream, self.do, self.after, self.seconds = stream, do, after, seconds
        self.done = False
        self.end = 0.0


class Stream:
    def __init__(self, device: object = CUDA) -> None:
        self.device = CUDA
        self.tasks: deque[Task] = deque()
        self.time = 0.0
        Device.present.streams.append(self)

    def ask(
        self,
        do: Callable[[], object] = lambda: None,
        after: Task | None = None,
        seconds: float = 0.0,
    ) -> Task:
        with Device.present.lock:
            task = Task(self, do, after, seconds)
            self.tasks.append(task)
        Device.present.go_on()
        return task

    def wait_event(self, event: "Event") -> None:
        if event.task is not None:  # of one that was not recorded, CUDA waits for nothing
            self.ask(after=event.task)

    def wait_stream(self, other: "Stream") -> None:
        self.ask(after=other.ask())

    @property
    def is_ready(self) -> bool:
        """Whether its next task waits for no other stream."""
        return bool(self.tasks) and (self.tasks[0].after is None or self.tasks[0].after.done)

    def do_next(self) -> None:
        task = self.tasks.popleft()
        task.do()
        self.time = task.end = (
            max(self.time, 0.0 if task.after is None else task.after.end) + task.seconds
        )
        task.done = True
        Device.present.done += 1
        Device.present.reuse()


class Event:
    def __init__(self, *, enable_timing: bool = False, blocking: bool = False) -> None:
        self.timed, self.blocking = enable_timing, blocking
        self.task: Task | None = None

    def record(self, stream: Stream) -> None:
        self.task = stream.ask()

    def query(self) -> bool:
        return self.task is None or self.task.done

    def synchronize(self) -> None:
        assert self.blocking or threading.current_thread() is threading.main_thread(), "it spins"
        if self.task is not None:
            Device.present.finish(self.task)

    def elapsed_time(self, end: "Event") -> float:
        assert self.task is not None
        assert end.task is not None
        assert self.timed, "made without enable_timing"
        assert end.timed, "made without enable_timing"
        assert self.query(), "not ready"
        assert end.query(), "not ready"
        return (end.task.end - self.task.end) * 1e3


class Block:
    """Memory of the device, for as long as a tensor lies in it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.users = {Device.present.stream()}

    def __del__(self) -> None:
        Device.present.free(self)


class OnDevice(Tensor):
    """A tensor in the memory of the device; `inner` is where its values are, once they are."""

    inner: Tensor
    block: Block
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(inner: Tensor, block: Block | None = None) -> "OnDevice":
        x = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            OnDevice, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype
        )
        x.inner, x.block = inner, block or Block(inner)
        return x

    @staticmethod
    def like(inner: Tensor) -> "OnDevice":
        return OnDevice.of(torch.full_like(inner, POISON, device="cpu"))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default:
            return copy(*args, **kwargs)
        inner = tree_map(inside, args)
        if func.is_view:
            block = next(each.block for each in args if isinstance(each, OnDevice))
            return tree_map(lambda x: OnDevice.of(x, block), func(*inner, **kwargs))
        stream = Device.present.stream()
        if func._schema.is_mutable:
            stream.ask(partial(func, *inner, **kwargs))
            return args[0]
        made = OnDevice.like(func(*tree_map(without_values, inner), **kwargs))
        target = made.inner
        stream.ask(lambda: target.copy_(func(*inner, **kwargs)))
        return made

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        self.block.users.add(stream)

    def cpu(self) -> Tensor:  # type: ignore[override]
        return torch.empty(self.shape, dtype=self.dtype).copy_(self)


def without_values(x: Any) -> Any:
    return x.to("meta") if isinstance(x, Tensor) else x


def inside(x: Any) -> Any:
    return x.inner if isinstance(x, OnDevice) else x


def copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    device = Device.present
    task = device.stream().ask(partial(inside(target).copy_, inside(source)))
    pinned = all(isinstance(x, OnDevice) or device.is_pinned(x) for x in (target, source))
    if isinstance(target, OnDevice) and isinstance(source, OnDevice):
        non_blocking = True
    if not (non_blocking and pinned):
        device.finish(task)
    return target


class Device:
    """One at a time; `present` is it.

    Args:
        schedule: one of `SCHEDULES`, or the seed of another.
        pins: whether memory of the host can be pinned.

    Attributes:
        done: tasks that it has carried out.
    """

    present: "Device"

    def __init__(self, schedule: str | int, *, pins: bool = True) -> None:
        Device.present = self
        self.schedule, self.pins = schedule, pins
        self.random = np.random.default_rng(schedule if isinstance(schedule, int) else 0)
        self.lock = threading.RLock()
        self.done = 0
        self.streams: list[Stream] = []
        self.work = Stream()  # the one that is current where nothing is said
        self.pinned: dict[int, Tensor] = {}  # never freed: PyTorch frees none that is in use
        self.freed: list[tuple[Tensor, list[Task]]] = []
        self.threads = threading.local()

    def stream(self, device: object = None) -> Stream:
        return getattr(self.threads, "stream", self.work)

    @contextmanager
    def within(self, stream: Stream) -> Iterator[None]:
        before, self.threads.stream = self.stream(), stream
        try:
            yield
        finally:
            self.threads.stream = before

    def go_on(self) -> None:
        """Do as much as the schedule says."""
        with self.lock:
            if isinstance(self.schedule, int):
                for _ in range(self.random.integers(0, 4)):
                    ready = [each for each in self.streams if each.is_ready]
                    if ready:
                        ready[self.random.integers(len(ready))].do_next()
                return
            first = {
                "late": [],
                "work first": [self.work],
                "copies first": [each for each in self.streams if each is not self.work],
            }[self.schedule]
            while ready := [each for each in first if each.is_ready]:
                ready[0].do_next()

    def finish(self, task: Task) -> None:
        """Do what has to be done for it, and nothing else."""
        with self.lock:
            while not task.done:
                after = task.stream.tasks[0].after
                if after is not None:
                    self.finish(after)
                task.stream.do_next()

    def synchronize(self, device: object = None) -> None:
        with self.lock:
            for each in list(self.streams):
                while each.tasks:
                    self.finish(each.tasks[0])

    def free(self, block: Block) -> None:
        """Write over it as soon as another tensor could lie there."""
        with self.lock:
            last = [stream.tasks[-1] for stream in block.users if stream.tasks]
            self.freed.append((block.memory, last))
            self.reuse()

    def reuse(self) -> None:
        waiting = []
        for memory, last in self.freed:
            if all(task.done for task in last):
                memory.fill_(POISON)
            else:
                waiting.append((memory, last))
        self.freed = waiting

    def is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self.pinned


# What PyTorch calls its own, before anything is replaced.
empty, move = torch.empty, Tensor.to


def empty_somewhere(*shape: Any, device: object = None, pin_memory: bool = False, **how: Any):
    here = Device.present
    if torch.device(device or "cpu").type == "cuda":
        return OnDevice.like(empty(*shape, **how))
    made = empty(*shape, **how)
    if pin_memory:
        if not here.pins:
            raise RuntimeError("CUDA error: out of memory")
        made.fill_(POISON)
        here.pinned[made.untyped_storage().data_ptr()] = made
    return made


def move_somewhere(
    x: Tensor, where: object = None, *rest: Any, non_blocking: bool = False, **how: Any
) -> Tensor:
    to_device = isinstance(where, torch.device | str) and torch.device(where).type == "cuda"
    if to_device and not isinstance(x, OnDevice):
        made = OnDevice.like(x)
        return made.copy_(x, non_blocking=non_blocking)
    if to_device:
        return x
    if isinstance(x, OnDevice) and isinstance(where, torch.device):
        return x.cpu()
    return move(x, *() if where is None else (where,), *rest, **how)


def made_somewhere(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, device: object = None, **how: Any) -> Tensor:
        return make(*args, **how) if device is None else make(*args, **how).to(device)

    return made


def pinned_copy(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)


def simulate(monkeypatch: pytest.MonkeyPatch, schedule: str | int, *, pins: bool = True) -> Device:
    """Until the test is over, `cuda` is such a device."""
    device = Device(schedule, pins=pins)
    for name, what in {
        "Stream": Stream,
        "Event": Event,
        "current_stream": device.stream,
        "stream": device.within,
        "synchronize": device.synchronize,
    }.items():
        monkeypatch.setattr(torch.cuda, name, what)
    monkeypatch.setattr(torch, "empty", empty_somewhere)
    for make in (torch.tensor, torch.arange):
        monkeypatch.setattr(torch, make.__name__, made_somewhere(make))
    monkeypatch.setattr(Tensor, "to", move_somewhere)
    monkeypatch.setattr(Tensor, "pin_memory", pinned_copy)
    return device
