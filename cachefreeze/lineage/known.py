"""Finds the values of tensors while a pass is traced."""

import weakref
from collections.abc import Iterable, Iterator

import torch

from cachefreeze.lineage.operations import Value

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def buffer_of(tensor: torch.Tensor) -> int:
    """Returns a number that tensors on one buffer share, or 0 for a tensor without a buffer."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return 0


def off_line(tensor: torch.Tensor) -> int:
    """Returns the offset of a CPU tensor from a multiple of 16 bytes, and 0 for other tensors."""
    if tensor.device.type != "cpu":
        return 0
    try:
        return tensor.data_ptr() % LINE
    except RuntimeError:  # tensors inside of `torch.func` have no memory
        return 0


# Some CPU kernels give other bits if the first element is not at a multiple of so many bytes.
LINE = 16


class Known:
    """The number of the value that each tensor has now. Keeps no tensor alive.

    Args:
        values: List that new values are appended to.
    """

    def __init__(self, values: list[Value]) -> None:
        self._values = values
        self._number: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        # Tensors by buffer. The address of a freed buffer is used again, so a buffer counts only
        # while one of its tensors exists.
        self._on: dict[int, dict[int, weakref.ref[torch.Tensor]]] = {}
        self._buffers: dict[int, int] = {}
        self._made: list[tuple[int, weakref.ref[torch.Tensor]]] = []
        self._things = 0
        self._storages = 0
        self.state_buffers: set[int] = set()
        self.input_buffers: set[int] = set()

    def number(self, tensor: torch.Tensor) -> int:
        """Returns the number of a tensor's value, or -1 for an unknown tensor."""
        found = self._number.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else -1

    def reference(self, tensor: torch.Tensor) -> "weakref.ref[torch.Tensor]":
        """Returns the weak reference to a known tensor."""
        return self._number[id(tensor)][0]

    def buffer(self, number: int) -> int:
        """Returns the buffer of a value."""
        return self._buffers.get(number, 0)

    def on(self, buffer: int) -> list[int]:
        """Returns the values of the existing tensors on a buffer."""
        return [self.number(tensor) for tensor in self.tensors_on((buffer,))]

    def tensors_on(self, buffers: Iterable[int]) -> list[torch.Tensor]:
        """Returns the existing tensors on some buffers."""
        found: list[torch.Tensor] = []
        for buffer in buffers:
            for reference in self._on.get(buffer, {}).values():
                tensor = reference()
                if tensor is not None:
                    found.append(tensor)
        return found

    def versions(self) -> list[tuple[torch.Tensor, int]]:
        """Returns the existing tensors, each with its version counter."""
        found = [reference() for reference, _ in self._number.values()]
        return [(one, one._version) for one in found if one is not None and not one.is_inference()]

    def alive_since(self, operation: int) -> Iterator[torch.Tensor]:
        """Yields the existing tensors that were made by an operation or later."""
        since = len(self._made)
        while since and self._made[since - 1][0] >= operation:
            since -= 1
        alive = []
        for one in self._made[since:]:
            tensor = one[1]()
            if tensor is not None:
                alive.append(one)
                yield tensor
        # Deleted tensors are removed, so that the calls around this one need not check them again.
        self._made[since:] = alive

    def add(self, tensor: torch.Tensor, operation: int) -> int:
        """Adds a new tensor, and returns the number of its value.

        Args:
            tensor: New tensor.
            operation: Number of the operation that made the tensor. -1 for an input, -2 for state.
        """
        buffer = buffer_of(tensor)
        alive = self.on(buffer) if buffer else []
        if alive:
            storage = self._values[alive[0]].storage
        else:
            storage = self._storages
            self._storages += 1
            self._on.pop(buffer, None)
        self._things += 1
        if operation == -1:
            self.input_buffers.add(storage)
        elif operation == -2:
            self.state_buffers.add(storage)
        reference = weakref.ref(tensor)
        number = self._append(tensor, operation, storage, self._things, buffer)
        self._number[id(tensor)] = reference, number
        if operation >= 0:
            self._made.append((operation, reference))
        if buffer:
            self._on.setdefault(buffer, {})[id(tensor)] = reference
        return number

    def renew(self, tensor: torch.Tensor, operation: int) -> int:
        """Gives a new value to a known tensor that was written to. Returns the number of the value.

        Args:
            tensor: Known tensor.
            operation: Number of the operation that wrote to it.
        """
        old = self._values[self.number(tensor)]
        reference = self._number[id(tensor)][0]
        number = self._append(tensor, operation, old.storage, old.thing, buffer_of(tensor))
        self._number[id(tensor)] = reference, number
        return number

    def _append(
        self, tensor: torch.Tensor, operation: int, storage: int, thing: int, buffer: int
    ) -> int:
        strided = tensor.layout is torch.strided and not tensor.is_nested
        number = len(self._values)
        plain = (
            strided
            and type(tensor) in _PLAIN
            and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        )
        self._buffers[number] = buffer
        self._values.append(
            Value(
                number=number,
                operation=operation,
                shape=tuple(tensor.shape) if strided else (),
                stride=tensor.stride() if strided else (),
                dtype=tensor.dtype,
                device=tensor.device,
                requires_grad=tensor.requires_grad,
                storage=storage,
                thing=thing,
                leaf=tensor.is_leaf,
                plain=plain,
                off_line=off_line(tensor) if plain else 0,
            )
        )
        return number
