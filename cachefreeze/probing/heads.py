"""Heads that are trained together: those of one structure share every step, on stacked parameters.

A head gets the same weights as if it were trained alone, apart from rounding: no result of one
head depends on another head.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

# Differences between heads that run together and the same heads alone that are rounding.
_ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class Linear(nn.Module):
    """A linear layer on some columns of a row.

    Args:
        columns: Numbers of the columns.
        classes: Number of outputs.
    """

    def __init__(self, columns: Sequence[int], classes: int) -> None:
        super().__init__()
        self.columns = tuple(columns)
        # One slice is taken without a copy.
        self.slice = (columns[0], columns[-1] + 1)
        self.in_a_row = len(columns) == columns[-1] + 1 - columns[0]
        self.linear = nn.Linear(len(columns), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps rows, (..., all columns), to logits, (..., classes)."""
        return self.linear(self.taken(x))

    def taken(self, x: Tensor) -> Tensor:
        """Returns the columns of rows that the layer takes."""
        if self.in_a_row:
            return x[..., slice(*self.slice)]
        return x[..., list(self.columns)]


class Heads:
    """Heads that learn by SGD with momentum, each at rates of its own.

    Args:
        heads: Modules that take rows, (n, ...), and return logits, (n, ..., classes). They are
            changed in place.
        rates: Initial learning rate of each head. It falls to 0 on a cosine.
        decays: Weight decay of each head.
        steps: Number of steps in all.
        momentum: Momentum of all heads.
    """

    def __init__(
        self,
        heads: Sequence[nn.Module],
        rates: Sequence[float],
        decays: Sequence[float],
        steps: int,
        momentum: float = 0.9,
    ) -> None:
        self.count = len(heads)
        groups: dict[Any, list[int]] = {}
        for number, head in enumerate(heads):
            structure = _structure(head)
            groups.setdefault(number if structure is None else structure, []).append(number)
        self._groups = [
            _Stack(
                [heads[number] for number in numbers],
                numbers,
                [rates[number] for number in numbers],
                [decays[number] for number in numbers],
                momentum,
            )
            for numbers in groups.values()
        ]
        self._steps, self._step = max(steps, 1), 0

    def learn(self, x: Tensor, targets: Tensor) -> None:
        """Takes one step of every head.

        Args:
            x: Rows, (n, ...).
            targets: Share of each class, (n, ..., classes). Zeros where nothing is to be learnt.
        """
        factor = 0.5 * (1 + math.cos(math.pi * self._step / self._steps))
        for group in self._groups:
            group.learn(x, targets, factor)
        self._step += 1

    @torch.no_grad()
    def outputs(self, x: Tensor) -> list[Tensor]:
        """Returns the output of each head for rows, in eval mode."""
        found: list[Any] = [None] * self.count
        for group in self._groups:
            for number, output in zip(group.numbers, group.outputs(x, training=False), strict=True):
                found[number] = output
        return found

    def finish(self) -> None:
        """Writes the trained weights into the heads that were given."""
        for group in self._groups:
            group.write_back()


