"""What people do to a model in the middle of a run, by ways that leave a version and by others.

Each takes a model with a frozen `body` and a trained `head`.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

Change = Callable[[Any], Any]


def _largest(model: Any) -> torch.Tensor:
    return max(model.body.parameters(), key=lambda one: one.numel())


def _rows_like(model: Any) -> torch.Tensor:
    shape = getattr(model, "row", (3, 8, 8))
    return torch.randn(8, *shape, generator=torch.Generator().manual_seed(5))


def _step(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Change:
    """Thaws, steps and freezes again, as GANs do in every step."""

    def change(model: Any) -> None:
        model.body.requires_grad_(True)
        optimizer = make(model.body.parameters(), lr=0.01, **options)
        model.body(_rows_like(model)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.body.requires_grad_(False)

    return change


def momentum_goes_on(model: Any) -> None:
    optimizer = torch.optim.SGD(model.body.parameters(), lr=0.01, momentum=0.9)
    model.body.requires_grad_(True)
    model.body(_rows_like(model)).square().mean().backward()
    optimizer.step()
    model.body.requires_grad_(False)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()


def batch_norms_move(model: Any) -> None:
    model.body.train()
    with torch.no_grad():
        model.body(_rows_like(model))
    model.body.eval()


def by_numpy(model: Any) -> None:
    _largest(model).detach().numpy()[:] *= 1.25


def moving_average(model: Any) -> None:
    other = copy.deepcopy(model.body)
    for one, two in zip(model.body.parameters(), other.parameters(), strict=True):
        one.data.mul_(0.9).add_(two.data.sin(), alpha=0.1)


def shared_storage(model: Any) -> None:
    twin = nn.Linear(1, 1, bias=False)
    twin.weight.data = _largest(model).data.reshape(1, -1)
    twin.weight.data.mul_(0.5)


def buffers_by_data(model: Any) -> None:
    for buffer in model.body.buffers():
        if buffer.is_floating_point():
            buffer.data.add_(0.25)


def vector(model: Any) -> None:
    flat = parameters_to_vector(model.body.parameters())
    vector_to_parameters(flat * 1.1, model.body.parameters())


def load(model: Any, assign: bool = False) -> None:
    state = {name: one + 0.1 for name, one in model.body.state_dict().items()}
    model.body.load_state_dict(state, assign=assign)
    model.body.requires_grad_(False)


def exchange_parameter(model: Any) -> None:
    for part in model.body.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            part.weight = nn.Parameter(part.weight.detach() * 1.5, requires_grad=False)
            return


def averaged_model(model: Any) -> None:
    average = torch.optim.swa_utils.AveragedModel(model.body)
    for parameter in average.module.parameters():
        parameter.data.mul_(0.75)
    for one, two in zip(model.body.parameters(), average.module.parameters(), strict=True):
        one.data.copy_(two.data)


def data_exchanged(model: Any) -> None:
    largest = _largest(model)
    largest.data = largest.data * 1.5


def scripted_kernel(model: Any) -> None:
    torch._foreach_mul_([one.data for one in model.body.parameters()], 1.25)


def observers(model: Any) -> None:
    """Quantisation-aware training: an observer writes its range into buffers of the body."""
    for part in model.body.modules():
        if isinstance(part, Observed):
            with torch.no_grad():
                part.observer(_rows_like(model) * 3)


class Observed(nn.Module):
    """Rounds what passes to the range that an observer has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.observer = torch.ao.quantization.MovingAverageMinMaxObserver()
        self.observer(torch.tensor([-1.0, 1.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(self.observer.min_val.item(), self.observer.max_val.item())


# Ways to other weights. Half of them move no version counter.
WRITERS: dict[str, Change] = {
    "SGD of a GAN": _step(torch.optim.SGD),
    "fused SGD of a GAN": _step(torch.optim.SGD, fused=True),
    "fused AdamW of a GAN": _step(torch.optim.AdamW, fused=True),
    "fused Adam of a GAN": _step(torch.optim.Adam, fused=True),
    "momentum that goes on": momentum_goes_on,
    "batch norms in training mode": batch_norms_move,
    ".data.copy_": lambda model: [one.data.copy_(one.data.flip(0)) for one in
                                  model.body.parameters()],
    ".data.mul_": lambda model: _largest(model).data.mul_(1.5),
    "data exchanged": data_exchanged,
    "numpy": by_numpy,
    "a moving average": moving_average,
    "storage shared with another model": shared_storage,
    "buffers by .data": buffers_by_data,
    "vector_to_parameters": vector,
    "load_state_dict": load,
    "load_state_dict with assign": lambda model: load(model, assign=True),
    "another parameter": exchange_parameter,
    "an averaged model": averaged_model,
    "foreach on .data": scripted_kernel,
    "an observer": observers,
}  # fmt: skip


def hook(model: Any) -> None:
    first = next(part for part in model.body.modules() if isinstance(part, (nn.Linear, nn.Conv2d)))
    first.register_forward_hook(lambda module, args, output: output * 1.5)


def instance_forward(model: Any) -> None:
    first = next(part for part in model.body.modules() if isinstance(part, (nn.Linear, nn.Conv2d)))
    plain = first.forward
    first.forward = lambda x: plain(x) * 1.5


def submodule(model: Any) -> None:
    model.body[-1] = nn.Sigmoid()


def activation_function(model: Any) -> None:
    for part in model.body.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 0.5
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 0.5


def by_hand(model: Any) -> None:
    for part in model.body.modules():
        part.__dict__["training"] = not part.training


def buffer_again(model: Any) -> None:
    for part in model.body.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.register_buffer("running_mean", torch.full_like(part.running_mean, 0.5))


def thaw(model: Any) -> None:
    model.body.requires_grad_(True)


def freeze(model: Any) -> None:
    model.body.requires_grad_(False)


def to_double(model: Any) -> None:
    model.double()


# Other things that change what the model computes.
OTHERS: dict[str, Change] = {
    "a hook": hook,
    "forward of one module": instance_forward,
    "a submodule": submodule,
    "a number": activation_function,
    "the mode by hand": by_hand,
    "a buffer registered again": buffer_again,
    "train()": lambda model: model.body.train(),
    "thawed": thaw,
}


def one_row_by_data(model: Any) -> None:
    """Writes to a few numbers only, which a look at some of them misses."""
    largest = _largest(model)
    largest.data[largest.shape[0] // 2].mul_(3)


def one_number_by_numpy(model: Any) -> None:
    flat = _largest(model).detach().reshape(-1).numpy()
    flat[len(flat) // 3] += 1.0


# What no look sees at once. It is found by hashes of all bits, and told.
LATE: dict[str, Change] = {
    "one row by .data": one_row_by_data,
    "one number by numpy": one_number_by_numpy,
}


def loss_of(output: torch.Tensor) -> torch.Tensor:
    """Makes gradients that depend on every output."""
    return F.mse_loss(output, torch.zeros_like(output)) + output.sum() / 100
