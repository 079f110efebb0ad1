"""Gradient checkpointing runs a segment a second time, in backward, when nobody follows."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from .harness import wired
from .test_autograd import hooked_embedding, tokens, wanted

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
    pytest.mark.parametrize("reentrant", [False, True]),
]


def mixed():
    return {"mid": nn.Linear(6, 6)}


def in_another_thread(loss):
    failed = []

    def run():
        try:
            loss.backward()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize("backward", [torch.Tensor.backward, in_another_thread])
def test_a_frozen_segment_is_right(reentrant, backward):
    def way(self, x):
        q = checkpoint(self.body, x, use_reentrant=reentrant)
        return self.head(torch.tanh(q))

    result = wired(way, backward=backward)
    assert result.skipped


@pytest.mark.parametrize("backward", [torch.Tensor.backward, in_another_thread])
def test_a_trained_segment_is_right(reentrant, backward):
    def way(self, x):
        q = self.body(x)
        q = checkpoint(lambda q: torch.tanh(self.mid(q)), q, use_reentrant=reentrant)
        return self.head(q)

    result = wired(way, parts=mixed, frozen=["body"], backward=backward)
    assert "linear" in result.left_out


@pytest.mark.parametrize("backward", [torch.Tensor.backward, in_another_thread])
def test_a_mixed_segment_is_right(reentrant, backward):
    def segment(self, x):
        q = torch.tanh(self.mid(torch.tanh(self.body(x))))
        return self.body(q)

    def way(self, x):
        return self.head(checkpoint(segment, self, x, use_reentrant=reentrant))

    wired(way, parts=mixed, frozen=["body"], backward=backward)


@pytest.mark.parametrize("backward", [torch.Tensor.backward, in_another_thread])
def test_segments_whose_inputs_take_gradient_are_right(reentrant, backward):
    """As PEFT does: a frozen embedding's output takes gradient, layers have trained adapters."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.lora = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return x + torch.tanh(self.base(x) + self.lora(torch.tanh(x)))

    def way(self, ids):
        q = self.embedding(ids)
        q = checkpoint(self.body, q, use_reentrant=reentrant)
        for layer in self.layers:
            q = checkpoint(layer, q, use_reentrant=reentrant)
        return self.head(q)

    result = wired(
        way,
        parts=lambda: {
            "embedding": hooked_embedding(),
            "layers": nn.ModuleList([Adapted(), Adapted()]),
        },
        batch=tokens,
        frozen=lambda name: "lora" not in name and not name.startswith("head"),
        backward=backward,
    )
    gradient = result.case.model.layers[0].lora.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_a_batch_that_takes_gradient_is_right(reentrant):
    def way(self, x):
        q = checkpoint(self.body, x, use_reentrant=reentrant)
        return self.head(checkpoint(self.body, torch.tanh(q), use_reentrant=reentrant))

    wired(way, batch=wanted)


def test_segments_in_segments_are_right(reentrant):
    def inner(self, q):
        return torch.tanh(self.mid(torch.tanh(q)))

    def outer(self, x):
        q = self.body(x)
        return checkpoint(inner, self, q, use_reentrant=reentrant) + self.mid(q)

    def way(self, x):
        return self.head(checkpoint(outer, self, x, use_reentrant=reentrant))

    wired(way, parts=mixed, frozen=["body"])
    wired(way, parts=mixed, frozen=["body"], batch=wanted)


def test_a_checkpointed_sequence_is_right(reentrant):
    def way(self, x):
        q = checkpoint_sequential(self.body, 2, x, use_reentrant=reentrant)
        return self.head(checkpoint_sequential(self.mid, 2, q, use_reentrant=reentrant))

    parts = lambda: {"mid": nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))}  # noqa: E731
    assert wired(way, parts=parts, frozen=["body"]).skipped


def test_dropout_in_a_segment_draws_the_same_numbers_again(reentrant):
    def way(self, x):
        q = self.body(x)
        segment = lambda q: self.drop(torch.tanh(self.mid(q)))  # noqa: E731
        return self.head(checkpoint(segment, q, use_reentrant=reentrant))

    result = wired(
        way, parts=lambda: {**mixed(), "drop": nn.Dropout()}, frozen=["body"], train=True
    )
    assert result.skipped


def test_a_batch_norm_in_a_segment_moves_as_often_as_in_the_plain_pass(reentrant):
    def way(self, x):
        q = self.body(x).requires_grad_()
        segment = lambda q: torch.tanh(self.mid(self.norm(q)))  # noqa: E731
        return self.head(checkpoint(segment, q, use_reentrant=reentrant))

    wired(
        way,
        parts=lambda: {**mixed(), "norm": nn.BatchNorm1d(6)},
        frozen=["body", "norm"],
        train=True,
    )


def test_a_segment_that_writes_into_a_given_object_is_right(reentrant):
    def way(self, x):
        seen = []

        def segment(q):
            seen.append(self.body(q))
            return torch.tanh(self.mid(seen[-1]))

        q = checkpoint(segment, x, use_reentrant=reentrant)
        return self.head(q + seen[0].detach())

    wired(way, parts=mixed, frozen=["body"])
