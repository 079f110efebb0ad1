"""Steps of optimizers: which frozen bits they may change, and whether anything trains."""

from collections.abc import Callable, Collection

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from cachefreeze.cache.cache_state import CacheState

Tensor = torch.Tensor

# Number of steps without any gradient after which the user gets a message.
_MANY_STEPS = 8


def watch(shared: CacheState, numbers: Collection[int]) -> Callable[[], None]:
    """Watches the steps of all optimizers.

    Args:
        shared: State that all parts of the cache share.
        numbers: `id` of each parameter of the models.

    Returns:
        Function that ends this.
    """
    hooks = (
        register_optimizer_step_pre_hook(
            lambda optimizer, args, kwargs: _before_step(optimizer, shared)
        ),
        register_optimizer_step_post_hook(
            lambda optimizer, args, kwargs: _after_step(optimizer, shared, numbers)
        ),
    )

    def end() -> None:
        for hook in hooks:
            hook.remove()

    return end


def _before_step(optimizer: torch.optim.Optimizer, shared: CacheState) -> None:
    """Hashes frozen parameters that the step will change.

    After it, nobody can tell whether they had been changed unseen before.
    """
    if shared.report.verify != "off":
        shared.weights.hash_again(one for one in _held_by(optimizer) if one.grad is not None)


def _after_step(
    optimizer: torch.optim.Optimizer, shared: CacheState, numbers: Collection[int]
) -> None:
    """Marks parameters that the step may have changed, and counts steps that changed nothing."""
    shared.weights.suspect(_changed_by(optimizer), event=True)
    if shared.idle_steps is None:
        return
    held = _held_by(optimizer)
    if any(parameter.grad is not None or parameter.requires_grad for parameter in held):
        shared.idle_steps = None
    elif any(id(parameter) in numbers for parameter in held):
        shared.idle_steps += 1
        tell_if_nothing_trains(shared, _MANY_STEPS)


def _held_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _changed_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Returns the parameters that a step of an optimizer may change."""
    # torch's own optimizers do not change a parameter that has no gradient.
    own = type(optimizer).__module__.startswith("torch.optim")
    return [one for one in _held_by(optimizer) if not own or one.grad is not None]


def tell_if_nothing_trains(shared: CacheState, steps: int = 1) -> None:
    """Tells the user if so many optimizer steps were made and none could change anything."""
    if shared.idle_steps is not None and shared.idle_steps >= steps:
        shared.tell(
            "nothing trains",
            "Nothing trains: every parameter that the optimizer holds is frozen. Set "
            "requires_grad = True for the layers that should train, such as the head.",
        )
