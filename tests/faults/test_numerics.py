"""Switches that move the last bits of results are thrown while rows are served, in both ways."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from .harness import Loop, Net, differs, images


class Attending(nn.Module):
    """Attention by its function."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 192).requires_grad_(False)
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.body(x.flatten(2))[:, None].chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(1))


class Transformer(nn.Module):
    """A layer of torch's own, which has a fast path."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 2, 64, batch_first=True)
        self.body = nn.Sequential(nn.Flatten(2), layer, nn.Flatten(), nn.Linear(192, 32))
        self.body.requires_grad_(False).eval()
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Tiny(Net):
    """Weights so small that they are denormal, and a factor that makes them large again."""

    def __init__(self) -> None:
        super().__init__()
        self.body[4].weight.data.mul_(1e-39)
        self.body[4].bias.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body[:5](x) * 1e38)


class OfDefaultType(Net):
    """Makes a tensor of the default type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((self.body(x) * torch.full((32,), 0.1) + torch.full((32,), 0.3)).float())


class Compiled(Net):
    """A body under `torch.compile`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.compile(self.body, backend="eager")


class Odd(Net):
    """Rows of odd length: the last elements of a batch are computed by other code."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 65), nn.SiLU())
        self.body.requires_grad_(False)
        self.head = nn.Linear(65, 4)


def matmul_precision(on: bool) -> None:
    torch.set_float32_matmul_precision("medium" if on else "highest")


def conv_precision(on: bool) -> None:
    with suppress(AttributeError):  # before torch 2.9
        torch.backends.mkldnn.conv.fp32_precision = "bf16" if on else "none"


SWITCHES: dict[str, tuple[type[nn.Module], Callable[[bool], Any]]] = {
    "precision of products": (Net, matmul_precision),
    "precision of convolutions": (Net, conv_precision),
    "deterministic algorithms": (Net, torch.use_deterministic_algorithms),
    "oneDNN": (Net, lambda on: torch._C._set_mkldnn_enabled(not on)),
    "denormals": (Tiny, torch.set_flush_denormal),
    "threads": (Net, lambda on: torch.set_num_threads(2 if on else 1)),
    "attention": (Attending, lambda on: torch.backends.cuda.enable_flash_sdp(not on)),
    "fast path": (Transformer, lambda on: torch.backends.mha.set_fastpath_enabled(not on)),
    "default type": (
        OfDefaultType,
        lambda on: torch.set_default_dtype(torch.float64 if on else torch.float32),
    ),
    "compiled": (Compiled, lambda on: None),
    "odd rows": (Odd, lambda on: None),
}
# What moves bits on every processor that this was tried on.
MOVES = {"oneDNN", "denormals", "attention", "fast path", "default type"}


@pytest.fixture(autouse=True)
def _switches_off() -> Iterator[None]:
    yield
    for _, switch in SWITCHES.values():
        switch(False)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_thrown_and_thrown_back(name: str, tmp_path: Path) -> None:
    make, switch = SWITCHES[name]
    changes = {2: lambda model: switch(True), 4: lambda model: switch(False)}

    def run(cached: bool, changes: dict[int, Callable[[Any], Any]]) -> Any:
        switch(False)
        return Loop(make, changes, epochs=6).run(cached, tmp_path if cached else None)

    plain = run(False, changes)
    if name in MOVES:
        assert differs(run(False, {}), plain), "the switch has moved nothing"
    for _ in range(2):
        assert not differs(plain, run(True, changes))


class Activated(nn.Module):
    """A function of single elements behind a frozen layer."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], width: int) -> None:
        super().__init__()
        self.body = nn.Linear(24, width).requires_grad_(False)
        self.head = nn.Linear(width, 4)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.function(3 * self.body(x)))


# With widths that are no multiples of 4, the last elements of 8 rows are computed by other code.
# About one in a thousand has another last bit there. With these seeds, on a processor with AVX-512,
# comparisons of some batches do not show it, and rows of other bits would be served.
SEEDS = [(65, 75), (65, 124), (7, 77), (33, 6), (33, 12), (33, 79)]
FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu, "mish": F.mish, "elu": F.elu, "sigmoid": torch.sigmoid, "softplus": F.softplus,
    "gelu": lambda x: F.gelu(x, approximate="tanh"), "power": lambda x: (x.abs() / 4) ** 1.7,
    "scaled sum": lambda x: x.add(x.square(), alpha=0.3),
    "power of a number": lambda x: 2.0 ** (x / 8),
    "tensor as exponent": lambda x: (x.abs() / 4) ** torch.tensor([3.0]),
    "columns": lambda x: F.silu(x.t().contiguous()).t(),
    "over time": lambda x: _over_time(x, lambda y: y.softmax(0)),
    "over time, log": lambda x: _over_time(x, lambda y: y.log_softmax(0)),
}  # fmt: skip


def _over_time(x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Applies a function to three steps of eleven numbers, with the time first."""
    return function(x.view(-1, 3, 11).transpose(0, 1)).transpose(0, 1).flatten(1)


@pytest.mark.parametrize(
    ("name", "width", "seed"),
    [("silu", *one) for one in SEEDS] + [(name, 33, seed) for name in FUNCTIONS for seed in (0, 1)],
)
def test_last_elements_of_a_batch_are_computed_by_other_code(
    name: str, width: int, seed: int
) -> None:
    def run(cached: bool) -> Any:
        def make() -> Activated:
            torch.manual_seed(seed)
            return Activated(FUNCTIONS[name], width)

        x = torch.randn(64, 24, generator=torch.Generator().manual_seed(seed))
        return Loop(make, x=x, epochs=5).run(cached)

    cached = run(True)
    assert sum(cached.served) > 100
    assert not differs(run(False), cached)


class Scored(Net):
    """A frozen layer that gives one number."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(32, 1).requires_grad_(False)
        self.head = nn.Linear(33, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        body = self.body(x)
        return self.head(torch.cat([body, self.score(body)], 1))


@pytest.mark.parametrize("seed", range(4))
def test_last_rows_of_a_product_with_a_vector_are_computed_by_other_code(seed: int) -> None:
    def run(cached: bool) -> Any:
        x = images(45, seed)
        return Loop(Scored, x=x, size=9, options={"probation": 1}).run(cached)

    cached = run(True)
    assert sum(cached.served) > 100
    assert not differs(run(False), cached)


@pytest.mark.parametrize("make", [Net, Transformer, Attending], ids=lambda make: make.__name__)
def test_autocast_is_switched_in_the_middle(make: type[nn.Module]) -> None:
    def run(cached: bool) -> Any:
        on = [False]

        def step(model: Any, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=on[0]):
                return model(x).float()

        def turn(model: Any) -> None:
            on[0] = not on[0]

        return Loop(make, {2: turn, 5: turn}, step=step).run(cached)

    cached = run(True)
    assert sum(cached.served) > 0
    assert not differs(run(False), cached)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_rows_of_a_quantised_module_depend_on_others_and_are_not_served() -> None:
    def run(cached: bool) -> Any:
        def make() -> Net:
            model = Net()
            torch.ao.quantization.quantize_dynamic(model.body, {nn.Linear}, inplace=True)
            # Its weights are no tensors of the state, and are compared by the losses.
            model.body[4].state_dict = lambda *args, **kwargs: {}  # type: ignore[method-assign]
            return model

        return Loop(make, epochs=4).run(cached)

    assert not differs(run(False), run(True))
