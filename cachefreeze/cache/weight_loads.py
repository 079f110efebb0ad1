"""Calls of `load_state_dict`, which overwrite weights.

`nn.Module.load_state_dict` is replaced while a cache is open, and restored afterwards.
"""

import functools
from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import nn

from cachefreeze.cache.cache_state import CacheState

_watching: list[CacheState] = []
_real: Callable[..., Any] = nn.Module.load_state_dict


@functools.wraps(nn.Module.load_state_dict)
def _load_state_dict(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    for shared in _watching:
        if shared.report.verify != "off":
            shared.weights.hash_again(chain(module.parameters(), module.buffers()))
    return _real(module, *args, **kwargs)


def watch(shared: CacheState) -> Callable[[], None]:
    """Hashes frozen bits before `load_state_dict` overwrites them.

    After it, nobody can tell whether they had been changed unseen before.

    Args:
        shared: State that all parts of the cache share.

    Returns:
        Function that ends this.
    """
    global _real
    if not _watching and nn.Module.load_state_dict is not _load_state_dict:
        _real = nn.Module.load_state_dict
        nn.Module.load_state_dict = _load_state_dict  # type: ignore[method-assign, assignment]
    _watching.append(shared)

    def end() -> None:
        _watching[:] = [one for one in _watching if one is not shared]
        if not _watching and nn.Module.load_state_dict is _load_state_dict:
            nn.Module.load_state_dict = _real  # type: ignore[method-assign]

    return end
