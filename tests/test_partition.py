"""Any model, cut into units: what it computes, trains and saves stays what it was."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_flatten

from cachefreeze import Units, UserError, partition

READY_MADE: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "resnet50": {},
    "wide_resnet50_2": {},
    "resnext50_32x4d": {},
    "densenet121": {},
    "vgg16_bn": {},
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "mobilenet_v3_large": {},
    "efficientnet_b0": {},
    "efficientnet_v2_s": {},
    "convnext_tiny": {},
    "regnet_y_400mf": {},
    "shufflenet_v2_x1_0": {},
    "googlenet": {"aux_logits": False, "init_weights": False},
    "vit_b_16": {"image_size": 64},
    "swin_t": {},
}


LARGE = ("wide_resnet50_2", "vgg16_bn", "vit_b_16")


def images(rows: int = 2, size: int = 64) -> Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


def same_bits(one: Any, other: Any) -> bool:
    """Two outputs of a model: tensors, and tuples, dicts and data classes of them."""
    if is_dataclass(one):
        return type(one) is type(other) and same_bits(vars(one), vars(other))
    (ones, form), (others, other_form) = tree_flatten(one), tree_flatten(other)
    return form == other_form and all(map(torch.equal, ones, others))


def as_list(output: Any) -> list[Tensor]:
    values = output if isinstance(output, tuple) else [output]
    return [value for value in values if value is not None]


def assert_any_cut_gives_the_whole(model: nn.Module, units: Units, x: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        whole = model(x.clone())
        for cut in range(len(units)):
            assert same_bits(units.run(x.clone(), cut), whole), f"before {units.names[cut]}"
            x = units.run(x, cut, cut + 1)


def assert_trains_the_same(model: nn.Module, units: Units, x: Tensor) -> None:
    """The whole chain of units against the model: outputs, gradients and running statistics."""
    model.train()
    start = copy.deepcopy(dict(model.named_buffers()))
    results = []
    for forward in (model, units.run):
        model.load_state_dict(start, strict=False)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        output = as_list(forward(x.clone()))
        sum(value.square().sum() for value in output).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((output, gradients, copy.deepcopy(dict(model.named_buffers()))))
    (output, gradients, buffers), (of_units, gradients_of_units, buffers_of_units) = results
    assert len(output) == len(of_units)
    assert all(map(torch.equal, output, of_units))
    for name, gradient in gradients.items():
        if gradient is None:
            assert gradients_of_units[name] is None, name
        else:
            assert torch.equal(gradient, gradients_of_units[name]), name
    assert all(torch.equal(value, buffers_of_units[name]) for name, value in buffers.items())


def assert_cut_for_good(model: nn.Module, keys: list[str], units: Units, x: Tensor) -> None:
    assert list(model.state_dict()) == keys
    owned = [id(p) for unit in units for p in unit.parameters()]
    assert len(owned) == len(set(owned)), "a parameter is in two units"
    assert set(owned) == {id(p) for p in model.parameters()}
    assert len(set(units.names)) == len(units)
    assert_trains_the_same(model, units, x)
    assert_any_cut_gives_the_whole(model, units, x)


@pytest.mark.parametrize("name", READY_MADE)
def test_a_ready_made_model_is_the_same_in_units(name: str) -> None:
    model = torchvision.models.get_model(name, num_classes=5, **READY_MADE[name])
    keys = list(model.state_dict())
    units = partition(model)
    assert len(units) >= 10
    assert_cut_for_good(model, keys, units, images())
    if name not in LARGE:
        units.check(images())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("vit_tiny_patch16_224", {"img_size": 64}),
        ("convnext_atto", {}),
        ("efficientnet_b0", {}),
        ("densenet121", {}),
    ],
)
def test_a_model_of_timm_is_the_same_in_units(name: str, options: dict[str, Any]) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=5, drop_rate=0.2, **options)
    keys = list(model.state_dict())
    units = partition(model)
    assert len(units) >= 10
    assert_cut_for_good(model, keys, units, images())


def small_transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(
        64, 16, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128, dropout=0.2, num_classes=5
    )


@pytest.mark.parametrize(
    "make",
    [torchvision.models.resnet18, torchvision.models.mobilenet_v3_small, small_transformer],
)
@pytest.mark.parametrize("setting", ["fp32", "channels last", "bf16"])
def test_a_frozen_prefix_gives_what_the_model_gives_at_that_batch_size(
    make: Callable[[], nn.Module], setting: str
) -> None:
    model = make()
    x = images(4)
    if setting == "channels last":
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    units = partition(model)
    units.freeze(len(units) - 1)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=setting == "bf16"):
        whole = model(x)
        for cut in range(len(units)):
            assert torch.equal(units.run(units.run_frozen(x, 0, cut, 4), cut), whole), cut
        first, rows = (units.run_frozen(x, 0, stop, 4) for stop in (1, len(units) - 1))
        if setting == "channels last" and first.dim() == 4:
            assert first.is_contiguous(memory_format=torch.channels_last)
        # Fewer rows than a batch, and in two steps: what fills a store and what goes on from it.
        halfway = units.run_frozen(x[:3], 0, 2, 4)
        assert torch.equal(units.run_frozen(halfway, 2, len(units) - 1, 4), rows[:3])


# Models as people write them.


class Tutorial(nn.Module):
    """Two convolutions and two linear layers; one pool and one dropout for all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.dropout = nn.Dropout(0.5)
        self.fc1 = nn.Linear(128, 32)
        self.fc2 = nn.Linear(32, 5)

    def features(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        return torch.flatten(x, 1)

    def forward(self, x: Tensor) -> Any:
        return self.fc2(F.relu(self.fc1(self.features(x))))


LAYERS = ("conv1", "conv2", "fc1", "fc2")


class SharedDropout(Tutorial):
    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.pool(F.relu(self.conv1(x))))
        x = self.dropout(self.pool(F.relu(self.conv2(x))))
        x = self.dropout(F.relu(self.fc1(x.view(x.size(0), -1))))
        return self.fc2(x)


