"""A cross-section of the model table: a replayed pass has the bits of the plain one."""

import sys
import warnings
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import model_table  # noqa: E402
import zoo  # noqa: E402

NAMES = (
    "torchvision: resnet18", "torchvision: densenet121",
    "torchvision: mobilenet_v3_small", "torchvision: segmentation.lraspp_mobilenet_v3_large",
    "timm: vit_tiny_r_s16_p8_224",
    "timm: convnext_atto",
)  # fmt: skip
ENTRIES = {entry.name: entry for entry in zoo.zoo(["torchvision", "timm"])}
CASES = [name for name in NAMES if name in ENTRIES]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", CASES)
def test_a_model_of_the_table_is_exact(name, training):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = model_table.judge(ENTRIES[name], 0.7, training, 2)
    assert result.verdict in ("exact", "nothing to skip"), result.reason
    assert training or result.saved > 0.1


def test_there_are_models_to_hold_against():
    assert len(CASES) >= 5
