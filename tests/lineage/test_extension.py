"""When more freezes, the values of the new cut come from those of the old one."""

import torch
from torch import nn

from cachefreeze import lineage


def blocks(count=4):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(count)))


def planned(model, frozen, x, **options):
    for number, block in enumerate(model):
        block.requires_grad_(number >= frozen)
    _, trace = lineage.trace(model, x)
    cut = lineage.minimum_cut(trace, **options) if options else lineage.crossing_cut(trace)
    return lineage.Plan(trace, cut)


def extended(old, kept, new, x):
    extension = lineage.Extension(old, new)
    assert extension.is_complete
    given = {**extension.values(kept), new.trace.inputs[0]: x}
    return new.program.run(new.cut.kept, given)


def test_values_of_a_later_cut_are_computed_from_those_of_an_earlier_one():
    model, x = blocks().eval(), torch.randn(5, 6)
    old = planned(model, 1, x)
    _, kept, _ = lineage.capture(old, model, x)
    new = planned(model, 3, x)
    calls = []
    hook = model[2].register_forward_hook(lambda *_: calls.append(1))
    made = extended(old, kept, new, x)
    hook.remove()
    assert calls == []
    _, expected, _ = lineage.capture(new, model, x)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[number], expected[number]) for number in made)
    output, report = lineage.replay(new, made, model, x)
    assert torch.equal(output, model(x))
    assert report.left == ""


def test_only_what_is_new_is_computed():
    model, x = blocks().eval(), torch.randn(5, 6)
    old = planned(model, 2, x)
    _, kept, _ = lineage.capture(old, model, x)
    new = planned(model, 3, x)
    with torch.no_grad():
        model[0][0].weight.fill_(float("nan"))  # would show if the first block ran
    made = extended(old, kept, new, x)
    assert not any(tensor.isnan().any() for tensor in made.values())


def test_kept_values_are_not_written_to():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.second(torch.relu_(self.first(x).add_(1)))

    model, x = nn.Sequential(InPlace(), InPlace(), nn.Linear(6, 2)).eval(), torch.randn(5, 6)
    old = planned(model, 1, x)
    _, kept, _ = lineage.capture(old, model, x)
    before = {number: tensor.clone() for number, tensor in kept.items()}
    new = planned(model, 2, x)
    made = extended(old, kept, new, x)
    assert all(torch.equal(before[number], kept[number]) for number in kept)
    _, expected, _ = lineage.capture(new, model, x)
    assert all(torch.equal(made[number], expected[number]) for number in made)


def test_a_cut_inside_what_was_never_kept_is_not_made_of_nothing():
    model, x = blocks().eval(), torch.randn(5, 6)
    old, earlier = planned(model, 3, x), planned(model, 1, x)
    assert not lineage.Extension(old, earlier).is_complete