class FunctionalDropout(Tutorial):
    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.features(x), 0.4, training=self.training)
        x = F.dropout(F.relu(self.fc1(x)), training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class Named(Tutorial):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = F.relu(self.fc1(self.features(x)))
        return {"logits": self.fc2(features), "features": features}


class Pair(Tutorial):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.fc1(self.features(x)))
        return self.fc2(features), features


@dataclass
class Output:
    logits: Tensor
    features: Tensor


class Dataclass(Tutorial):
    def forward(self, x: Tensor) -> Output:
        features = F.relu(self.fc1(self.features(x)))
        return Output(self.fc2(features), features)


class Options(Tutorial):
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_features: bool = False,
        sizes: tuple[int, ...] = (1, -1),
        **others: Any,
    ) -> Tensor:
        if mask is not None:
            x = x * mask
        x = F.relu(self.fc1(self.features(x))).flatten(*sizes)
        return x if return_features else self.fc2(x)


class Tokens(nn.Module):
    """A class token and positions, parameters of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 17, 8))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True) for _ in range(2)
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class InPlace(nn.Module):
    """Residual blocks whose first step writes into what they take."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.SiLU(inplace=True)
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(x)
            return x + self.conv(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.block1 = self.Block()
        self.block2 = self.Block()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block2(self.block1(self.stem(x))).mean((2, 3)))


