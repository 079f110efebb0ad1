"""Makes late values, and their plain twins."""

import torch
from torch import nn

from cachefreeze import lineage
from cachefreeze.lineage.late import Late

from .harness import with_late_outputs


class Source(nn.Module):
    """A frozen model whose output nobody reads.

    Args:
        way: Function of the model and a value of shape (4, 4), which returns the output.
    """

    def __init__(self, way):
        super().__init__()
        self.body = nn.Linear(4, 4).requires_grad_(False)
        self._way = way

    def forward(self, x):
        return self._way(self, self.body(x))


class Pair:
    """Plain outputs of a frozen model, and late ones.

    Args:
        way: As of `Source`.
    """

    def __init__(self, way=lambda model, q: q * 2):
        torch.manual_seed(0)
        self.model, self.x = Source(way), torch.randn(4, 4)
        output, trace = lineage.trace(self.model, self.x)
        self.plan = with_late_outputs(trace)
        del output
        self.kept = lineage.capture(self.plan, self.model, self.x)[1]
        self.report = None

    def plain(self):
        return self.model(self.x.clone())

    def late(self):
        own = {number: tensor.clone() for number, tensor in self.kept.items()}
        output, self.report = lineage.replay(self.plan, own, self.model, self.x.clone())
        assert not self.report.left
        first = output[0] if isinstance(output, (list, tuple)) else output
        assert type(first) is Late, "the output was computed in the pass"
        return output
