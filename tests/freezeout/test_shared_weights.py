"""Weights that are held or used twice train as long as their last use."""

import pytest
import torch
from torch import Tensor, nn

from cachefreeze import units_of
from tests.freezeout.networks import TOKENS, Block, Language, last, names, numbered


@pytest.mark.parametrize("head_first", [False, True])
def test_a_weight_that_two_modules_hold_trains_as_long_as_the_last_of_them(
    head_first: bool,
) -> None:
    model = Language(head_first=head_first)
    assert id(model.tokens.weight) in last(units_of(model, TOKENS))


def test_a_weight_that_is_used_once_more_at_the_end_trains_to_the_end() -> None:
    model = Language("used")
    units = units_of(model, TOKENS)
    assert names(units) == ["places", *numbered(3, "blocks.{}"), "tokens"]
    assert last(units) == {id(model.tokens.weight)}


def test_of_a_stem_only_the_weight_that_is_used_again_trains_longer() -> None:
    class Embeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(20, 8), nn.Embedding(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.tokens(x) + self.places.weight[: x.shape[1]]

    class Tied(nn.Module):
        def __init__(self, holds: bool) -> None:
            super().__init__()
            self.head = nn.Linear(8, 20)
            self.blocks = nn.ModuleList(Block(8) for _ in range(2))
            self.stem = Embeddings()  # run first, listed last
            if holds:
                self.head.weight = self.stem.tokens.weight

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            for block in self.blocks:
                h = block(h)
            return h @ self.stem.tokens.weight.T + self.head.bias

    for holds in (False, True):
        model = Tied(holds)
        units = units_of(model, TOKENS)
        assert names(units) == ["stem", "blocks.0", "blocks.1", "head"]
        assert id(model.stem.tokens.weight) in last(units)
        assert [id(one) for one in units[0].parameters] == [id(model.stem.places.weight)]


def test_a_weight_that_is_clipped_beforehand_is_met_where_it_is_used() -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.head.weight.clamp_(-1, 1)
            return self.head(self.stem(x))

    assert names(units_of(Clipped(), torch.ones(1, 4))) == ["stem", "head"]