class NormAct(nn.BatchNorm2d):
    """A batch norm with its activation, as timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # so that symbolic tracing gets through

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class NormedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.bn1 = NormAct(8)
        self.conv2 = nn.Conv2d(8, 5, 3)
        self.bn2 = NormAct(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x)))).mean((2, 3))


HAND_WRITTEN: list[tuple[type[nn.Module], tuple[str, ...]]] = [
    (Tutorial, LAYERS),
    (SharedDropout, LAYERS),
    (FunctionalDropout, LAYERS),
    (Named, LAYERS),
    (Pair, LAYERS),
    (Dataclass, LAYERS),
    (Options, LAYERS),
    (Tokens, ("patches", "layers.0", "layers.1", "norm", "head")),
    (InPlace, ("stem", "block1", "block2", "fc")),
    (NormedLayers, ("conv1", "conv2")),
]


@pytest.mark.parametrize(("make", "names"), HAND_WRITTEN, ids=[m.__name__ for m, _ in HAND_WRITTEN])
def test_a_hand_written_model_is_the_same_in_units(
    make: type[nn.Module], names: tuple[str, ...]
) -> None:
    model = make()
    x = images(3, 16)
    state = copy.deepcopy(model.state_dict())
    units = partition(model, example=x)
    assert units.names == names
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {id(p) for unit in units for p in unit.parameters()} == {
        id(p) for p in model.parameters()
    }
    assert_any_cut_gives_the_whole(model, units, x)
    model.train()
    for seed in (1, 2):
        torch.manual_seed(seed)
        of_model = model(x.clone())
        torch.manual_seed(seed)
        assert same_bits(units.run(x.clone()), of_model)


def test_root_parameters_freeze_with_the_unit_that_uses_them() -> None:
    model = Tokens()
    partition(model).freeze("patches")
    assert not model.token.requires_grad
    assert not model.positions.requires_grad
    assert model.norm.weight.requires_grad


@pytest.mark.parametrize("make", [SharedDropout, FunctionalDropout])
def test_dropout_goes_on_behind_a_frozen_unit_and_follows_the_model(make: type[Tutorial]) -> None:
    model = make()
    units = partition(model)
    units.freeze("conv2")
    model.train()
    x = images(4, 16)
    rows = units.run_frozen(x, 0, 2, 4)
    assert torch.equal(units.run_frozen(x, 0, 2, 4), rows), "a frozen unit drops"
    assert not torch.equal(units.suffix(rows), units.suffix(rows)), "nothing drops any more"
    model.eval()
    assert torch.equal(units.suffix(rows), units.suffix(rows)), "it drops in eval mode"
    assert torch.equal(units.suffix(rows), model(x))
    model.train()
    assert not torch.equal(units.suffix(rows), units.suffix(rows))


def test_a_composite_that_units_share_goes_on_behind_a_frozen_one() -> None:
    class Composite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.dropout(x)

    class Shares(Tutorial):
        def __init__(self) -> None:
            super().__init__()
            self.composite = Composite()

        def forward(self, x: Tensor) -> Tensor:
            x = self.composite(self.pool(self.conv1(x)))
            x = self.composite(self.pool(self.conv2(x)))
            return self.fc2(self.fc1(x.flatten(1)))

    for names in (None, ["conv1", "conv2", "fc1"]):
        model = Shares()
        units = partition(model, names, example=images(4, 16))
        assert_trains_the_same(model, units, images(4, 16))
        units.freeze("conv1")
        model.train()
        rows = units.run_frozen(images(4, 16), 0, 1, 4)
        assert torch.equal(units.run_frozen(images(4, 16), 0, 1, 4), rows)
        assert not torch.equal(units.suffix(rows), units.suffix(rows))
        model.eval()
        assert torch.equal(units.suffix(rows), units.suffix(rows))


def test_statistics_that_later_steps_update_do_not_freeze_before_them() -> None:
    class Shares(Tutorial):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(8, affine=False)  # without a parameter, but not stateless

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.pool(self.conv1(x)))
            x = self.norm(self.pool(self.conv2(x)))
            return self.fc2(self.fc1(x.flatten(1)))

    model = Shares()
    units = partition(model)
    units.freeze(1)
    model.train()
    x = images(4, 16)
    rows = units.run_frozen(x, 0, 1, 4)
    units.suffix(rows)
    assert torch.equal(units.run_frozen(x, 0, 1, 4), rows)


def test_functional_dropout_follows_the_module_that_it_is_in() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 8, 3)
            self.conv2 = nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(F.dropout(self.conv1(x), training=self.training))

    model = nn.Sequential(OrderedDict(body=Body(), pool=nn.MaxPool2d(2), head=nn.Conv2d(8, 5, 3)))
    units = partition(model)
    x = images(2, 16)
    assert_trains_the_same(model, units, x)
    model.train()
    model.body.eval()
    assert torch.equal(units.run(x), model(x))


def test_a_model_with_auxiliary_heads_trains_as_it_did() -> None:
    model = torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False)
    units = partition(model, example=images())
    assert units.names[-1] == "inception4b"  # up to the second head, which the loss needs as well
    assert_trains_the_same(model, units, images())
    assert_any_cut_gives_the_whole(model, units, images())


class EarlyFeatures(Tutorial):
    """In training a loss wants early features as well."""

    def forward(self, x: Tensor) -> Any:
        early = self.conv1(x)
        x = self.pool(F.relu(self.conv2(self.pool(early))))
        x = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return (x, early) if self.training else x


class OneMoreStep(Tutorial):
    """In training there is a step more, early."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        if self.training:
            x = F.dropout(x, 0.3)
        x = self.pool(F.relu(self.conv2(x)))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def test_what_training_alone_does_is_kept_in_one_unit() -> None:
    x = images(2, 16)
    for model in (EarlyFeatures(), OneMoreStep()):
        units = partition(model, example=x)
        assert units.names == ("conv1", "conv2")
        assert_trains_the_same(model, units, x)
    with pytest.raises(UserError, match=r"before 'fc1': in training mode it goes another way"):
        partition(model, ["conv1", "fc1"])


