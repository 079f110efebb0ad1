"""A network as an ordered list of units: the smallest things that freeze."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, overload

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from cachefreeze.errors import UserError
from cachefreeze.freezeout.freezing import freeze


def is_channels_last(x: Tensor) -> bool:
    """Whether `x`, (N, C, H, W), lies in memory as (N, H, W, C)."""
    if x.dim() != 4:
        return False
    _, c, h, w = x.shape
    if x.is_contiguous():
        # Where C is 1, or H and W are, both layouts are the same bytes: the strides tell them apart
        # (and kernels are chosen by the strides).
        return x.stride()[1:] == (1, w * c, c) != (h * w, w, 1)
    return x.is_contiguous(memory_format=torch.channels_last)


def canonical(x: Tensor) -> Tensor:
    """The same values in one of the two memory layouts that frozen activations have.

    What lies channels-last in memory, (N, C, H, W) as (N, H, W, C), stays so; all else is
    contiguous. The strides are spelled out, for where a dimension has size 1 several strides
    describe the same layout, and a kernel chosen by strides could differ between a computed tensor
    and one read back from a store.
    """
    if is_channels_last(x):
        _, c, h, w = x.shape
        strides: tuple[int, ...] = (h * w * c, 1, w * c, c)
    else:
        x = x.contiguous()
        strides = torch.empty(x.shape, device="meta").stride()
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def is_plain_sequence(module: nn.Module) -> bool:
    """Whether its children run one after the other, and nothing else happens."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


