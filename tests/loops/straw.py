"""Caches of straw: each has one fault that caches in the field have. The harness must find them.

A straw cache keeps the outputs of calls of wholly frozen modules, and serves a call when it knows
all of its rows. `Careful` has no fault that the loops show: it hashes all that an output can depend
on, at each call. It is slow, and shows that a loop can be served at all.
"""

from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data.dataloader import DataLoader

from .harness import digest


@dataclass
class Counts:
    rows_served: int = 0


class Straw:
    """Catches calls of wholly frozen modules while it is open."""

    def __init__(self, *modules: nn.Module) -> None:
        self.stats, self.messages = Counts(), ["this cache is made of straw"]
        self.kept: dict[Hashable, list[Tensor]] = {}
        self.layouts: dict[Hashable, tuple[Any, list[tuple[int, ...]]]] = {}
        self.inside, self.plain_call = False, nn.Module.__call__
        straw = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            parameters = list(module.parameters())
            trained = any(parameter.requires_grad for parameter in parameters)
            if straw.inside or not parameters or trained:
                return straw.plain_call(module, *args, **kwargs)
            straw.inside = True
            try:
                return straw.serve(module, args, kwargs)
            finally:
                straw.inside = False

        nn.Module.__call__ = call  # type: ignore[method-assign]

    def close(self) -> None:
        nn.Module.__call__ = self.plain_call  # type: ignore[method-assign]

    def keys(self, module: nn.Module, args: Any, kwargs: Any) -> list[Hashable] | None:
        """A key for each row of the call. None: the call is left alone."""
        raise NotImplementedError

    def serve(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        keys = self.keys(module, args, kwargs)
        if not keys:
            return self.plain_call(module, *args, **kwargs)
        shape = (id(module), len(keys), self._shapes(args, kwargs))
        if shape in self.layouts and all(key in self.kept for key in keys):
            self.stats.rows_served += len(keys)
            form, all_strides = self.layouts[shape]
            rows = zip(*(self.kept[key] for key in keys), strict=True)
            parts = [
                self._joined(part, strides, len(keys))
                for part, strides in zip(rows, all_strides, strict=True)
            ]
            return tree_unflatten(parts, form)
        out = self.plain_call(module, *args, **kwargs)
        leaves, form = tree_flatten(out)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if len(tensors) == len(leaves) and all(_axis(t, len(keys)) is not None for t in tensors):
            self.layouts[shape] = form, [tensor.stride() for tensor in tensors]
            for at, key in enumerate(keys):
                self.kept[key] = [
                    tensor.detach().select(cast(int, _axis(tensor, len(keys))), at).clone()
                    for tensor in tensors
                ]
        return out

    @staticmethod
    def _shapes(args: Any, kwargs: Any) -> Hashable:
        return tuple(tuple(t.shape) for t in _tensors(args, kwargs))

    @staticmethod
    def _joined(rows: tuple[Tensor, ...], strides: tuple[int, ...], count: int) -> Tensor:
        # The axis of the rows is the one that the layout has and a row has not.
        for axis in range(2):
            joined = torch.stack(rows, axis)
            if joined.shape[axis] == count and joined.dim() == len(strides):
                if axis == 0 and strides[0] < max(strides[1:], default=0):
                    continue
                return torch.empty_strided(joined.shape, strides, dtype=joined.dtype).copy_(joined)
        raise AssertionError("no axis counts the rows")


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]


def _axis(tensor: Tensor, rows: int) -> int | None:
    """The axis that counts rows: the first, or the second as in an LSTM's states."""
    return next((axis for axis in range(min(2, tensor.dim())) if tensor.shape[axis] == rows), None)


class ByRowNumber(Straw):
    """Believes that a row's output depends on its number, and on nothing else.

    The numbers come from the loader's sampler, as a wrapped data set would give them.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.rows: list[int] = []
        self.source: int = 0
        self.calls: Counter[int] = Counter()
        self.plain_iter = DataLoader.__iter__
        straw = self

        def watched(loader: DataLoader[Any]) -> Iterator[Any]:
            iterator: Any = straw.plain_iter(loader)
            plain_next = iterator._next_index

            def next_index() -> Any:
                straw.rows, straw.source = plain_next(), id(loader.dataset)
                straw.calls.clear()
                return straw.rows

            iterator._next_index = next_index
            return cast(Iterator[Any], iterator)

        DataLoader.__iter__ = watched  # type: ignore[method-assign, assignment]

    def close(self) -> None:
        super().close()
        DataLoader.__iter__ = self.plain_iter  # type: ignore[method-assign]

    def keys(self, module: nn.Module, args: Any, kwargs: Any) -> list[Hashable] | None:
        tensors = _tensors(args, kwargs)
        if not tensors or not tensors[0].dim() or len(tensors[0]) != len(self.rows):
            return None
        self.calls[id(module)] += 1
        return [(id(module), self.calls[id(module)], self.source, row) for row in self.rows]


class Careful(Straw):
    """Hashes weights, buffers, modes, precision and the inputs of a row, at each call."""

    def keys(self, module: nn.Module, args: Any, kwargs: Any) -> list[Hashable] | None:
        tensors = _tensors(args, kwargs)
        hooked = any(part._forward_hooks for part in module.modules())
        if hooked or any(tensor.requires_grad for tensor in tensors) or self.draws(module):
            return None
        rows = len(tensors[0]) if tensors and tensors[0].dim() else 0
        common = (
            type(module).__name__,
            rows,
            self.state(module),
            [part.training for part in module.modules()],
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            [tensor.stride() for tensor in tensors],
            [leaf for leaf in tree_flatten((args, kwargs))[0] if not isinstance(leaf, Tensor)],
            [tensor for tensor in tensors if not tensor.dim() or len(tensor) != rows],
        )
        of_rows = [tensor for tensor in tensors if tensor.dim() and len(tensor) == rows]
        shared = digest(common)
        return [(shared, digest([tensor[row] for tensor in of_rows])) for row in range(rows)]

    def state(self, module: nn.Module) -> str:
        return digest([*module.parameters(), *module.buffers()])

    @staticmethod
    def draws(module: nn.Module) -> bool:
        kinds = (nn.Dropout, nn.modules.batchnorm._BatchNorm)
        return any(part.training and isinstance(part, kinds) for part in module.modules())


class HashesWeightsOnce(Careful):
    """Hashes the weights of a module when it first meets it, as if frozen meant unchanged."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.first: dict[int, str] = {}

    def state(self, module: nn.Module) -> str:
        return self.first.setdefault(id(module), super().state(module))


class TrustsModes(Careful):
    """Does not look at dropout and batch norms in training mode: no gradient means frozen."""

    @staticmethod
    def draws(module: nn.Module) -> bool:
        return False


class ForgetsStrides(Careful):
    """Gives back rows one after another in memory, whatever the strides were."""

    @staticmethod
    def _joined(rows: tuple[Tensor, ...], strides: tuple[int, ...], count: int) -> Tensor:
        return Careful._joined(rows, strides, count).contiguous()


class DrawsNumbers(Careful):
    """Takes a number from torch's random state at each call, to choose what it checks."""

    def serve(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        torch.rand(())
        return super().serve(module, args, kwargs)


class LeavesItself(Careful):
    """Leaves an attribute on each model."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        for module in modules:
            module.__dict__["cached"] = True


class Nothing:
    """Neither serves a row nor says why."""

    def __init__(self, *modules: nn.Module) -> None:
        self.stats, self.messages = Counts(), list[str]()

    def close(self) -> None:
        pass
