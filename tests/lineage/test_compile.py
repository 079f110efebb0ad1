"""Compiled blocks, frozen and trained, and compiled models."""

import pytest
import torch
from torch import nn

from .harness import Wired, check, rows


def louder(graph, example):
    """Compiles to other numbers than those of eager code, as Inductor does in the last bits."""
    return lambda *args: tuple(one + 1 for one in graph(*args))


BACKENDS = ["eager", "aot_eager", louder]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.inner(x)) + x


def way(self, x):
    return self.head(self.trained(self.frozen(self.body(x))))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["frozen", "trained", "both"])
@pytest.mark.parametrize("how", ["torch.compile", "module.compile"])
def test_compiled_blocks_are_right(backend, which, how):
    def compiled(block):
        if how == "torch.compile":
            return torch.compile(block, backend=backend)
        block.compile(backend=backend)
        return block

    def build():
        blocks = {name: Block() for name in ("frozen", "trained")}
        for name in blocks:
            if which in (name, "both"):
                blocks[name] = compiled(blocks[name])
        return Wired(way, **blocks)

    result = check(build, rows(6), frozen=["body", "frozen"], leaves=which == "both")
    assert result.left_out.count("linear") >= 2
    assert len(result.plan.cut.kept) == 1
    assert "Block" not in result.ran or which != "frozen"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_is_right(backend):
    def build():
        return torch.compile(Wired(way, frozen=Block(), trained=Block()), backend=backend)

    prefixes = ["_orig_mod.body", "_orig_mod.frozen"]
    check(build, rows(6), frozen=prefixes, leaves=False, may_leave=True)


@pytest.mark.parametrize("train", [False, True])
def test_a_compiled_batch_norm_moves_its_statistics(train):
    def build():
        block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        return Wired(way, frozen=torch.compile(block, backend="eager"), trained=Block())

    result = check(build, rows(6), frozen=["body", "frozen"], train=train)
    assert ("OptimizedModule" in result.ran) == train


def test_a_compiled_module_that_draws_is_live():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    def build():
        return Wired(way, frozen=torch.compile(Noisy(), backend="eager"), trained=Block())

    assert "OptimizedModule" in check(build, rows(6), frozen=["body"]).ran


def test_a_module_whose_forward_is_compiled_is_right():
    def build():
        blocks = {name: Block() for name in ("frozen", "trained")}
        for block in blocks.values():
            block.forward = torch.compile(block.forward, backend=louder)
        return Wired(way, **blocks)

    assert "Block" in check(build, rows(6), frozen=["body", "frozen"], may_leave=True).left_out


def test_a_model_that_compiles_itself_is_right():
    def build():
        model = Wired(way, frozen=Block(), trained=Block())
        model.compile(backend="eager")
        return model

    check(build, rows(6), frozen=["body", "frozen"], leaves=False, may_leave=True)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_function_in_the_model_is_right():
    @torch.compile(backend="eager")
    def activated(x):
        return torch.tanh(x) * 2

    def way(self, x):
        return self.head(activated(self.mid(activated(self.body(x)))))

    def build():
        return Wired(way, mid=nn.Linear(6, 6))

    check(build, rows(6), frozen=["body"], may_leave=True)


def test_a_frozen_model_that_is_compiled_after_the_trace_compiles_once():
    """A compiled part that is called in a replay is not compiled again for it."""
    from cachefreeze import lineage

    compiled = []

    def backend(graph, example):
        compiled.append(1)
        return graph.forward

    torch.manual_seed(0)
    model = Wired(way, frozen=Block(), trained=torch.compile(Block(), backend=backend))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("trained", "head")))
    x = torch.randn(4, 6)
    model(x)
    first = len(compiled)
    _, trace = lineage.trace(model, x)
    plan = lineage.Plan(trace, lineage.crossing_cut(trace))
    for _ in range(3):
        kept = lineage.capture(plan, model, x)[1]
        lineage.replay(plan, kept, model, x)
    assert len(compiled) <= first + 1
