"""Units: what freezes together in any model, in which order, and under which name."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from cachefreeze import Schedule, UserError, units_of
from cachefreeze.freezeout import freeze_units
from cachefreeze.models import build
from tests.freezeout.networks import (
    IMAGES,
    TOKENS,
    Block,
    Language,
    UNet,
    bert,
    last,
    names,
    numbered,
    timm_vit,
    torchvision_model,
    vit,
)

DENSE = [
    f"features.denseblock{block}.denselayer{layer}"
    for block, layers in enumerate((6, 12, 24, 16), 1)
    for layer in range(1, layers + 1)
]


for _place, _transition in ((6, 1), (19, 2), (44, 3)):
    DENSE.insert(_place, f"features.transition{_transition}")


ANY: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "resnet18": (
        torchvision_model("resnet18"),
        IMAGES,
        ["conv1", *(f"layer{n}.{block}" for n in (1, 2, 3, 4) for block in (0, 1)), "fc"],
    ),
    "densenet121": (
        torchvision_model("densenet121"),
        IMAGES,
        ["features.conv0", *DENSE, "classifier"],
    ),
    "swin_t": (
        torchvision_model("swin_t"),
        IMAGES,
        [
            *("features.0", "features.1.0", "features.1.1", "features.2"),
            *("features.3.0", "features.3.1", "features.4"),
            *(numbered(6, "features.5.{}")),
            *("features.6", "features.7.0", "features.7.1", "head"),
        ],
    ),
    # Three convolutions are no block, a stage's blocks are, and an expansion is part of a block.
    "efficientnet_b0": (
        torchvision_model("efficientnet_b0"),
        IMAGES,
        [
            *("features.0", "features.1", "features.2.0", "features.2.1"),
            *("features.3.0", "features.3.1", *numbered(3, "features.4.{}")),
            *(*numbered(3, "features.5.{}"), *numbered(4, "features.6.{}")),
            *("features.7", "features.8", "classifier"),
        ],
    ),
    "vit": (vit, IMAGES, ["conv_proj", *numbered(2, "encoder.layers.encoder_layer_{}"), "heads"]),
    "timm vit": (timm_vit, IMAGES, ["patch_embed", *numbered(2, "blocks.{}"), "head"]),
    "bert": (
        bert,
        TOKENS,
        ["bert.embeddings", *numbered(2, "bert.encoder.layer.{}"), "bert.pooler", "classifier"],
    ),
    "unet": (
        UNet,
        IMAGES,
        ["down.0", "down.3", "bottom.0", "bottom.3", "up.0", "up.3", "head"],
    ),
    "tied": (Language, TOKENS, ["places", *numbered(3, "blocks.{}"), "head"]),
}


@pytest.mark.parametrize("name", ANY)
def test_the_units_of_any_model_are_its_stem_its_blocks_and_its_head(name: str) -> None:
    make, x, expected = ANY[name]
    model = make()
    units = units_of(model, x)
    assert names(units) == expected
    found = [id(one) for unit in units for one in unit.parameters]
    assert sorted(found) == sorted(id(one) for one in model.parameters()), "each is in one unit"
    if name != "unet":
        assert names(units_of(model)) == expected, "the model lists them in this order, too"


def test_an_order_of_listing_that_is_none_of_running_is_set_right_by_an_example() -> None:
    model = UNet()
    assert names(units_of(model))[0] == "head"
    assert names(units_of(model, IMAGES))[-1] == "head"


@pytest.mark.parametrize("as_keyword", [False, True])
def test_an_example_is_passed_on_as_it_is_given(as_keyword: bool) -> None:
    model = bert()
    units = units_of(model, input_ids=TOKENS) if as_keyword else units_of(model, TOKENS)
    assert names(units)[0] == "bert.embeddings"


WRN16_2 = {
    "stem": 52,
    "group1_block1": 57,
    "group1_block2": 63,
    "group2_block1": 70,
    "group2_block2": 77,
    "group3_block1": 84,
    "group3_block2": 92,
    "head": 100,
}


@pytest.mark.parametrize("example", [(), (IMAGES,)])
def test_our_own_networks_keep_their_units(example: tuple[Tensor, ...]) -> None:
    wrn = units_of(build("wrn", 10, depth=16, width=2), *example)
    steps = Schedule(len(wrn), 100).freeze_steps
    assert dict(zip(names(wrn), steps, strict=True)) == WRN16_2
    densenet = build("densenet", 10, depth=40, growth_rate=12)
    assert names(units_of(densenet, *example)) == [
        "stem",
        *(f"block1_layer{layer}" for layer in range(1, 7)),
        "transition1",
        *(f"block2_layer{layer}" for layer in range(1, 7)),
        "transition2",
        *(f"block3_layer{layer}" for layer in range(1, 7)),
        "head",
    ]
    assert names(units_of(build("vgg", 10, depth=11), *example)) == [
        *("conv1_1", "conv2_1", "conv3_1", "conv3_2", "conv4_1", "conv4_2", "conv5_1", "conv5_2"),
        "head",
    ]


def test_an_encoder_that_is_run_twice_keeps_its_blocks_apart() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 2)
            self.encoder = nn.Sequential(*(Block(8) for _ in range(3)))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.head(self.encoder(a) - self.encoder(b))

    units = units_of(Pair(), torch.ones(2, 8), torch.ones(2, 8))
    assert names(units) == [*numbered(3, "encoder.{}"), "head"]


def test_what_the_pass_does_not_meet_freezes_with_the_last_unit() -> None:
    model = torchvision.models.googlenet(num_classes=3, init_weights=False, aux_logits=True)
    units = units_of(model, torch.zeros(1, 3, 64, 64))
    assert names(units)[-2:] == ["inception5b", "fc"]
    assert last(units) >= {id(one) for one in model.aux1.parameters()}


def test_a_norm_freezes_with_what_is_before_it_or_if_it_is_first_with_what_follows() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)),
        nn.BatchNorm2d(5),
        nn.Sequential(nn.Flatten(), nn.LayerNorm(3920), nn.Linear(3920, 2)),
    )
    units = units_of(model, IMAGES)
    assert names(units) == ["0", "1", "3"]
    assert [len(unit.parameters) for unit in units] == [4, 6, 4]


def test_parameters_beside_modules_freeze_with_what_comes_after_them() -> None:
    class WithToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 8))
            self.stem = nn.Linear(4, 8)
            self.blocks = nn.ModuleList(Block(8) for _ in range(2))
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.token, self.stem(x)])
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    model = WithToken()
    for example, number in (((), 0), ((torch.ones(2, 4),), 1)):
        units = units_of(model, *example)
        assert names(units) == ["stem", "blocks.0", "blocks.1", "head"]
        assert id(model.token) in {id(one) for one in units[number].parameters}
    model(torch.ones(2, 4)).sum().backward()
    freeze_units(model, 1)
    assert not model.token.requires_grad
    assert model.token.grad is None
    assert model.head.weight.grad is not None


def test_layers_of_an_encoder_are_blocks_and_layers_of_a_block_are_not() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(2))

    # The model has one encoder, and its layers are units.
    assert names(units_of(nn.ModuleList([Encoder(), nn.Linear(2, 2)]))) == [
        *("0.layers.0", "0.layers.1", "1")
    ]
    # With several of them, they are the blocks.
    assert names(units_of(nn.ModuleList([Encoder(), Encoder()]))) == ["0", "1"]


def test_a_list_that_does_more_than_to_hold_modules_is_a_module_like_others() -> None:
    class Branches(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([branch(x) for branch in self])

    for kind, expected in ((nn.ModuleList, ["0", "1.0", "1.1"]), (Branches, ["0", "1"])):
        layers = kind([nn.Linear(2, 2), nn.Linear(2, 2)])
        assert names(units_of(nn.Sequential(nn.Linear(2, 2), layers))) == expected


def test_a_norm_of_the_input_freezes_with_what_follows_wherever_it_is_listed() -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(self.norm(x)))

    units = units_of(Normalized(), torch.ones(1, 4))
    assert names(units) == ["stem", "head"]
    assert len(units[0].parameters) == 4


@pytest.mark.parametrize("wrap", [1, 2])
def test_a_wrapper_is_looked_through(wrap: int) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x))

    model: nn.Module = Plain()
    for _ in range(wrap):
        model = Wrapper(model)
    path = "module." * wrap
    assert names(units_of(model, torch.ones(1, 4))) == [f"{path}fc1", f"{path}fc2"]


def test_the_pass_leaves_modes_buffers_and_random_state_as_they_were() -> None:
    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
            self.register_buffer("calls", torch.zeros(1))
            self.was_training = True

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.was_training = self.training
            x = self.norm(self.first(x)) + torch.rand(1) + random.random() + np.random.rand()
            return self.second(x)

    model = Restless()
    model.norm.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert len(units_of(model, torch.ones(3, 4))) == 2
    assert not model.was_training, "it ran in eval mode"
    assert model.training
    assert model.second.training
    assert not model.norm.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(drawn[0], torch.get_rng_state())
    assert drawn[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert all(one.grad is None and one.requires_grad for one in model.parameters())


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(UserError, match="ReLU has no parameters"):
        units_of(nn.ReLU())
