"""Call of a module, and the three ways to run it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cachefreeze import lineage
from cachefreeze.lineage import Plan, Report, unloaded
from cachefreeze.lineage.devices import HostMark, Mark, now, queue_of
from cachefreeze.lineage.structure import tensors

_CPU = torch.device("cpu")


@dataclass
class ModuleCall:
    """Call of a module.

    Attributes:
        module: Module that is called.
        args: Positional arguments.
        kwargs: Keyword arguments.
        device: Device whose time the call takes: the CPU, until `time_on` was called.
        began: Moment at which the call began. It is moved forward by work that is not part of the
            call.
        before_run: Function that is called before the module runs without the cache.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device = _CPU
    began: Mark = field(default_factory=HostMark)
    before_run: Callable[[], None] = lambda: None
    _keys: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        return self.args, self.kwargs

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Tensors among the arguments."""
        return list(tensors(self.given))

    def inputs(self, numbers: Sequence[int]) -> dict[int, Tensor]:
        """Returns the tensors among the arguments, by number.

        Args:
            numbers: Numbers of the tensors in a trace, in order.
        """
        return dict(zip(numbers, self.with_keys(), strict=True))

    def loaded(self, numbers: Sequence[int]) -> dict[int, Tensor]:
        """Loads the tensors among the arguments, and returns what `inputs` does."""
        self.load()
        return self.inputs(numbers)

    def with_keys(self) -> list[Tensor]:
        """Returns the tensors among the arguments, each with the keys of its rows if known."""
        return [
            unloaded.with_keys(one.detach(), self._keys[place]) if place in self._keys else one
            for place, one in enumerate(self.tensors)
        ]

    def copies(self) -> list[Tensor]:
        """Returns copies of the tensors among the arguments, with the keys of their rows."""
        return [
            unloaded.with_keys(one.detach().clone(), self._keys.get(place))
            for place, one in enumerate(self.tensors)
        ]

    def time_on(self, device: torch.device) -> None:
        """Measures the call by the time of a device, from now on."""
        if queue_of(device) is not None:
            self.device, self.began = device, now(device)

    def now(self) -> Mark:
        """Returns the present moment, in the time of the call's device."""
        return now(self.device)

    def begin_again(self) -> None:
        """Lets the call begin now."""
        self.began = self.now()

    def leave_out(self, since: float) -> None:
        """Leaves the time since some moment of the host out of the call's time."""
        if isinstance(self.began, HostMark):
            self.began = HostMark(self.began.at + perf_counter() - since)
        else:
            self.begin_again()

    def load(self, given: Any = None) -> None:
        """Loads tensors that are not loaded yet. This is not part of the call's time.

        Args:
            given: Arguments to load. If None, all of them.
        """
        began = perf_counter()
        for place, tensor in enumerate(self.tensors):
            if unloaded.is_unloaded(tensor):
                # Known until the module runs: no other code can write to the tensor before.
                keys = unloaded.keys_of(tensor)
                assert keys is not None
                self._keys[place] = keys
        unloaded.load_in(self.given if given is None else given)
        self.leave_out(began)

    def run(self) -> Any:
        """Runs the call without the cache."""
        self.before_run()
        self.load()
        return self.module(*self.args, **self.kwargs)

    def capture(self, plan: Plan) -> tuple[Any, dict[int, Tensor] | None, Report]:
        """Runs the call, and takes the kept values from it, as `lineage.capture` does."""
        return lineage.capture(plan, self.module, *self.args, known_to_fit=True, **self.kwargs)

    def replay(self, plan: Plan, kept: Mapping[int, Tensor]) -> tuple[Any, Report]:
        """Runs the call with kept values in place of frozen work, as `lineage.replay` does."""
        return lineage.replay(plan, kept, self.module, *self.args, known_to_fit=True, **self.kwargs)
