"""The command line: what it means, and what it refuses."""

import argparse
import dataclasses
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cachefreeze.freezeout.schedule import SHAPES
from cachefreeze.training import command_line
from cachefreeze.training.settings import Settings
from cachefreeze.training.terminal import folded

Fails = Callable[..., str]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", ("wrn16_2", 12, 64)),
        ("--arch densenet", ("densenet22_12", 12, 64)),
        ("--arch vgg", ("vgg11", 12, 64)),
        ("--dataset cifar10", ("wrn40_4", 100, 50)),
        ("--dataset cifar100 --arch densenet", ("densenet76_12", 100, 50)),
        ("--dataset cifar10 --arch vgg", ("vgg16", 100, 50)),
        ("--arch wrn40_4", ("wrn40_4", 12, 64)),
        ("--arch hf:some/folder-1", ("hf:some/folder-1", 12, 64)),
        ("--arch wrn28 --width 10 --epochs 3 -b 7", ("wrn28_10", 3, 7)),
        ("--model densenet -L 40 -k 24 --batch_size 9", ("densenet40_24", 12, 9)),
    ],
)
def test_without_sizes_the_data_set_decides(argv: str, expected: tuple[str, int, int]) -> None:
    found = command_line.parse(argv.split())
    assert (found.network, found.epochs, found.batch_size) == expected


