"""Checks of the arguments of `ActivationCache`."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cachefreeze.cache.codec import CODECS
from cachefreeze.cache.statistics import VERIFY
from cachefreeze.errors import UserError
from cachefreeze.lineage import calls


def check_models(models: Sequence[Any]) -> tuple[nn.Module, ...]:
    """Checks that models can have a cache. Returns them, without DistributedDataParallel.

    What the wrapper itself does differs from call to call, and it calls the model as others do.

    Args:
        models: Arguments that should be modules with parameters and without a cache.

    Raises:
        UserError: A model cannot have a cache. The message says why.
    """
    if not models:
        raise UserError("ActivationCache needs a model: ActivationCache(model).")
    for model in models:
        if isinstance(model, type) and issubclass(model, nn.Module):
            raise UserError(
                f"ActivationCache needs a model and was given its class: give an instance of "
                f"{model.__name__}."
            )
        if not isinstance(model, nn.Module):
            raise UserError(
                f"ActivationCache needs a torch.nn.Module and was given {type(model).__name__!r}."
            )
        name = type(model).__name__
        if not any(True for _ in model.parameters()):
            raise UserError(f"{name} has no parameters, so it has no frozen work to cache.")
        for part in model.modules():
            other = getattr(calls.watcher_of(part), "cache", lambda: None)()
            if other is not None and other._parts.get(id(part)) is part:
                raise UserError(
                    f"{name} has a cache already: close that cache first, or give both models to "
                    "one cache."
                )
    return tuple(
        model.module if isinstance(model, DistributedDataParallel) else model for model in models
    )


def check_options(
    max_bytes: int | None,
    probation: int | None,
    verify: str,
    codec: str,
    on_disk: bool,
    exact: bool,
) -> None:
    """Checks the other arguments, which the docstring of `ActivationCache` explains.

    Raises:
        UserError: An argument is wrong. The message says which values are allowed.
    """
    if max_bytes is not None and max_bytes <= 0:
        raise UserError("max_bytes must be a positive number of bytes.")
    if probation is not None and probation < 1:
        raise UserError(
            "probation must be at least 1: nothing is served before a batch was compared."
        )
    if verify not in VERIFY:
        raise UserError(f"verify must be one of {', '.join(VERIFY)}, and was {verify!r}.")
    if codec not in CODECS:
        raise UserError(f"codec must be one of {', '.join(CODECS)}, and was {codec!r}.")
    if codec == "zstd" and not on_disk:
        raise UserError(
            "codec='zstd' compresses rows in a directory: give a directory too, or use codec='raw'."
        )
    if codec == "int8" and exact:
        raise UserError(
            "codec='int8' rounds the kept values, so results differ from those without a cache: "
            "give exact=False to allow that."
        )