class Units(Sequence[nn.Module]):
    """An ordered list of units; unit i takes only the output of unit i-1.

    A view: the parameters stay where they are in their model, and nothing is copied.
    `cachefreeze.partition` makes one of a model.

    Args:
        modules: the units by name, in the order of the forward pass.
        model: that they are the units of; None if they are a whole.

    Attributes:
        names: of the units, in order.
        model: see above; without one, a list of the units.

    Raises:
        ValueError: there are no units, or a module or parameter belongs to two of them (it
            cannot be frozen in one place and trained in another).

    Example:
        >>> units = Units({"stem": nn.Linear(4, 8), "head": nn.Linear(8, 2)})
        >>> units.run(torch.zeros(1, 4), 0, 1).shape  # the boundary between stem and head
        torch.Size([1, 8])
    """

    def __init__(self, modules: Mapping[str, nn.Module], model: nn.Module | None = None) -> None:
        if not modules:
            raise ValueError("a network needs at least one unit")
        self.names = tuple(modules)
        self._modules = tuple(modules.values())
        self.model = nn.ModuleList(self._modules) if model is None else model
        # What is called while a unit trains.
        self._trained: tuple[Any, ...] = self._modules
        self._frontier = 0
        # Parameters and buffers of the model itself that a unit reads.
        self._read = [
            (part, str(node.target))
            for module in self._modules
            for part in module.modules()
            if isinstance(part, fx.GraphModule)
            for node in part.graph.nodes
            if node.op == "get_attr"
        ]
        owner: dict[int, str] = {}
        for name, module in modules.items():
            for part in (*module.modules(), *module.parameters()):
                if owner.setdefault(id(part), name) != name:
                    kind = "module" if isinstance(part, nn.Module) else "parameter"
                    raise ValueError(
                        f"units {owner[id(part)]!r} and {name!r} share a {kind}: "
                        "give each its own, or put them into one unit"
                    )

    def __len__(self) -> int:
        return len(self._modules)

    def __repr__(self) -> str:
        return f"Units({', '.join(self.names)}; {self._frontier} frozen)"

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[nn.Module, ...]: ...
    def __getitem__(self, index: int | slice) -> nn.Module | tuple[nn.Module, ...]:
        return self._modules[index]

    @property
    def frontier(self) -> int:
        """How many units are frozen: units 0 .. frontier-1. It only grows."""
        return self._frontier

    def freeze(self, first: int | str) -> None:
        """Freeze the first units for good, see `count`; those frozen already stay so.

        Raises:
            UserError: there are no such units.
        """
        count = self.count(first)
        for module in self._modules[self._frontier : count]:
            freeze(module)
        self._frontier = max(self._frontier, count)

    def count(self, first: int | str) -> int:
        """How many units `first` means: so many; all but so many, if negative; or all up to and
        with the unit of that name, or the last one of the module of that name.

        Raises:
            UserError: there are no such units.
        """
        if isinstance(first, str):
            within = (f"{first}.", f"{first}_")
            found = [i for i, n in enumerate(self.names) if n == first or n.startswith(within)]
            if not found:
                raise UserError(
                    f"the network has no unit {first!r}: it has {', '.join(self.names)}"
                )
            return found[-1] + 1
        if not -len(self) <= first <= len(self):
            raise UserError(f"cannot freeze {first} units of a network that has {len(self)}")
        return first + len(self) if first < 0 else first

    def compile(self, **options: Any) -> "Units":
        """Compile every unit by itself, see `torch.compile`, for as long as it trains; returns the
        units. A freeze compiles nothing anew but the unit that is the first to train then (whose
        input takes no gradient any more). Frozen units run as they are: their rows are the same,
        compiled or not, so that stores fit."""
        self._trained = tuple(
            torch.compile(_with_own_code(module), **options) for module in self._modules
        )
        return self

    @property
    def compiled(self) -> bool:
        """Whether `compile` was called."""
        return self._trained is not self._modules

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Any:
        """Units start .. stop-1 on a batch at boundary `start`; returns it at boundary `stop`: a
        tensor, or at the end whatever the model returns. Gradients are recorded as usual."""
        self._read_anew()
        stop = len(self) if stop is None else stop
        for number in range(start, stop):
            frozen = number < self._frontier
            x = (self._modules if frozen else self._trained)[number](x)
        return x

    def _read_anew(self) -> None:
        """`model.to(...)` replaces buffers, which units that are none of its modules do not see."""
        for part, path in self._read:
            owner, _, name = path.rpartition(".")
            value: Any = self.model
            for each in path.split("."):
                value = getattr(value, each)
            holder = part.get_submodule(owner)
            if getattr(holder, name) is not value:
                setattr(holder, name, value)

    def suffix(self, x: Tensor) -> Any:
        """What still trains, on a batch at the frontier, (n, ...), as `PrefixCache` gives it;
        returns what the model returns."""
        return self.run(x, self._frontier)

    def run_frozen(self, x: Tensor, start: int, stop: int, batch_size: int) -> Tensor:
        """Units start .. stop-1, all frozen, on at most `batch_size` rows at boundary `start`.

        A shorter batch is padded to `batch_size` on the way and cut again at the end: kernels are
        chosen by the shape, and only at one batch size does a row's result not depend on its
        company to the last bit. No gradient is recorded; the result is `canonical`.
        """
        assert stop <= self._frontier, "a unit that still trains was run as a frozen one"
        x = canonical(x)
        if start == stop:
            return x
        rows = len(x)
        assert rows <= batch_size
        self._read_anew()
        with torch.no_grad():
            if rows < batch_size:
                last = torch.channels_last if is_channels_last(x) else torch.contiguous_format
                padded = torch.empty(
                    (batch_size, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=last
                )
                padded[:rows] = x
                # Repeats of a real row: zeros could be slow (denormals) or out of range.
                padded[rows:] = x[-1:]
                x = padded
            for module in self._modules[start:stop]:
                x = canonical(module(x))
        return x[:rows]

    def named(self, stop: int) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules of units 0 .. stop-1."""
        return zip(self.names[:stop], self._modules[:stop], strict=True)

    @property
    def are_whole(self) -> bool:
        """Whether the model does nothing but to run them one after the other, to be seen without
        running it."""
        plain = is_plain_sequence(self.model) or isinstance(self.model, nn.ModuleList)
        return plain and tuple(self.model.children()) == self._modules

    @property
    def channels_last(self) -> bool:
        """Whether weights of convolutions lie channels-last in memory, as inputs should then."""
        return any(
            is_channels_last(parameter) and not parameter.is_contiguous()
            for module in self._modules
            for parameter in module.parameters()
        )

    def check(self, x: Tensor, tolerance: float = 0.0) -> None:
        """See that cutting changes nothing: suffix(prefix(x)) is model(x), to the last bit, in eval
        mode, at every boundary. The model is left as it was.

        Args:
            x: network input of a row or more, on the model's device. Costs as much as half as many
                forward passes of it as there are units.
            tolerance: for devices whose kernels do not sum in the same order each time: what may
                differ, of the largest value.

        Raises:
            UserError: it is not; names the first boundary.
        """
        if self.are_whole:
            return
        self._read_anew()
        parts = {each: each.training for whole in (self.model, *self) for each in whole.modules()}
        devices = [x.device] if x.device.type == "cuda" else []
        try:
            for part in parts:
                part.training = False
            with torch.no_grad(), torch.random.fork_rng(devices):
                x = canonical(x)
                whole = self.model(x.clone())  # what it writes into its input is not seen again
                for boundary, name in enumerate(self.names):
                    found: Any = x.clone()
                    try:
                        for module in self._modules[boundary:]:
                            found = module(found)
                    except Exception as error:  # whatever a unit does with what it does not take
                        found = error
                    if not agree(found, whole, tolerance):
                        where = f"before {name}" if boundary else "anywhere"
                        raise UserError(
                            f"{type(self.model).__name__} cannot be cut {where}: its units, run "
                            "one after the other, do not give what the model gives (in eval mode; "
                            "is anything done between them, such as F.relu or flatten?)"
                        )
                    if boundary + 1 < len(self):
                        x = canonical(self._modules[boundary](x))
        finally:
            for part, training in parts.items():
                part.training = training


def _with_own_code(module: nn.Module) -> nn.Module:
    """A module that calls `module` in a function of its own. Compiled variants are counted by
    function, and after eight none is made: blocks of one class would share those."""
    graph = fx.Graph()
    graph.output(graph.call_module("unit", (graph.placeholder("x"),)))
    return fx.GraphModule({"unit": module}, graph)


def agree(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    """Whether two tensors, or tuples, lists and dicts of them, are equal (or not a number at the
    same places); or differ by no more than `tolerance` of the largest value."""
    (ones, form), (others, other_form) = tree_flatten(one), tree_flatten(other)
    return form == other_form and all(
        _tensors_agree(a, b, tolerance) if isinstance(a, Tensor) else _same(a, b, tolerance)
        for a, b in zip(ones, others, strict=True)
    )


def _same(one: Any, other: Any, tolerance: float) -> bool:
    if is_dataclass(one) and type(one) is type(other):
        return agree(vars(one), vars(other), tolerance)
    return bool(one == other)


def _tensors_agree(one: Tensor, other: Any, tolerance: float) -> bool:
    if not isinstance(other, Tensor) or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    allowed = tolerance * float(other.abs().max()) if tolerance and other.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=allowed, equal_nan=True)
