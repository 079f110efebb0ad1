"""Reads and sets switches of torch: gradients, inference mode, autocast and Dynamo."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch._C._dynamo.eval_frame as _dynamo

from cachefreeze.lineage.operations import Modes

_AUTOCAST = ("cpu", "cuda")


def modes_now() -> Modes:
    """Returns the current switches of this thread."""
    autocast = tuple(
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
        for kind in _AUTOCAST
        if torch.is_autocast_enabled(kind)
    )
    return Modes(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)


@contextmanager
def under(modes: Modes) -> Iterator[None]:
    """Sets the switches of torch in the body to those under which an operation ran."""
    now = modes_now()
    if now == modes:
        yield
        return
    with ExitStack() as stack:
        if now.inference != modes.inference:
            stack.enter_context(torch.inference_mode(modes.inference))
        stack.enter_context(torch.set_grad_enabled(modes.grad))
        on = {kind for kind, _, _ in modes.autocast}
        for kind, dtype, cached in modes.autocast:
            stack.enter_context(torch.autocast(kind, dtype, cache_enabled=cached))
        for kind, _, _ in now.autocast:
            if kind not in on:
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes Dynamo end its graph at a function, and compile nothing that the function calls.

    `torch.compiler.disable` does the same, but it imports Dynamo, which takes seconds.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = _dynamo.set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            _dynamo.set_eval_frame(before)

    made: Any = run
    made._torchdynamo_disable = True
    _skip(made.__code__)
    return made  # type: ignore[no-any-return]


def _skip(code: Any) -> None:
    """Makes Dynamo run a code object without compiling it."""
    dynamo: Any = _dynamo
    if hasattr(dynamo, "skip_code"):  # older versions of torch, such as 2.6
        dynamo.skip_code(code)
    else:
        action = dynamo._FrameAction
        dynamo.set_code_exec_strategy(code, dynamo._FrameExecStrategy(action.SKIP, action.DEFAULT))
