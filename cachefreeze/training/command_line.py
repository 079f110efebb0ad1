"""The command line: every option, with its help."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from cachefreeze.device import DEVICES, PRECISIONS
from cachefreeze.errors import UserError
from cachefreeze.freezeout.schedule import SHAPES

ARCHITECTURES = ("wrn", "densenet", "vgg")
DATASETS = ("digits", "cifar10", "cifar100", "imagefolder")

# What `--arch` means without sizes, and how long to train, by data set. CIFAR: the networks,
# epochs and batch size of the FreezeOut paper and its authors' code.
_SMALL = {"wrn": (16, 2), "densenet": (22, 12), "vgg": (11, None)}
_PAPER = {"wrn": (40, 4), "densenet": (76, 12), "vgg": (16, None)}
_MEDIUM = {"wrn": (16, 4), "densenet": (40, 12), "vgg": (16, None)}
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"sizes": _SMALL, "epochs": 12, "batch_size": 64, "image_size": 32},
    "cifar10": {"sizes": _PAPER, "epochs": 100, "batch_size": 50, "image_size": 32},
    "cifar100": {"sizes": _PAPER, "epochs": 100, "batch_size": 50, "image_size": 32},
    "imagefolder": {"sizes": _MEDIUM, "epochs": 30, "batch_size": 64, "image_size": 64},
}
MOST_WORKERS = 8
# Options of earlier versions, and what to do in their place.
GONE = {
    "--cache-policy": "rows are kept whenever units freeze and enough of the run is left",
    "--cache-dtype": "rows are kept in their own type; --precision bf16 halves them",
    "--cache-tier": "rows are read through the system's page cache, which is memory while there "
    "is some free",
    "--device-cache-gb": "rows lie in --cache-dir, which --cache-max-gb bounds",
    "--keep-cache": "rows stay in --cache-dir until their room is needed",
    "--verify-cache": "rows are compared with computed ones in every run: the first batches before "
    "any is served, and samples after",
}
# The options of FreezeOut's authors (train.py of their repository), and ours.
FREEZEOUT = (
    ("-L, --depth, -k, --growth-rate, --dropout", "the same"),
    ("--epochs, --seed", "the same"),
    ("--t_0", "the same, or --t0"),
    ("--how_scale", "the same, or --schedule"),
    ("--scale_lr, --no_scale", "the same, without a value; or --scale-lr, --no-scale-lr"),
    ("--batch_size", "the same, or -b, --batch-size"),
    ("--model", "the same, or --arch: densenet, wrn or vgg"),
    ("--augment, --no-augment", "the same, but off unless asked for"),
    ("--which_dataset 10, 100", "--dataset cifar10, cifar100"),
    ("--save-weights FILE", "--output-dir FOLDER"),
    ("--resume True", "--resume RUN_DIR"),
    ("--validate, --no-validate", "not there: every epoch ends with a validation"),
    ("--validate-test", "likewise; for CIFAR that is of its test set"),
    ("--const_time", "not there: give --epochs"),
)


def options() -> argparse.ArgumentParser:
    """All options of the program, in groups by topic."""
    width = max(len(theirs) for theirs, _ in FREEZEOUT)
    names = "\n".join(f"  {theirs:<{width}}  {ours}" for theirs, ours in FREEZEOUT)
    parser = Parser(
        prog="python -m cachefreeze.train",
        usage="%(prog)s [options]",
        description="Train with FreezeOut, with frozen work served from a cache.",
        epilog=f"options of FreezeOut's own code, and what they are here:\n{names}",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    flag = argparse.BooleanOptionalAction

    group = parser.add_argument_group("network")
    group.add_argument(
        "--arch",
        "--model",
        default="wrn",
        metavar="NAME",
        help="wrn, densenet or vgg; sizes may be spelled out, as in wrn40_4; without them the "
        "data set decides; torchvision:NAME, timm:NAME and hf:NAME (of transformers) are theirs",
    )
    group.add_argument(
        "--weights",
        metavar="DEFAULT|NAME|FILE",
        help="start from weights that were trained before: those of torchvision, timm or "
        "transformers by name, a state dict, or a checkpoint of a run; the head is new if the "
        "classes are",
    )
    group.add_argument(
        "--freeze-first",
        metavar="UNIT|N",
        help="freeze the network up to and with this unit, or its first N units (negative: all but "
        "N), before the first step; the others train to the end, or by FreezeOut with --schedule",
    )
    group.add_argument(
        "-L", "--depth", type=int, metavar="N", help="layers (6n+4 for wrn and densenet)"
    )
    group.add_argument("--width", type=int, metavar="N", help="widening factor of a wrn")
    group.add_argument(
        "-k",
        "--growth-rate",
        type=int,
        metavar="N",
        help="channels each dense layer of a densenet adds",
    )
    group.add_argument(
        "--bottleneck", action=flag, default=True, help="DenseNet-BC, or the plain one"
    )
    group.add_argument(
        "--dropout",
        type=float,
        metavar="P",
        help="in blocks, or in the head of a vgg (default: 0, of a vgg 0.5)",
    )

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, default="digits", help="what to train on")
    group.add_argument(
        "--data-dir",
        type=Path,
        metavar="FOLDER",
        help="the folder of an imagefolder; where cifar is, or is downloaded to (default: data)",
    )
    group.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="imagefolder: images become squares of this (default: 64)",
    )
    group.add_argument(
        "--val-fraction",
        type=float,
        metavar="SHARE",
        help="imagefolder without a val or test folder: share of each class to validate on",
    )
    group.add_argument(
        "--augment",
        action=flag,
        default=False,
        help="random crop with 4 pixels of padding, and flip; switches the cache off",
    )

    group = parser.add_argument_group("schedule (FreezeOut)")
    group.add_argument(
        "--t0",
        "--t_0",
        type=float,
        metavar="SHARE",
        help="share of the run after which the first unit freezes, before --schedule is applied "
        "(default: 0.8)",
    )
    group.add_argument(
        "--schedule",
        "--how_scale",
        choices=tuple(SHAPES),
        help="how freezing moves on from there to the end (default: cubic)",
    )
    group.add_argument(
        "--scale-lr",
        action=flag,
        default=True,
        help="divide each unit's initial rate by its share of the run",
    )
    for theirs, action in (("--scale_lr", "store_true"), ("--no_scale", "store_false")):
        group.add_argument(
            theirs, dest="scale_lr", action=action, default=True, help=argparse.SUPPRESS
        )
    group.add_argument(
        "--freeze",
        action=flag,
        default=True,
        help="--no-freeze trains everything to the end on one cosine: the baseline",
    )

    group = parser.add_argument_group("cache")
    group.add_argument(
        "--cache",
        action=flag,
        default=None,
        help="--no-cache is FreezeOut as published: frozen units run in every step (default: on, "
        "but for --augment)",
    )
    group.add_argument(
        "--cache-dir",
        type=Path,
        default=Path("data/cache"),
        metavar="FOLDER",
        help="where activations are kept, to be found by later runs",
    )
    group.add_argument(
        "--cache-max-gb",
        type=float,
        metavar="GB",
        help="what the folder may take, in GB (default: half of the free disk)",
    )
    group.add_argument(
        "--cache-codec",
        choices=["raw", "zstd"],
        default="raw",
        help="zstd takes half of the disk after a ReLU and hardly less elsewhere, and more time "
        "where rows do not fit into memory; the bits are the same (default: raw)",
    )
    for option in GONE:
        group.add_argument(option, nargs="?", action=_Gone, help=argparse.SUPPRESS)

    group = parser.add_argument_group("a look ahead")
    group.add_argument(
        "--plan",
        action="store_true",
        help="measure some steps, print when units freeze and what the cache would bring, and stop",
    )
    group.add_argument(
        "--rows",
        type=int,
        nargs=2,
        metavar=("TRAIN", "VAL"),
        help="with --plan, for an imagefolder that is not there: how many images",
    )
    group.add_argument("--classes", type=int, metavar="N", help="likewise: how many classes")

    group = parser.add_argument_group("training")
    defaults = {
        name: ", ".join(f"{values[name]} for {data_set}" for data_set, values in DEFAULTS.items())
        for name in ("epochs", "batch_size")
    }
    group.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help=f"passes over the data (default: {defaults['epochs']})",
    )
    group.add_argument(
        "-b",
        "--batch-size",
        "--batch_size",
        type=int,
        metavar="N",
        help=f"images a step (default: {defaults['batch_size']})",
    )
    group.add_argument(
        "--lr",
        type=float,
        metavar="RATE",
        help="base learning rate of SGD (default: 0.1; 0.01 with --weights)",
    )
    group.add_argument(
        "--momentum", type=float, default=0.9, metavar="M", help="of SGD, Nesterov's"
    )
    group.add_argument("--weight-decay", type=float, default=1e-4, metavar="W", help="of SGD")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of weights, dropout and row order"
    )
    group.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto is bf16 autocast where the hardware multiplies it natively",
    )
    group.add_argument(
        "--tf32",
        action="store_true",
        help="on CUDA, where fp32 is computed: multiply with 10 bits of mantissa",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="on CUDA: only algorithms that give the same bits every time, with the cache and "
        "without; torch warns of what has none (a CPU always does so)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile every unit that trains (torch.compile); frozen ones run as they are",
    )
    group.add_argument(
        "-j",
        "--workers",
        type=int,
        metavar="N",
        help="processes that decode images of an imagefolder (default: as many as there are "
        f"processors, at most {MOST_WORKERS})",
    )

    group = parser.add_argument_group("what a run leaves, and going on with it")
    group.add_argument(
        "--tensorboard",
        action=flag,
        default=False,
        help="write scalars for TensorBoard too, into tensorboard/ of the run's folder",
    )
    group.add_argument(
        "--output-dir",
        type=Path,
        metavar="FOLDER",
        help="of this run (default: runs/DATE-TIME-ARCH-DATASET)",
    )
    group.add_argument(
        "--report",
        action=flag,
        default=True,
        help="draw the run's report.html when it has come to its end",
    )
    group.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="N",
        help="save every N steps too (default: at ends of epochs, as often as 1%% of the time "
        "allows, but at least every five minutes; and when interrupted)",
    )
    group.add_argument(
        "--resume",
        metavar="RUN_DIR|auto",
        help="go on with a run and its settings; auto: with the newest one of these settings that "
        "has not come to its end (or with the one in --output-dir), else start one",
    )

    group = parser.add_argument_group("what is told on the terminal")
    add_verbosity(group)
    return parser


def add_verbosity(parser: argparse._ActionsContainer) -> None:
    """The options that say how much is told on the terminal."""
    parser.add_argument(
        "--no-progress",
        dest="progress",
        action="store_false",
        help="lines, and no bars (nor are there any where the output is no terminal)",
    )
    parser.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        help="warnings, errors and the result only; with --plan the plan",
    )


def meaning(action: argparse.Action) -> str:
    """What an option does, and its default, unless that is to do nothing."""
    # Before Python 3.13 argparse adds this to what may be switched off.
    text = (action.help or "").removesuffix(" (default: %(default)s)").replace("%%", "%")
    default = action.default
    if isinstance(action, argparse.BooleanOptionalAction) and default is not None:
        default = "on" if default else "off"
    silent = default is None or isinstance(default, bool) or default is argparse.SUPPRESS
    return text if silent or "(default" in text else f"{text} (default: {default})"


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        return meaning(action).replace("%", "%%")


class _Gone(argparse.Action):
    """Refuses an option of earlier versions."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        option = self.option_strings[0]
        raise UserError(f"{option} is gone: {GONE[option]}; leave it out")


class Parser(argparse.ArgumentParser):
    """Raises `UserError` instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")
