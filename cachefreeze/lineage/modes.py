"""Reads and sets torch's switches: gradients, inference mode and autocast."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from cachefreeze.lineage.operations import Modes

_AUTOCAST = ("cpu", "cuda")


def modes_now() -> Modes:
    """Returns the switches that are on in this thread."""
    autocast = tuple(
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
        for kind in _AUTOCAST
        if torch.is_autocast_enabled(kind)
    )
    return Modes(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)


@contextmanager
def under(modes: Modes) -> Iterator[None]:
    """Sets torch's switches as they were when an operation ran."""
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
