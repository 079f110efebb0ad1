"""Runs a training loop with and without a cache, and compares all that the loop leaves behind.

A loop is a subclass of `Loop`. Its code knows nothing of a cache. `train` runs it, `judge` compares
two runs and says in words what is wrong.
"""

import hashlib
import importlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

# Read when a library of Hugging Face is first imported: a test never asks the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cachefreeze.errors import UserError

Expect = Literal["exact", "views", "served or told", "refuse", "pass-through"]
Optimizers = Optimizer | tuple[Optimizer, ...]


class Loop:
    """One training loop: data, model and step, as its author has them.

    The docstring of a loop says who writes such loops, why they are hard for a cache, and what a
    row is. A new object is made for each run, so a loop may keep loaders and counters on itself.

    `EXPECT` says what a good cache does. Everything is equal to the plain loop bit for bit in all
    of them.

    - exact: rows are served after the first epoch.
    - views: the same. A row is one view of a sample.
    - served or told: rows are served, or a message says why not.
    - refuse: a message says what stands in the way, or a `UserError` does.
    - pass-through: nothing more is asked.
    """

    EXPECT: ClassVar[Expect] = "exact"
    EPOCHS: ClassVar[int] = 4
    NEEDS: ClassVar[tuple[str, ...]] = ()
    """Libraries beside torch and torchvision. The loop is skipped where one is missing."""
    LEARNS: ClassVar[bool] = True
    """Whether the mean loss of the last epoch lies below that of the first."""

    loader: Iterable[Any]

    def build(self) -> Any:
        """Makes the model. A loop of several networks puts them into one `nn.ModuleDict`."""
        raise NotImplementedError

    def optimizer(self, model: Any) -> Optimizers:
        raise NotImplementedError

    def batches(self, epoch: int) -> Iterable[Any]:
        """The batches of an epoch. Loops that draw their rows themselves have their own."""
        return self.loader

    def step(self, model: Any, batch: Any) -> Tensor:
        """The forward pass, up to the loss."""
        raise NotImplementedError

    def on_epoch(self, model: Any, epoch: int) -> None:
        """Called before each epoch: `model.train()` and the like."""

    def update(self, model: Any, optimizer: Any, loss: Tensor) -> None:
        """Backward pass and optimizer step. Loops that accumulate have their own."""
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def train_batch(self, model: Any, batch: Any, optimizer: Any) -> Tensor:
        """All that happens with one batch. Loops of two optimizers have their own."""
        loss = self.step(model, batch)
        self.update(model, optimizer, loss)
        return loss

    def validate(self, model: Any) -> Tensor | None:
        """Called after each epoch, and once more after the cache is closed."""
        return None

    def caches(self, model: Any) -> tuple[nn.Module, ...]:
        """The modules that the cache is attached to."""
        return (model,)


class Stats(Protocol):
    @property
    def rows_served(self) -> int: ...


class Cache(Protocol):
    """What the harness asks of a cache."""

    @property
    def stats(self) -> Stats: ...
    @property
    def messages(self) -> Sequence[str]: ...
    def close(self) -> None: ...


MakeCache = Callable[..., Cache]


def activation_cache(*modules: nn.Module) -> Cache:
    """The cache under test."""
    cache: Cache = importlib.import_module("cachefreeze").ActivationCache(*modules)
    return cache


@dataclass
class Outcome:
    """All that a run leaves behind. What is compared is in `results`, by name."""

    results: dict[str, str] = field(default_factory=dict)
    first: float = 0.0
    """Mean loss of the first epoch."""
    last: float = 0.0
    """Mean loss of the last epoch."""
    served: int = 0
    """Rows that the cache served after the first epoch."""
    messages: tuple[str, ...] = ()


def digest(value: Any) -> str:
    """A short hash of the bits of a tensor, or of a structure with tensors in it."""
    found = hashlib.blake2b(digest_size=8)
    for part in _bits(value):
        found.update(part)
    return found.hexdigest()


def _bits(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        plain = value.detach().contiguous()
        yield f"{plain.dtype} {tuple(plain.shape)} {plain.device}".encode()
        if plain.numel():
            yield plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}".encode() + value.tobytes()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield repr(key).encode()
            yield from _bits(inner)
    elif isinstance(value, list | tuple):
        yield f"{len(value)}".encode()
        for inner in value:
            yield from _bits(inner)
    else:
        yield repr(value).encode()


