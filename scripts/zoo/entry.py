"""What the zoo says of a model, and the parts that its example inputs are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Batch = tuple[tuple[Any, ...], dict[str, Any]]
Inputs = Callable[[int, int], Batch]
Part = Callable[[int, torch.Generator], dict[str, Any]]

VOCABULARY = 100
FIRST_WORD = 5
"""Token ids below this one are left to padding, beginnings, ends and the like."""


def first_parameters(model: nn.Module, share: float) -> set[str]:
    """The names of the first parameters, in the order in which the model registered them.

    Args:
        model: any.
        share: of all names. 1.0 stands for all but the last module's: a new head is trained.
    """
    names = [name for name, _ in model.named_parameters()]
    if share < 1.0:
        return set(names[: round(share * len(names))])
    last = names[-1].rpartition(".")[0]
    return {name for name in names if name.rpartition(".")[0] != last}


@dataclass(frozen=True)
class Entry:
    """A model of the zoo: how it is built, what it takes, what is frozen of it.

    Args:
        name: the class, or the library's own name behind the library ("timm: convnext_atto").
        family: the library.
        build: makes the model, with random weights from torch's global generator, in training mode
            or not, as the library leaves it.
        inputs: (number of rows, seed) -> positional and keyword arguments of one batch. Another
            seed gives other content in the same shapes.
        frozen: (model, share) -> names of the parameters that are frozen. A share of 1.0 stands for
            all but the head.
        eval_inputs: like `inputs`, for a model that takes other arguments in evaluation mode
            (detectors take their targets in training mode only); None if it takes the same.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    frozen: Callable[[nn.Module, float], set[str]] = first_parameters
    eval_inputs: Inputs | None = None


def keywords(*parts: Part) -> Inputs:
    """A batch whose parts are passed by name."""

    def inputs(rows: int, seed: int) -> Batch:
        return (), _joined(parts, rows, seed)

    return inputs


def positional(*parts: Part) -> Inputs:
    """A batch whose parts are passed in order, without their names."""

    def inputs(rows: int, seed: int) -> Batch:
        return tuple(_joined(parts, rows, seed).values()), {}

    return inputs


def _joined(parts: tuple[Part, ...], rows: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {name: value for part in parts for name, value in part(rows, generator).items()}


def normal(name: str, *shape: int) -> Part:
    """Normally distributed numbers, a tensor of this shape for each row."""

    def part(rows: int, generator: torch.Generator) -> dict[str, Any]:
        return {name: torch.randn(rows, *shape, generator=generator)}

    return part


def uniform(name: str, *shape: int) -> Part:
    """Numbers from 0 to 1, a tensor of this shape for each row."""

    def part(rows: int, generator: torch.Generator) -> dict[str, Any]:
        return {name: torch.rand(rows, *shape, generator=generator)}

    return part


def integers(name: str, low: int, high: int, *shape: int) -> Part:
    """Integers from `low` to `high - 1`, a tensor of this shape for each row."""

    def part(rows: int, generator: torch.Generator) -> dict[str, Any]:
        return {name: torch.randint(low, high, (rows, *shape), generator=generator)}

    return part


def ones(name: str, *shape: int) -> Part:
    """Ones (a mask that hides nothing), a tensor of this shape for each row."""

    def part(rows: int, generator: torch.Generator) -> dict[str, Any]:
        return {name: torch.ones(rows, *shape, dtype=torch.long)}

    return part


def tokens(name: str, length: int) -> Part:
    """Token ids of texts that all have the same length."""
    return integers(name, FIRST_WORD, VOCABULARY, length)


def padded(
    length: int = 12,
    *,
    names: tuple[str, str] = ("input_ids", "attention_mask"),
    shortest: int = 6,
    padding: int = 0,
) -> Part:
    """Token ids of texts and their mask. The first row is the longest, the others are padded.

    Args:
        length: of a row, in tokens.
        names: of the ids and of the mask.
        shortest: the fewest tokens before the padding.
        padding: the id behind a text's end.
    """

    def part(rows: int, generator: torch.Generator) -> dict[str, Any]:
        ids = torch.randint(FIRST_WORD, VOCABULARY, (rows, length), generator=generator)
        lengths = torch.randint(shortest, length, (rows, 1), generator=generator)
        lengths[0] = length
        mask = torch.arange(length) < lengths
        return {names[0]: torch.where(mask, ids, padding), names[1]: mask.long()}

    return part


def enliven(model: nn.Module, batch: Batch, seed: int = 0) -> None:
    """Make an untrained model's output depend on its input in evaluation mode, in place.

    Libraries start some weights at zero, and batch norms with statistics that no layer has: what
    such models say of two images is the same, but for rounding, and a comparison would see nothing.

    Args:
        model: just built.
        batch: what it takes in training mode.
        seed: of the numbers that are added to the weights of tensors whose weights are all alike.
    """
    generator = torch.Generator().manual_seed(seed)
    training = {module: module.training for module in model.modules()}
    norms = [module for module in training if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool(parameter.min() == parameter.max()):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for norm in norms:
            norm.momentum = 1.0
        args, kwargs = batch
        model.train()(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, mode in training.items():
        module.training = mode