class _Stack:
    """Heads of one structure, with their parameters stacked along a first axis.

    Args:
        heads: Modules of one structure.
        numbers: Number of each head.
        rates: Learning rate of each head.
        decays: Weight decay of each head.
        momentum: Momentum of all heads.
    """

    def __init__(
        self,
        heads: Sequence[nn.Module],
        numbers: Sequence[int],
        rates: Sequence[float],
        decays: Sequence[float],
        momentum: float,
    ) -> None:
        self.numbers = numbers
        self._heads, self._momentum = heads, momentum
        self._base = copy.deepcopy(heads[0]).to("meta")
        self._trained = {name for name, one in heads[0].named_parameters() if one.requires_grad}
        stacked = {
            name: torch.stack([dict(_tensors(head))[name].detach() for head in heads])
            for name, _ in _tensors(heads[0])
        }
        self._state = {
            name: one.requires_grad_(name in self._trained) for name, one in stacked.items()
        }
        self._speed: dict[str, Tensor] = {}
        device = next((one.device for one in stacked.values()), torch.device("cpu"))
        self._rates = torch.tensor(rates, device=device)
        self._decays = torch.tensor(decays, device=device)
        self._together: bool | None = None if len(heads) > 1 else False

    def outputs(self, x: Tensor, training: bool) -> Tensor:
        """Returns what the heads make of rows, (heads, n, ...)."""
        self._base.train(training)
        if self._together is None:
            self._together = self._may_run_together(x)
        if self._together:
            return self._all_at_once(x)
        return torch.stack([self._one(number, x) for number in range(len(self._heads))])

    def learn(self, x: Tensor, targets: Tensor, factor: float) -> None:
        """Takes one step."""
        logs = self.outputs(x, training=True).log_softmax(-1)
        # Each head has its own mean: the gradient of one is not scaled by how many there are.
        loss = -(targets * logs).sum() / targets.sum().clamp(min=1e-12)
        parameters = [self._state[name] for name in self._trained]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for name, gradient in zip(self._trained, gradients, strict=True):
                if gradient is not None:
                    self._move(name, gradient, factor)

    def _move(self, name: str, gradient: Tensor, factor: float) -> None:
        parameter = self._state[name]
        shape = (-1, *[1] * (parameter.dim() - 1))
        gradient = torch.addcmul(gradient, self._decays.view(shape), parameter)
        speed = self._speed.get(name)
        if speed is None:
            self._speed[name] = gradient
        else:
            torch.add(gradient, speed, alpha=self._momentum, out=speed)
        parameter.addcmul_(self._rates.view(shape), self._speed[name], value=-factor)

    def write_back(self) -> None:
        """Writes weights back into the heads."""
        with torch.no_grad():
            for number, head in enumerate(self._heads):
                for name, tensor in _tensors(head):
                    tensor.copy_(self._state[name][number])

    def _one(self, number: int, x: Tensor) -> Tensor:
        state = {name: tensor[number] for name, tensor in self._state.items()}
        output: Tensor = functional_call(self._base, state, (x,))
        return output

    def _all_at_once(self, x: Tensor) -> Tensor:
        own = isinstance(self._base, Linear)
        if own or type(self._base) is nn.Linear:
            # One product, where `vmap` makes one for each head: 5 to 20 times as fast.
            name = "linear." if own else ""
            weight, bias = self._state[f"{name}weight"], self._state.get(f"{name}bias")
            taken = self._base.taken(x) if isinstance(self._base, Linear) else x
            found = F.linear(taken, weight.flatten(0, 1), None if bias is None else bias.flatten())
            return found.unflatten(-1, weight.shape[:2]).movedim(-2, 0)
        call: Callable[[dict[str, Tensor]], Any] = lambda state: functional_call(  # noqa: E731
            self._base, state, (x,)
        )
        return torch.vmap(call)(self._state)

    @torch.no_grad()
    def _may_run_together(self, x: Tensor) -> bool:
        """Says whether all heads at once give what each of them gives, on a first batch."""
        if any(not name for name, _ in self._base.named_buffers()) or self._trained == set():
            return False
        before = {name: one.detach().clone() for name, one in self._state.items()}
        try:
            together = self._all_at_once(x)
            after = {name: one.detach().clone() for name, one in self._state.items()}
            self._put_back(before)
            alone = torch.stack([self._one(number, x) for number in range(len(self._heads))])
            return torch.allclose(together, alone, **_ROUNDING, equal_nan=True) and all(
                torch.allclose(after[name].double(), one.double(), **_ROUNDING, equal_nan=True)
                for name, one in self._state.items()
            )
        except Exception:  # whatever vmap has no rule for, such as random numbers
            return False
        finally:
            self._put_back(before)

    def _put_back(self, before: dict[str, Tensor]) -> None:
        for name, one in before.items():
            self._state[name].copy_(one)


def _tensors(head: nn.Module) -> list[tuple[str, Tensor]]:
    return [*head.named_parameters(), *head.named_buffers()]


def _structure(head: nn.Module) -> Any:
    """Returns what two heads have in common that differ in their numbers only.

    None if something about the head cannot be compared, such as a function that was put on it.
    """
    found: list[Any] = []
    for name, module in head.named_modules():
        plain = {}
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules", "training"):
                continue
            if key.startswith("_") and not value:  # hooks that are not there
                continue
            if not _is_plain(value):
                return None
            plain[key] = repr(value)
        found.append((name, type(module), tuple(sorted(plain.items()))))
    tensors = [
        (name, tuple(one.shape), one.dtype, one.device, one.requires_grad)
        for name, one in _tensors(head)
    ]
    return tuple(found), tuple(tensors)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
