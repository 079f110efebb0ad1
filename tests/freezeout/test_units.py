"""Units: what freezes together in any model, in which order, and under which name."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from cachefreeze import Schedule, UserError, units_of
from cachefreeze.freezeout import Unit, count_of, freeze_units
from cachefreeze.models import build

IMAGES = torch.zeros(2, 3, 32, 32)
TOKENS = torch.zeros(2, 6, dtype=torch.long)


def names(units: Sequence[Unit]) -> list[str]:
    return [unit.name for unit in units]


def numbered(count: int, *patterns: str) -> list[str]:
    return [pattern.format(number) for number in range(count) for pattern in patterns]


class UNet(nn.Module):
    """Registers its parts from the outside in: the last of them before those in between."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(8, 2, 1)
        self.up = self.double(24, 8)
        self.bottom = self.double(8, 16)
        self.down = self.double(3, 8)

    @staticmethod
    def double(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        wide = self.down(x)
        deep = self.bottom(nn.functional.max_pool2d(wide, 2))
        deep = nn.functional.interpolate(deep, scale_factor=2.0)
        return self.head(self.up(torch.cat([wide, deep], 1))).mean((2, 3))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class Language(nn.Module):
    """A small language model whose head has the embedding's weight.

    Args:
        tied: `registered` if a head holds the weight, `used` if the forward pass takes it.
        head_first: Whether the head is listed before everything else.
    """

    def __init__(self, tied: str = "registered", head_first: bool = False) -> None:
        super().__init__()
        if head_first:
            self.head = nn.Linear(8, 20)
        self.tokens, self.places = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        if tied == "registered":
            if not head_first:
                self.head = nn.Linear(8, 20)
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        return self.head(h) if hasattr(self, "head") else h @ self.tokens.weight.T


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, num_classes=3)


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


def last(units: Sequence[Unit]) -> set[int]:
    return {id(one) for one in units[-1].parameters}


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


@pytest.mark.parametrize(
    ("first", "count"),
    [
        (0, 0),
        (3, 3),
        (-1, 9),
        ("conv1", 1),
        ("layer1.0", 2),
        ("layer2", 5),
        ("fc", 10),
    ],
)
def test_first_units_are_a_number_of_them_or_all_up_to_a_name(first: Any, count: int) -> None:
    units = units_of(torchvision.models.resnet18())
    assert count_of(units, first) == count


def test_groups_of_our_own_networks_are_named_as_modules_are() -> None:
    assert count_of(units_of(build("wrn", 10, depth=16, width=2)), "group2") == 5


@pytest.mark.parametrize(
    ("first", "sentence"),
    [
        (11, "cannot freeze 11 units of a network that has 10"),
        (-11, "cannot freeze -11 units"),
        ("layer", "no unit 'layer': it has conv1, layer1.0"),
    ],
)
def test_units_that_are_not_there_are_refused(first: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        count_of(units_of(torchvision.models.resnet18()), first)


def test_first_units_freeze_for_good_with_the_modules_that_are_theirs() -> None:
    model = torchvision.models.resnet18()
    frozen = freeze_units(model, "layer1", IMAGES)
    assert names(frozen) == ["conv1", "layer1.0", "layer1.1"]
    model.train()
    parts = (model.conv1, model.bn1, model.layer1)
    assert not any(one.training for part in parts for one in part.modules())
    assert all(one.training for one in (model, *model.layer2.modules(), model.fc))
    taken = {name for name, one in model.named_parameters() if one.requires_grad}
    assert not any(name.startswith(("conv1", "bn1", "layer1")) for name in taken)
    assert len(taken) == len(list(model.parameters())) - 3 - 12


def test_a_dropout_between_frozen_layers_freezes_and_one_before_trained_layers_does_not() -> None:
    shared = nn.Dropout()
    model = nn.Sequential(
        *(nn.Linear(4, 4), nn.Dropout(), shared, nn.Linear(4, 4), nn.Dropout(), shared),
        nn.Linear(4, 2),
    )
    freeze_units(model, 2)
    model.train()
    assert not model[1].training
    assert model[4].training, "the head's input"
    assert shared.training, "it runs before the head, too"