class Branching(nn.Module):
    """Looks at its values to choose a way."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(8 * 14 * 14, 5)

    def forward(self, x: Tensor) -> Tensor:
        if not bool(x.isfinite().all()):
            raise ValueError("not finite")
        return self.head(self.body(x))


def test_a_model_that_looks_at_its_values_is_cut_by_names_only() -> None:
    with pytest.raises(UserError, match=r"cannot be cut automatically \(symbolically .*control fl"):
        partition(Branching())
    with pytest.raises(UserError, match=r"cannot be cut at these modules .*: name all that have"):
        partition(Branching(), ["body"])
    model = Branching()
    units = partition(model, ["body", "head"], example=images(2, 16))
    assert units.names == ("body", "head")
    assert_trains_the_same(model, units, images(2, 16))


@pytest.mark.parametrize("between", [F.silu, lambda x: x.flatten(2)], ids=["value", "shape"])
def test_named_modules_that_do_not_do_all_the_work_are_refused(
    between: Callable[[Tensor], Tensor],
) -> None:
    class Gap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 3)
            self.second = nn.Conv2d(3, 5, 3) if between is F.silu else nn.Linear(196, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(between(x) if bool(x.isfinite().all()) else x)

    with pytest.raises(UserError, match="do not give what the model gives"):
        partition(Gap(), ["first", "second"], example=images(2, 16))


@pytest.mark.parametrize("draw", ["torch", "random", "numpy"])
def test_a_model_that_draws_numbers_itself_is_not_cut_at_one_draw(draw: str) -> None:
    import random

    class StochasticDepth(Tutorial):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x)
            number = {
                "torch": lambda: torch.rand(()).item(),
                "random": random.random,
                "numpy": np.random.rand,
            }[draw]()
            if not self.training or number < 0.5:
                x = self.conv2(x)
            return self.fc2(self.fc1(self.pool(self.pool(x)).flatten(1)))

    model = StochasticDepth()
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    with pytest.raises(UserError, match="random numbers"):
        partition(model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


def test_a_model_that_counts_its_passes_is_refused_and_counts_none_of_ours() -> None:
    class Counting(Tutorial):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return super().forward(x) * (self.passes > 2)

    model = Counting()
    with pytest.raises(UserError, match="it sets its attribute passes"):
        partition(model)
    assert model.passes == 0


def test_a_block_that_draws_numbers_itself_is_one_unit() -> None:
    class Skipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
            self.conv2 = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            if self.training and torch.rand(()).item() < 0.5:
                return self.conv1(x)
            return self.conv2(self.conv1(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.blocks = nn.Sequential(Skipped(), Skipped())
            self.head = nn.Conv2d(8, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.stem(x)))

    model = Model()
    units = partition(model)
    assert units.names == ("stem", "blocks.0", "blocks.1", "head")
    model.train()
    for seed in range(6):
        torch.manual_seed(seed)
        whole = model(images(2, 16))
        torch.manual_seed(seed)
        assert torch.equal(units.run(images(2, 16)), whole)


def test_a_part_without_gradients_does_not_get_them() -> None:
    class NoGrad(Tutorial):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.features(x)
            return self.fc2(self.fc1(x))

    with pytest.raises(UserError, match="gradients"):
        partition(NoGrad())


def test_a_model_with_two_inputs_is_refused() -> None:
    class Two(Tutorial):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return self.fc2(self.fc1(self.features(x) + self.features(y)))

    with pytest.raises(UserError, match=r"Two cannot be cut automatically .*more than one input"):
        partition(Two())


def test_no_cut_lies_between_uses_of_one_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.one = nn.Conv2d(8, 8, 3, padding=1)
            self.other = nn.Conv2d(8, 8, 3, padding=1)
            self.other.weight = self.one.weight
            self.head = nn.Conv2d(8, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.other(F.relu(self.one(F.relu(self.stem(x))))))

    model = Tied()
    units = partition(model, example=images(2, 16))
    assert units.names == ("stem", "one", "head")
    assert_trains_the_same(model, units, images(2, 16))
    with pytest.raises(UserError, match=r"before 'other': .*a parameter of one"):
        partition(model, ["stem", "other"])


def test_modes_and_random_state_are_left_as_they_were() -> None:
    model = torchvision.models.mobilenet_v3_small(num_classes=5)
    model.train()
    model.features[0].eval()
    model.classifier[2].eval()
    modes = [module.training for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    units = partition(model)
    units.check(images())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert_modes_are_followed(model, units)


def assert_modes_are_followed(model: nn.Module, units: Units) -> None:
    """Parts in eval mode in a model that trains."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        whole = model(images())
        torch.manual_seed(seed)
        assert torch.equal(units.run(images()), whole)


