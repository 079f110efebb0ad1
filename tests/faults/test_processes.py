"""What the system allows a process changes while it trains."""

import resource
from pathlib import Path

import torch
from torch import nn

from tests.store.harness import fork, wait

from .harness import Loop, differs


class Wide(nn.Module):
    """Keeps 1 MB a row."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 32, 9, padding=4), nn.Tanh()).requires_grad_(False)
        self.head = nn.Conv1d(32, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def test_a_loop_whose_addresses_are_limited_ends_in_the_plain_weights() -> None:
    x = torch.randn(96, 1, 8192, generator=torch.Generator().manual_seed(1))
    loop = Loop(Wide, x=x, epochs=2)
    plain = loop.run(cached=False)

    def limited() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 240_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        assert not differs(plain, loop.run(cached=True))

    assert wait(fork(limited)) == 0
