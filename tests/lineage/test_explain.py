"""`explain` says what a cache would save, and what stands in its way, in words."""

import re
import statistics

import pytest
import torch
from torch import nn

import cachefreeze


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1),
            nn.Conv2d(16, 16, 3, padding=1),
        )  # fmt: skip
        self.head = nn.Linear(16, 4)
        self.encoder.requires_grad_(False)

    def forward(self, x):
        return self.head(self.encoder(x).mean((2, 3)))


X = torch.randn(4, 3, 16, 16)


def shares_saved(model):
    """Explains a model several times: a clock tells the share, and a busy machine disturbs it."""
    return [cachefreeze.explain(model, X).saved for _ in range(7)]


def test_a_frozen_encoder_is_nearly_all_of_the_pass():
    told = cachefreeze.explain(Model().eval(), X)
    law = told.over(epochs=20, rows=1000, views=4)
    assert "1 - 4/20 = 80%" in law
    assert "1,000 rows take 256.0 kB" in law
    assert statistics.median(shares_saved(Model().eval())) > 0.8
    assert told.kept == ("the model itself: mean (4x16)",)
    assert told.row_bytes == 16 * 4
    assert told.limits == ()
    assert re.search(r"leave out \d+% of the forward pass and keep 64 bytes a row", str(told))
    assert "axis 0" in str(told)


def test_dropout_and_batch_norms_in_training_mode_are_named_with_what_they_cost():
    told = cachefreeze.explain(Model().train(), X)
    # All that is left out is the work before the first of them.
    assert told.kept == ("encoder.0: conv2d (4x16x16x16)",)
    assert told.row_bytes == 16 * 16 * 16 * 4
    assert statistics.median(shares_saved(Model().train())) < 0.6
    text = str(told)
    assert "updates its running statistics" in text
    assert "`encoder.1`" in text
    assert "draws random numbers (dropout)" in text
    assert "eval mode" in text


def test_explaining_changes_no_state_but_what_a_pass_changes():
    model = Model().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    cachefreeze.explain(model, X)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_rows_that_depend_on_others_are_named():
    class Centred(Model):
        def forward(self, x):
            h = self.encoder(x).mean((2, 3))
            return self.head(torch.tanh(h - h.mean(0)))

    told = cachefreeze.explain(Centred().eval(), X)
    assert any("depend on other rows" in limit for limit in told.limits)


@pytest.mark.parametrize(
    ("model", "batch", "sentence"),
    [
        (lambda x: x * 2, X, "uses no torch.nn.Module"),
        (Model().eval(), torch.randn(4, 5, 16, 16), "does not accept the example batch"),
        (Model().requires_grad_(True), X, "No parameter of Model is frozen"),
        (Model().requires_grad_(False), X, "No parameter of Model is trained"),
    ],
    ids=["no module", "another shape", "nothing frozen", "nothing trained"],
)
def test_bad_input_gets_one_sentence(model, batch, sentence):
    with pytest.raises(cachefreeze.UserError, match=sentence) as told:
        cachefreeze.explain(model, batch)
    assert "\n" not in str(told.value)


def test_one_row_is_explained_without_axes():
    assert "one row is too few" in str(cachefreeze.explain(Model().eval(), X[:1]))


doubled = torch.compile(lambda x: 2 * x, backend="eager")


def test_a_function_under_compile_is_refused_in_one_sentence() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4).requires_grad_(False)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(doubled(self.body(x)))

    with pytest.raises(cachefreeze.UserError, match=r"torch.compile \(doubled\)"):
        cachefreeze.explain(Net(), torch.randn(4, 4))
