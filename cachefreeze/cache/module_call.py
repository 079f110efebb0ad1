"""A call of a module, and the ways to run it."""

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
    """A call of a module.

    Attributes:
        module: Module that is called.
        args: Positional arguments.
        kwargs: Keyword arguments.
        began: Time at which the call began, in seconds. Work that is none of the call's is left out
            by a later beginning.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    began: float = field(default_factory=perf_counter)

    @property
    def given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of both kinds."""
        return self.args, self.kwargs

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Tensors among the arguments."""
        return list(tensors(self.given))

    def inputs(self, numbers: Sequence[int]) -> dict[int, Tensor]:
        """Returns the tensors among the arguments, by the numbers of their values in a trace.

        Args:
            numbers: Those numbers, in order.
        """
        return dict(zip(numbers, self.tensors, strict=True))

    @property
    def seconds(self) -> float:
        """Seconds since the call began."""
        return perf_counter() - self.began

    def leave_out(self, since: float) -> None:
        """Does not count the time from some moment until now.

        Args:
            since: Time, in seconds.
        """
        self.began += perf_counter() - since

    def load(self, given: Any = None) -> None:
        """Loads what is not loaded yet. It takes the loader's time, and not that of the call.

        Args:
            given: What is loaded. If None, all arguments.
        """
        began = perf_counter()
        unloaded.load_in(self.given if given is None else given)
        self.leave_out(began)

    def run(self) -> Any:
        """Runs the call as if there were no cache."""
        self.load()
        return self.module(*self.args, **self.kwargs)

    def capture(self, plan: Plan) -> tuple[Any, dict[int, Tensor] | None, Report]:
        """Runs the call, and takes kept values from it."""
        return lineage.capture(plan, self.module, *self.args, known_to_fit=True, **self.kwargs)

    def replay(self, plan: Plan, kept: Mapping[int, Tensor]) -> tuple[Any, Report]:
        """Runs the call with kept values in the place of frozen work."""
        return lineage.replay(plan, kept, self.module, *self.args, known_to_fit=True, **self.kwargs)