def seed(number: int) -> None:
    """Seeds every random state that a loop may draw from."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@contextmanager
def one_thread() -> Iterator[None]:
    """Bits are promised for one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(kind: type[Loop], make_cache: MakeCache | None = None) -> Outcome:
    """Runs the loop. `make_cache` is called with the modules that the loop attaches a cache to."""
    with one_thread(), ExitStack() as stack:
        plain_call = nn.Module.__call__
        seed(0)
        loop = kind()
        model = loop.build()
        optimizer = loop.optimizer(model)
        cache = make_cache(*loop.caches(model)) if make_cache else None
        if cache is not None:
            stack.callback(cache.close)
        outcome = Outcome()
        in_first_epoch = 0
        for epoch in range(loop.EPOCHS):
            loop.on_epoch(model, epoch)
            losses = []
            for batch in loop.batches(epoch):
                losses.append(loop.train_batch(model, batch, optimizer).detach().clone())
            outcome.results |= {
                f"loss of step {at} in epoch {epoch}": digest(loss)
                for at, loss in enumerate(losses)
            }
            outcome.results[f"validation of epoch {epoch}"] = digest(loop.validate(model))
            outcome.last = float(torch.stack(losses).float().mean())
            if epoch == 0:
                outcome.first = outcome.last
                in_first_epoch = cache.stats.rows_served if cache else 0
        if cache is not None:
            outcome.served = cache.stats.rows_served - in_first_epoch
            cache.close()
            outcome.messages = tuple(cache.messages)
        outcome.results |= _states(model, optimizer)
        outcome.results["call of a module"] = digest(nn.Module.__call__ is plain_call)
        outcome.results["validation without the cache"] = digest(loop.validate(model))
        return outcome


def _states(model: nn.Module, optimizer: Optimizers) -> dict[str, str]:
    """Hashes of all weights, flags, gradients, attributes, optimizer and random states, by name."""
    results = {}
    for name, parameter in model.named_parameters():
        results[f"parameter {name}"] = digest(parameter)
        results[f"gradient of {name}"] = digest(parameter.grad)
        results[f"requires_grad of {name}"] = digest(parameter.requires_grad)
    results |= {f"buffer {name}": digest(buffer) for name, buffer in model.named_buffers()}
    for name, part in model.named_modules():
        results[f"mode of {name}"] = digest(part.training)
        hooks = [len(part._forward_pre_hooks), len(part._forward_hooks), len(part._backward_hooks)]
        results[f"attributes of {name}"] = digest([type(part).__name__, sorted(vars(part)), hooks])
    optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else optimizer
    for number, one in enumerate(optimizers):
        for index, state in one.state_dict()["state"].items():
            results[f"state {index} of optimizer {number}"] = digest(state)
    results["random state of torch"] = digest(torch.get_rng_state())
    results["random state of python"] = digest(random.getstate())
    results["random state of numpy"] = digest(np.random.get_state())
    return results


def differences(plain: Outcome, cached: Outcome) -> list[str]:
    """Names of the results that differ, in the order in which they came about."""
    names = [*plain.results, *(name for name in cached.results if name not in plain.results)]
    return [name for name in names if plain.results.get(name) != cached.results.get(name)]


def judge(kind: type[Loop], plain: Outcome, make_cache: MakeCache = activation_cache) -> str:
    """Runs the loop with a cache. Returns what is wrong in one sentence, or "" if nothing is."""
    try:
        cached = train(kind, make_cache)
    except UserError as error:
        if kind.EXPECT in ("refuse", "served or told"):
            return ""
        return f"refused: {error}"
    wrong = differences(plain, cached)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return f"other bits than the plain loop: {', '.join(wrong[:3])}{more}"
    served, told = cached.served > 0, bool(cached.messages)
    if kind.EXPECT in ("exact", "views") and not served:
        return f"no row was served after the first epoch; messages: {cached.messages}"
    if kind.EXPECT == "refuse" and not told:
        return f"{cached.served} rows were served, and no message says what stands in the way"
    if kind.EXPECT == "served or told" and not (served or told):
        return "no row was served after the first epoch, and no message says why"
    return ""
