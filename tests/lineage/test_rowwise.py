"""What is known by rule of where rows are is what a trial on other rows finds."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cachefreeze import lineage
from cachefreeze.lineage import axes as searching

IMAGES, TEXT, ALIKE = (4, 6, 8, 8), (4, 5, 6), (4, 4, 4)
BIAS, NORM = torch.randn(6), nn.LayerNorm(6)
# Something of its own for every place of the batch, or for all the same.
PLACES = torch.randn(4, 1, 1, 1)


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
        (IMAGES, lambda x: x * x.mean((2, 3), keepdim=True)),
        (IMAGES, lambda x: x + PLACES),
        (IMAGES, lambda x: x + PLACES.expand(4, 6, 8, 8)),
        (IMAGES, lambda x: x + PLACES[:1]),
        (IMAGES, lambda x: torch.cat([x, x.relu()], 1)),
        (IMAGES, lambda x: torch.cat([x, x.relu()])),
        (IMAGES, lambda x: torch.cat([x, PLACES.expand(4, 6, 8, 8)], 1)),
        (IMAGES, lambda x: torch.cat([x[:, :1], torch.zeros(1, 1, 1, 1).expand(4, 1, 8, 8)], 1)),
        (IMAGES, lambda x: torch.flatten(x, 1) @ torch.ones(384, 3)),
        (IMAGES, lambda x: x.flatten(2).transpose(1, 2).reshape(4, 8, 8, 6).permute(0, 3, 1, 2)),
        (IMAGES, lambda x: x.reshape(2, 2, 6, 8, 8)),
        (IMAGES, lambda x: x.reshape(24, 8, 8)),
        (IMAGES, lambda x: x.permute(2, 0, 3, 1).unbind(0)[1]),
        (IMAGES, lambda x: x.permute(2, 0, 3, 1).chunk(2, dim=1)[1]),
        (IMAGES, lambda x: x.split(3, 1)[1] + x.split(3, 1)[0].unsqueeze(1).sum(1)),
        (IMAGES, lambda x: x.sum(0) + x.sum(1, keepdim=True).mean(-1, keepdim=True)),
        (TEXT, lambda x: F.softmax(x, -1) + torch.softmax(x, dim=0)),
        (TEXT, lambda x: x.softmax(1).unsqueeze(0).transpose(0, 1)),
        (TEXT, lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])),
        (TEXT, lambda x: F.scaled_dot_product_attention(x, x, x)),
        (TEXT, lambda x: x @ x.transpose(1, 2) @ torch.ones(5, 2)),
        (TEXT, lambda x: torch.matmul(x, torch.ones(4, 6, 2).cumsum(0))),
        (TEXT, lambda x: x.masked_fill(x > 0, 1.0) * (x[:, :, :1] < 0).float()),
        (ALIKE, lambda x: torch.chunk(input=x, chunks=2, dim=1)[0]),
        (ALIKE, lambda x: torch.unbind(input=x.transpose(0, 1))[0]),
        (ALIKE, lambda x: x.transpose(0, 1).chunk(2, axis=1)[0]),
        (ALIKE, lambda x: torch.unbind(x.transpose(0, 1), axis=1)[0]),
        (ALIKE, lambda x: x[np.arange(4), :]),
        (ALIKE, lambda x: x[:, True, :, True]),
        (ALIKE, lambda x: F.linear(x[:, 0], torch.ones(4, 4), PLACES[:, 0, 0].expand(4, 4))),
        (TEXT, lambda x: F.embedding(x.abs().long() % 6, torch.eye(6)).mean(2)),
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


@pytest.mark.parametrize(("between", "runs"), [(nn.Flatten(), 0), (nn.PReLU(), 1)])
def test_operations_run_only_where_a_rule_is_missing(between, runs):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), between, nn.Flatten(), nn.Linear(144, 2))
    model[:4].requires_grad_(False)
    x = torch.randn(4, 3, 8, 8)
    _, trace = lineage.trace(model, x)
    wanted = lineage.minimum_cut(trace, reading_rate=1e12).kept
    with torch.profiler.profile() as profile:
        axes = lineage.batch_axes(trace, x, wanted=wanted)
    counts = {one.key: one.count for one in profile.key_averages()}
    assert counts.get("aten::conv2d", 0) == runs
    assert [axes.axis(number) for number in wanted] == [lineage.Axis(0)]
    assert list(axes.found) == (list(wanted) if runs else [])
