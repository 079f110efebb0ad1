"""A module of somebody's own that the pass takes as one operation, since it asks who follows."""

import torch
from torch import nn


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.overrides.has_torch_function((x,)):
            return x
        return times(x)


def times(x: torch.Tensor) -> torch.Tensor:
    return x * FACTOR


FACTOR = 2