def test_a_model_that_cannot_be_cut_right_is_left_as_it_was_too() -> None:
    class Gap(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = Gap()
    model.body.eval()
    with pytest.raises(UserError, match="Gap cannot be cut anywhere"):
        partition(model, ["body", "head"], example=images(2, 16))
    assert [module.training for module in model.children()] == [False, True]


# Units by name.


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.body(self.stem(x)), 1).flatten(1))


@pytest.mark.parametrize(
    "names",
    [
        ["stem", "body", "head"],
        ["stem.0", "body.2"],
        ["body.0", "body.2", "head"],
        ["body"],
        ["head"],
        ["stem", "body.2", "head"],
    ],
)
def test_units_begin_at_the_named_modules_and_the_first_with_the_model(names: list[str]) -> None:
    model = Chain()
    units = partition(model, names, example=images(2, 16))
    assert list(units.names) == names
    assert_trains_the_same(model, units, images(2, 16))
    assert_any_cut_gives_the_whole(model, units, images(2, 16))
    units.freeze(names[0])
    ordered = [n for n, _ in model.named_parameters() if not n.startswith("unused")]
    frozen = [n for n in ordered if not model.get_parameter(n).requires_grad]
    if len(names) == 1:
        assert frozen == ordered
    else:
        assert frozen == ordered[: next(i for i, n in enumerate(ordered) if names[1] in n)]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["stem", "bodies"], "^Chain has no module 'bodies'$"),
        ([""], "^Chain has no module ''$"),
        ([], "names no module"),
        (["stem", "body", "stem"], "names 'stem' twice"),
        (["body", "stem"], "'stem' runs before 'body': swap them"),
        (["stem", "head", "body"], "'body' runs before 'head': swap them"),
        (["stem", "unused"], "does not call 'unused'"),
        (["body", "body.2"], "does not call 'body', or calls it in .*leave out one of the two"),
        (["stem", "body.2", "body"], "does not call 'body', .*leave out one of the two"),
    ],
)
def test_names_that_are_no_units_are_refused(names: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        partition(Chain(), names)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.Conv2d(16, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped = self.down(self.stem(x))
        x = F.interpolate(self.middle(F.max_pool2d(skipped, 2)), scale_factor=2)
        return self.out(self.up(torch.cat([skipped, x], 1)))


def test_a_place_with_a_skip_connection_around_it_is_refused_by_name() -> None:
    place = r"UNet cannot be cut before 'middle': 2 values are still needed there \(down, max_pool"
    with pytest.raises(UserError, match=place):
        partition(UNet(), ["stem", "middle", "out"])
    model = UNet()
    units = partition(model, ["stem", "down", "out"], example=images(2, 16))
    assert_trains_the_same(model, units, images(2, 16))


def test_what_has_no_place_to_be_cut_says_the_first_reason() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 3, 3, padding=1)
            self.two = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.two(F.relu(self.one(x)))

    with pytest.raises(UserError, match=r"Around cannot be cut: after one 2 values .*\(one, x\)"):
        partition(Around())


# Sequences.


def test_children_of_a_sequence_that_all_have_parameters_are_its_units() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 5, 3)
    )
    units = partition(model)
    assert units.names == ("0", "1")
    assert tuple(units) == tuple(model.children())
    assert units.model is model


