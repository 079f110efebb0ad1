"""What is known by rule of where rows are is what a trial on other rows finds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cachefreeze import lineage
from cachefreeze.lineage import axes as searching

IMAGES, TEXT = (4, 6, 8, 8), (4, 5, 6)
BIAS, NORM = torch.randn(6), nn.LayerNorm(6)


@pytest.mark.parametrize(
    ("shape", "work"),
    [
        (IMAGES, lambda x: F.conv2d(x, torch.ones(3, 6, 3, 3))),
        (IMAGES, lambda x: F.conv2d(x.transpose(0, 1), torch.ones(3, 4, 3, 3))),
        (IMAGES, lambda x: F.conv2d(x[0], torch.ones(3, 6, 3, 3))),
        (IMAGES, lambda x: F.batch_norm(x, BIAS, BIAS.abs())),
        (IMAGES, lambda x: F.batch_norm(x.transpose(0, 1), BIAS[:4], BIAS[:4].abs())),
        (IMAGES, lambda x: F.adaptive_avg_pool2d(F.relu(F.max_pool2d(x, 2)), 1)),
        (IMAGES, lambda x: x.transpose(0, 2) * 2 + x.transpose(0, 2)),
        (IMAGES, lambda x: x + x.flip(0)),
        (IMAGES, lambda x: x.mul_(2).add_(x)),
        (IMAGES, lambda x: x + x.mean(0)),
        (IMAGES, lambda x: x[:, 0] + x[:, :1, 0]),
        (TEXT, lambda x: F.linear(x.transpose(0, 1), torch.ones(3, 6))),
        (TEXT, lambda x: F.linear(x.transpose(0, 2), torch.ones(3, 4))),
        (TEXT, lambda x: F.linear(x.flatten(0, 1), torch.ones(3, 6))),
        (TEXT, lambda x: F.layer_norm(x.transpose(0, 1), (6,))),
        (TEXT, lambda x: F.layer_norm(x.transpose(0, 1), (4, 6))),
        (TEXT, lambda x: NORM(x) + x[:, :1]),
        (TEXT, lambda x: x[:, :4, :4] + x[:, :4, :4, None]),
        (TEXT, lambda x: F.linear(x[:, 0], x[:, 1])),
        (TEXT, lambda x: x[:, :4, 0] + x[:, :4, 1].T),
        (TEXT, lambda x: x[:, :1] + x[:, 0, :, None, None].sum(1)),
        (TEXT, lambda x: x.expand(4, 4, 5, 6) * x[:, None]),
    ],
)
def test_the_rule_says_what_the_trial_says(shape, work, monkeypatch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(shape[-1]) + 0.5, requires_grad=False)
            self.head = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return work(x * self.scale).sum() * self.head

    x = torch.randn(shape)
    model = Model()
    _, trace = lineage.trace(model, x)
    by_rule = lineage.batch_axes(trace, x)
    monkeypatch.setattr(searching, "row_dimension", lambda *given: None)
    tried = lineage.batch_axes(trace, x)
    assert by_rule.fitting == tried.fitting
    assert by_rule.mixing == tried.mixing


def test_operations_known_by_rule_run_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    model[:3].requires_grad_(False)
    x = torch.randn(4, 3, 8, 8)
    _, trace = lineage.trace(model, x)
    with torch.profiler.profile() as profile:
        lineage.batch_axes(trace, x)
    counts = {one.key: one.count for one in profile.key_averages()}
    assert counts["aten::conv2d"] == 1