def test_freezeouts_own_option_names_are_accepted() -> None:
    found = command_line.parse(["--t_0", "0.5", "--how_scale", "squared", "--no_scale"])
    assert (found.t0, found.schedule, found.scale_lr) == (0.5, "squared", False)
    found = command_line.parse([])
    assert (found.t0, found.schedule, found.scale_lr) == (0.8, "cubic", True)
    assert command_line.parse(["--no-scale-lr", "--scale_lr"]).scale_lr
    assert not command_line.parse(["--scale_lr", "--no-scale-lr"]).scale_lr
    assert command_line.parse(["--model", "WRN"]).arch == "wrn"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--arch q", "--arch q is not known: choose wrn, densenet or vgg"),
        ("--arch resnet18", "--arch resnet18 is not known: did you mean torchvision:resnet18?"),
        ("--arch torchvison:ResNet18", "did you mean torchvision:resnet18?"),
        ("--arch google/vit-base", "did you mean hf:google/vit-base?"),
        ("--arch desnet22_12", "did you mean densenet22_12?"),
        ("--arch vgg16_2", "a VGG has a depth only"),
        ("--arch wrn16_2 --depth 22", "--depth 22 contradicts the 16"),
        ("--arch wrn --depth 17", "6n+4"),
        ("--arch wrn --depth 0", "depth 0"),
        ("--arch wrn16_0", "width 0"),
        ("--arch densenet --growth-rate 0", "growth rate 0"),
        ("--dataset imagefolder --data-dir x --image-size 0", "--image-size 0"),
        ("--arch densenet --width 2", "--width is for wrn only"),
        ("--image-size 48", "--image-size is for imagefolder only"),
        ("--seed 99999999999999999999", "--seed"),
        (f"--output-dir {'x' * 300}", "too long"),
        (f"--cache-dir {'x' * 300}", "too long"),
        (f"--dataset imagefolder --data-dir {'x' * 300}", "too long"),
        ("--arch vgg --depth 12", "11, 13, 16 or 19"),
        ("--t0 0", "--t0 0.0 does not make sense"),
        ("--t0 1.5", "above 0 and at most 1"),
        ("--t0 nan", "--t0 nan"),
        ("--epochs 0", "--epochs"),
        ("-b 0", "--batch-size"),
        ("--lr -1", "--lr"),
        ("--momentum 1", "--momentum"),
        ("--dropout 1", "--dropout"),
        ("--seed -1", "--seed"),
        ("-j -1", "--workers"),
        ("--val-fraction 1", "--val-fraction"),
        ("--cache-max-gb -1", "--cache-max-gb"),
        ("--dataset imagefolder --data-dir x --arch vgg --image-size 16", "32 or more with vgg"),
        ("--augment --cache", "exclude each other"),
        ("--views 2", "give --augment too"),
        ("--augment --views 0", "1 or more, or flips"),
        ("--augment --views twirls", "1 or more, or flips"),
        ("--schedule quartic", "quartic"),
        ("--epochs many", "many"),
        ("--frobnicate", "--frobnicate"),
        ("--dataset imagefolder --data-dir nowhere", "nowhere is not a folder"),
        ("--dataset imagefolder", "needs --data-dir"),
        ("--data-dir photos", "--data-dir is for cifar10 or cifar100 or imagefolder only"),
        ("--epoch 3", "unrecognized arguments: --epoch 3: did you mean --epochs?"),
        ("--no-cach", "--no-cach: did you mean --no-cache?"),
        ("--keep-cach", "unrecognized arguments: --keep-cach (see --help)"),
        ("--output-dri=x", "did you mean --output-dir?"),
        ("--dataset digit", "did you mean digits?"),
        ("--checkpoint-every 0", "--checkpoint-every 0"),
        ("--cache-max-gb 0", "or give --no-cache"),
        ("--keep-cache", "rows stay in --cache-dir until their space is needed; leave it out"),
        ("--cache-codec=int8 --epochs 3", "invalid choice: 'int8'"),
        ("--cache-dtype bf16", "--precision bf16 halves them"),
        ("--cache-policy eager", "--cache-policy is gone"),
        ("--cache-tier disk", "--cache-tier is gone"),
        ("--device-cache-gb 3", "--cache-max-gb limits"),
        ("--verify-cache", "rows are compared with computed ones in every run"),
    ],
)
def test_bad_input_gets_one_sentence_and_leaves_nothing(
    argv: str, named: str, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named in fails(*argv.split())
    assert list(tmp_path.iterdir()) == []


def test_the_page_about_options_is_what_the_script_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.setattr(sys, "argv", ["options_table.py"])
    assert runpy.run_path(str(root / "scripts" / "options_table.py"))["main"]() == 0
    page = capsys.readouterr().out
    assert page == (root / "docs" / "options.md").read_text(), (
        "python scripts/options_table.py > docs/options.md"
    )
    for action in command_line.command_line()._actions:
        if action.help != argparse.SUPPRESS and "--help" not in action.option_strings:
            assert all(f"`{name}`" in page for name in action.option_strings)


def test_help_is_in_groups_and_tells_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command_line.parse(["--help"])
    assert end.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for group in ("network:", "data:", "schedule (FreezeOut):", "cache:", "training:"):
        assert f" {group} " in text
    assert "folder for cached outputs; later runs find them there (default: data/cache)" in text
    assert "by the share of the run for which it trains (default: on)" in text
    assert "None" not in text
    assert "True)" not in text
    assert "False)" not in text


def test_help_fits_a_terminal_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        command_line.parse(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(line.endswith("-") for line in lines), "no option is broken at its hyphens"


def test_every_schedule_can_be_chosen() -> None:
    (schedule,) = (one for one in dataclasses.fields(Settings) if one.name == "schedule")
    assert schedule.metadata["argparse"]["choices"] == tuple(SHAPES)


@pytest.mark.parametrize(("theirs", "ours"), command_line.FREEZEOUT)
def test_what_help_says_of_freezeouts_options_is_so(theirs: str, ours: str) -> None:
    known = command_line.command_line()._option_string_actions
    for name in re.findall(r"--?\w[\w-]*", theirs):
        assert (name in known) == (ours.startswith("the same") or name == "--resume")
    for name in re.findall(r"--\w[\w-]*", ours):
        assert name in known


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_named(fails: Fails) -> None:
    assert "--device cuda is not available" in fails("--device", "cuda")


def test_help_mistakes_and_a_look_at_a_folder_do_without_torch() -> None:
    code = (
        "import sys\n"
        "import cachefreeze, cachefreeze.report.summary_text, cachefreeze.store.inspect\n"
        "from cachefreeze.train import main\n"
        "assert main(['--epoch', '3']) == 2\n"
        "assert 'torch' not in sys.modules, 'its import takes seconds'\n"
        "assert cachefreeze.ActivationCache.__name__ in cachefreeze.__all__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


def test_a_long_line_is_broken_below_its_text_and_a_path_is_not_broken() -> None:
    path = "x/" * 50
    told = folded(f"cache     {'some words and ' * 10}{path}")
    first, *others, last = told.splitlines()
    assert len(first) <= 80
    assert others
    assert all(line.startswith(" " * 10 + "s") or len(line) <= 80 for line in others)
    assert last == " " * 10 + path
    assert folded("a b") == "a b"
    assert folded("") == ""