def test_children_of_a_sequence_without_parameters_join_the_one_before() -> None:
    model = nn.Sequential(
        *(nn.Upsample(scale_factor=2), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(1352, 5)),
        *(nn.ReLU(), nn.Dropout(0.2)),
    )
    units = partition(model, example=images(2, 16))
    assert units.names == ("1", "5", "8")
    boundaries = [units.run(images(2, 16), 0, stop).shape[1:] for stop in range(1, 4)]
    assert boundaries == [(8, 15, 15), (1352,), (5,)]
    assert_trains_the_same(model, units, images(2, 16))


def test_a_module_that_comes_twice_in_a_sequence_is_refused_or_kept_in_one_unit() -> None:
    conv = nn.Conv2d(3, 3, 3)
    with pytest.raises(ValueError, match="units '0' and '1' share a module"):
        partition(nn.Sequential(conv, conv))
    model = nn.Sequential(nn.Conv2d(3, 3, 3), conv, nn.ReLU(), conv, nn.Conv2d(3, 5, 3))
    units = partition(model, example=images(2, 16))
    assert units.names == ("0", "1", "4")


# Compiled units.


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.bn(self.conv(x)))


class Deep(nn.Module):
    """More blocks of one class than variants that torch.compile makes of one function."""

    def __init__(self, blocks: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList(Residual() for _ in range(blocks))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.dropout(x.mean((2, 3)))
        return self.head(F.dropout(x, 0.1, self.training))


@pytest.fixture
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch.compile looks at
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_freezing_holds_in_compiled_units(backend: str) -> None:
    def train(compiled: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        torch.manual_seed(2)
        model = Deep(3)
        units = partition(model)
        if compiled:
            assert units.compile(backend=backend) is units
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
        before: dict[str, Tensor] = {}
        for step in range(6):
            model.train()
            rows = units.run_frozen(images(4, 8), 0, units.frontier, 4)
            optimizer.zero_grad(set_to_none=True)
            units.suffix(rows).square().mean().backward()
            if step == 2:  # with gradients at hand, which must not be used any more
                units.freeze("blocks.1")
                before = copy.deepcopy(model.state_dict())
            optimizer.step()
        assert all((p.grad is None) == (not p.requires_grad) for p in model.parameters())
        model.eval()
        with torch.no_grad():
            return before, model.state_dict(), units.run(images(4, 8))

    before, after, output = train(compiled=True)
    changed = {
        name.rpartition(".")[0] for name in after if not same_bits(before[name], after[name])
    }
    assert changed == {"blocks.2.conv", "blocks.2.bn", "head"}
    if backend == "eager":
        _, plain, plain_output = train(compiled=False)
        assert all(torch.equal(value, plain[name]) for name, value in after.items())
        assert torch.equal(output, plain_output)


@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch.compile looks at
def test_a_freeze_compiles_one_unit_anew_and_no_unit_is_left_out() -> None:
    model = Deep()
    units = partition(model)
    counter = CompileCounter()
    units.compile(backend=counter)
    compiled = []

    def step() -> None:
        model.train()
        rows = units.run_frozen(images(2, 8), 0, units.frontier, 2)
        units.suffix(rows).sum().backward()
        model.eval()
        with torch.no_grad():
            units.run(images(2, 8))
        compiled.append(counter.frame_count)

    step()
    step()
    for count in (1, 2, 5):
        units.freeze(count)
        step()
        step()
    training_and_evaluation = 2 * len(units)
    assert compiled[:2] == [training_and_evaluation] * 2
    new = [after - before for before, after in zip(compiled[1::2], compiled[3::2], strict=False)]
    assert new == [1, 1, 1]
    assert compiled[2::2] == compiled[3::2]
