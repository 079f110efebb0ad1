"""Parts of a model that are exchanged, or put in between, after the cache was made."""

import copy

import pytest
import torch
from torch import nn

from cachefreeze import ActivationCache

from .harness import BATCH, assert_same, batches, images, net, plainly, warm


class LowRank(nn.Module):
    """What PEFT puts in the place of a layer: the layer, and a trained path beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("epochs", [4, 30])  # served, and at rest
@pytest.mark.parametrize("part", ["head", "body", "adapter"])
def test_a_part_that_is_exchanged_after_attaching_is_taken_as_it_is(part: str, epochs: int) -> None:
    model, x = net(), images()
    with ActivationCache(model) as cache:
        for epoch in range(epochs):
            for batch in batches(x, epoch):
                model(batch)
        if part == "head":
            model.head = nn.Linear(32, 7)
        elif part == "body":
            model.body[0] = copy.deepcopy(model.body[0])
            model.body[0].weight.data.mul_(2)  # type: ignore[operator]
        else:
            model.body[6] = LowRank(model.body[6])  # type: ignore[arg-type]
        before = cache.stats.rows_served
        for epoch in range(8):
            for batch in batches(x, epoch):
                twin = copy.deepcopy(model)
                result, expected = model(batch), twin(batch)
                assert_same(result, expected)
                trained = [
                    [p for p in one.parameters() if p.requires_grad] for one in (model, twin)
                ]
                got = torch.autograd.grad(result.sum(), trained[0])
                wanted = torch.autograd.grad(expected.sum(), trained[1])
                for one, other in zip(got, wanted, strict=True):
                    assert_same(one, other)
        assert cache.stats.rows_served - before >= 4 * BATCH


class Listed(nn.Module):
    """Layers in a list, which is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(192, 64), nn.Linear(64, 64)]).requires_grad_(False)
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


@pytest.mark.parametrize("what", ["list", "sequence", "hook"])
def test_what_is_put_between_frozen_layers_while_more_freezes_is_not_passed_over(what: str) -> None:
    model, x = Listed() if what == "list" else net(), images()
    model.extra = nn.Linear(2, 2)  # frozen later on
    with ActivationCache(model) as cache:
        warm(cache, model, x, epochs=4)
        model.extra.requires_grad_(False)
        if what == "hook":
            model.body.register_forward_hook(lambda module, args, output: 2 * output)
        else:
            layers = model.layers if what == "list" else model.body
            layers[-1] = LowRank(layers[-1])  # type: ignore[index,arg-type]
        for epoch in range(6):
            for batch in batches(x, epoch):
                assert_same(model(batch), plainly(model, batch))
