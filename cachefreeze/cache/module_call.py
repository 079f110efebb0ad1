"""Call of a module, and the three ways to run it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import Any

from torch import Tensor, nn

from cachefreeze import lineage
from cachefreeze.lineage import Plan, Report, unloaded
from cachefreeze.lineage.structure import tensors


@dataclass
class ModuleCall:
    """Call of a module.

    Attributes:
        module: Module that is called.
        args: Positional arguments.
        kwargs: Keyword arguments.
        began: Time at which the call began, in seconds. It is moved forward by work that is not
            part of the call.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    began: float = field(default_factory=perf_counter)

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
        return dict(zip(numbers, self.tensors, strict=True))

    @property
    def seconds(self) -> float:
        """Seconds since the call began."""
        return perf_counter() - self.began

    def leave_out(self, since: float) -> None:
        """Leaves the time since some moment out of the call's time."""
        self.began += perf_counter() - since

    def load(self, given: Any = None) -> None:
        """Loads tensors that are not loaded yet. This is not part of the call's time.

        Args:
            given: Arguments to load. If None, all of them.
        """
        began = perf_counter()
        unloaded.load_in(self.given if given is None else given)
        self.leave_out(began)

    def run(self) -> Any:
        """Runs the call without the cache."""
        self.load()
        return self.module(*self.args, **self.kwargs)

    def capture(self, plan: Plan) -> tuple[Any, dict[int, Tensor] | None, Report]:
        """Runs the call, and takes the kept values from it, as `lineage.capture` does."""
        return lineage.capture(plan, self.module, *self.args, known_to_fit=True, **self.kwargs)

    def replay(self, plan: Plan, kept: Mapping[int, Tensor]) -> tuple[Any, Report]:
        """Runs the call with kept values in place of frozen work, as `lineage.replay` does."""
        return lineage.replay(plan, kept, self.module, *self.args, known_to_fit=True, **self.kwargs)
