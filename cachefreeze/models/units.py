"""A network as an ordered list of units: the smallest things that freeze."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import overload

import torch
from torch import Tensor, nn


def freeze(module: nn.Module) -> None:
    """Freeze `module` for good, in place.

    Its parameters take no gradient any more (and drop the one they have), it is in eval mode
    (running statistics, no dropout), and `train()` on it or on any module around it does not
    change that: the usual `model.train()` at the start of an epoch would thaw its batch norms.
    """
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    module.eval()
    for each in module.modules():
        # `nn.Module.train` walks the tree by calling `train` on the children, so an attribute of
        # the instance is asked first. A partial of a plain function survives deepcopy and pickle.
        object.__setattr__(each, "train", partial(_stay_in_eval_mode, each))


def _stay_in_eval_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def canonical(x: Tensor) -> Tensor:
    """The same values in the one memory layout that frozen activations have.

    4-d tensors (N, C, H, W) are channels-last, all others contiguous. The strides are spelled out,
    for where a dimension has size 1 several strides describe the same layout, and a kernel chosen
    by strides could differ between a computed tensor and one read back from a store.
    """
    if x.dim() != 4:
        return x.contiguous()
    n, c, h, w = x.shape
    strides = (h * w * c, 1, w * c, c)
    if x.stride() == strides:
        return x
    return x.permute(0, 2, 3, 1).contiguous().as_strided((n, c, h, w), strides)


class Units(Sequence[nn.Module]):
    """An ordered list of units; unit i takes only the output of unit i-1.

    A view: the modules stay where they are in their model, and nothing is copied.

    Args:
        modules: the units by name, in the order of the forward pass.

    Raises:
        ValueError: there are no units, or a module or parameter belongs to two of them (it
            cannot be frozen in one place and trained in another).

    Example:
        >>> units = Units({"stem": nn.Linear(4, 8), "head": nn.Linear(8, 2)})
        >>> units.run(torch.zeros(1, 4), 0, 1).shape  # the boundary between stem and head
        torch.Size([1, 8])
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        if not modules:
            raise ValueError("a network needs at least one unit")
        self.names = tuple(modules)
        self._modules = tuple(modules.values())
        self._frontier = 0
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

    def freeze(self, count: int) -> None:
        """Freeze the first `count` units for good; those frozen already stay so.

        Raises:
            ValueError: there are fewer than `count` units.
        """
        if count > len(self):
            raise ValueError(f"cannot freeze {count} units of a network that has {len(self)}")
        for module in self._modules[self._frontier : count]:
            freeze(module)
        self._frontier = max(self._frontier, count)

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Units start .. stop-1 on a batch at boundary `start`; returns it at boundary `stop`."""
        for module in self._modules[start:stop]:
            x = module(x)
        return x

    def run_frozen(self, x: Tensor, start: int, stop: int, batch_size: int) -> Tensor:
        """Units start .. stop-1, all frozen, on at most `batch_size` rows at boundary `start`.

        A shorter batch is padded to `batch_size` on the way and cut again at the end: kernels are
        chosen by the shape, and only at one batch size does a row's result not depend on its
        company to the last bit. No gradient is recorded; the result is in `canonical` layout.
        """
        assert stop <= self._frontier, "a unit that still trains was run as a frozen one"
        x = canonical(x)
        if start == stop:
            return x
        rows = len(x)
        assert rows <= batch_size
        with torch.no_grad():
            if rows < batch_size:
                # Repeats of a real row: zeros could be slow (denormals) or out of range.
                x = canonical(torch.cat([x, x[-1:].expand(batch_size - rows, *x.shape[1:])]))
            for module in self._modules[start:stop]:
                x = canonical(module(x))
        return x[:rows]

    def named(self, stop: int) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules of units 0 .. stop-1."""
        return zip(self.names[:stop], self._modules[:stop], strict=True)


def partition(model: nn.Module) -> Units:
    """The units of `model`, which is a plain `nn.Sequential`: one a child, in order.

    Raises:
        ValueError: `model` is something else, has no children, or the same child twice.
    """
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        raise ValueError(
            "only an nn.Sequential with its own forward can be cut into units, "
            f"and this is a {type(model).__name__}"
        )
    # Not `named_children`, which leaves out a module that comes a second time.
    return Units({name: module for name, module in model._modules.items() if module is not None})
