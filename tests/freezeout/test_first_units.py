"""The first units of a network, by a number or a name, freeze for good."""

from typing import Any

import pytest
import torchvision
from torch import nn

from cachefreeze import UserError, units_of
from cachefreeze.freezeout import count_of, freeze_units
from cachefreeze.models import build
from tests.freezeout.networks import IMAGES, names


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
