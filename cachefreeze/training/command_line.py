"""The options of the command line, with their help texts and defaults."""

import argparse
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from cachefreeze.errors import UserError
from cachefreeze.freezeout.schedule import SHAPES
from cachefreeze.training.device import DEVICES, PRECISIONS

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
    ("--validate-test", "not there: for CIFAR, every validation is on the test set"),
    ("--const_time", "not there: give --epochs"),
)


def options() -> argparse.ArgumentParser:
    """Returns a parser of all options of the program, in groups by topic."""
    width = max(len(theirs) for theirs, _ in FREEZEOUT)
    names = "\n".join(f"  {theirs:<{width}}  {ours}" for theirs, ours in FREEZEOUT)
    parser = Parser(
        prog="python -m cachefreeze.train",
        usage="%(prog)s [options]",
        description="Train a network with FreezeOut, and cache the outputs of frozen units.",
        epilog=f"options of FreezeOut's own code, and what to give here:\n{names}",
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
        help="network to train: wrn, densenet or vgg, with sizes (wrn40_4) or with the default "
        "sizes for the data set; or one of another library: torchvision:NAME, timm:NAME, or "
        "hf:NAME for transformers",
    )
    group.add_argument(
        "--weights",
        metavar="DEFAULT|NAME|FILE",
        help="start from trained weights: a name of weights in torchvision, timm or transformers, "
        "a file with a state dict, or a checkpoint of a run; for other classes the head is new",
    )
    group.add_argument(
        "--freeze-first",
        metavar="UNIT|N",
        help="freeze all units up to and including UNIT, or the first N units (-N: all but the "
        "last N), before the first step; the other units train to the end, or freeze by FreezeOut "
        "if --schedule is given",
    )
    group.add_argument(
        "-L", "--depth", type=int, metavar="N", help="number of layers (6n+4 for wrn and densenet)"
    )
    group.add_argument("--width", type=int, metavar="N", help="widening factor of a wrn")
    group.add_argument(
        "-k",
        "--growth-rate",
        type=int,
        metavar="N",
        help="number of channels that each dense layer of a densenet adds",
    )
    group.add_argument(
        "--bottleneck",
        action=flag,
        default=True,
        help="make a densenet a DenseNet-BC; --no-bottleneck makes it the plain DenseNet",
    )
    group.add_argument(
        "--dropout",
        type=float,
        metavar="P",
        help="dropout probability in blocks, or in the head of a vgg (default: 0; for a vgg 0.5)",
    )

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, default="digits", help="data set to train on")
    group.add_argument(
        "--data-dir",
        type=Path,
        metavar="FOLDER",
        help="folder of the images of an imagefolder; for cifar, the folder that it is in or "
        "downloaded to (default: data)",
    )
    group.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="height and width that images of an imagefolder are resized and cropped to (default: "
        "64)",
    )
    group.add_argument(
        "--val-fraction",
        type=float,
        metavar="SHARE",
        help="share of each class to validate on, for an imagefolder without a val or test folder",
    )
    group.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out images of an imagefolder that cannot be decoded, and name them",
    )
    group.add_argument(
        "--augment",
        action=flag,
        default=False,
        help="crop images (padded by 4 pixels) and flip them at random; this switches the cache "
        "off",
    )

    group = parser.add_argument_group("schedule (FreezeOut)")
    group.add_argument(
        "--t0",
        "--t_0",
        type=float,
        metavar="SHARE",
        help="share of the run after which the first unit freezes, before --schedule is applied: "
        "with cubic, 0.8 means after 0.8^3 = 51%% of the run (default: 0.8)",
    )
    group.add_argument(
        "--schedule",
        "--how_scale",
        choices=tuple(SHAPES),
        help="function that spreads the freezes of the other units from there to the end of the "
        "run (default: cubic)",
    )
    group.add_argument(
        "--scale-lr",
        action=flag,
        default=True,
        help="divide each unit's initial learning rate by the share of the run for which it trains",
    )
    for theirs, action in (("--scale_lr", "store_true"), ("--no_scale", "store_false")):
        group.add_argument(
            theirs, dest="scale_lr", action=action, default=True, help=argparse.SUPPRESS
        )
    group.add_argument(
        "--freeze",
        action=flag,
        default=True,
        help="freeze units; --no-freeze, the baseline, trains all of them to the end on one cosine",
    )

    group = parser.add_argument_group("cache")
    group.add_argument(
        "--cache",
        action=flag,
        default=None,
        help="cache the outputs of frozen units; with --no-cache frozen units run in every step, "
        "as in the FreezeOut paper (default: on; off with --augment)",
    )
    group.add_argument(
        "--cache-dir",
        type=Path,
        default=Path("data/cache"),
        metavar="FOLDER",
        help="folder that cached outputs are kept in; later runs find them there",
    )
    group.add_argument(
        "--cache-max-gb",
        type=float,
        metavar="GB",
        help="most GB that this folder may take (default: half of the free disk)",
    )
    group.add_argument(
        "--cache-codec",
        choices=["raw", "zstd"],
        default="raw",
        help="format of cached outputs on the disk: zstd takes half of the room after a ReLU and "
        "hardly less elsewhere, and more time where rows do not fit into memory; the bits are the "
        "same (default: raw)",
    )
    for option in GONE:
        group.add_argument(option, nargs="?", action=_Gone, help=argparse.SUPPRESS)

    group = parser.add_argument_group("preview")
    group.add_argument(
        "--plan",
        action="store_true",
        help="measure some steps, print when units freeze and how long the run would take with the "
        "cache and without, and stop",
    )
    group.add_argument(
        "--rows",
        type=int,
        nargs=2,
        metavar=("TRAIN", "VAL"),
        help="with --plan, for an imagefolder that is not there: numbers of its images",
    )
    group.add_argument(
        "--classes",
        type=int,
        metavar="N",
        help="with --plan, for an imagefolder that is not there: number of its classes",
    )

    group = parser.add_argument_group("training")
    defaults = {
        name: ", ".join(f"{values[name]} for {data_set}" for data_set, values in DEFAULTS.items())
        for name in ("epochs", "batch_size")
    }
    group.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help=f"number of passes over the data (default: {defaults['epochs']})",
    )
    group.add_argument(
        "-b",
        "--batch-size",
        "--batch_size",
        type=int,
        metavar="N",
        help=f"number of images in a step (default: {defaults['batch_size']})",
    )
    group.add_argument(
        "--lr",
        type=float,
        metavar="RATE",
        help="base learning rate of SGD (default: 0.1; 0.01 with --weights)",
    )
    group.add_argument(
        "--momentum", type=float, default=0.9, metavar="M", help="Nesterov momentum of SGD"
    )
    group.add_argument(
        "--weight-decay", type=float, default=1e-4, metavar="W", help="weight decay of SGD"
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of weights, dropout and row order"
    )
    group.add_argument(
        "--device", choices=DEVICES, default="auto", help="device to train on; auto is the fastest"
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="precision of the arithmetic; auto is bf16 autocast where the hardware multiplies "
        "bf16 natively, and fp32 elsewhere",
    )
    group.add_argument(
        "--tf32",
        action="store_true",
        help="on CUDA with fp32: multiply with 10 bits of mantissa (TensorFloat-32)",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="on CUDA: use only algorithms that give the same bits every time, so that runs with "
        "the cache and without agree; torch warns of operations that have none (a CPU always uses "
        "such algorithms)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile every unit that trains (torch.compile); frozen units run uncompiled",
    )
    group.add_argument(
        "-j",
        "--workers",
        type=int,
        metavar="N",
        help="number of processes that decode images of an imagefolder (default: number of "
        f"processors, at most {MOST_WORKERS})",
    )

    group = parser.add_argument_group("files of a run, and resuming it")
    group.add_argument(
        "--tensorboard",
        action=flag,
        default=False,
        help="write metrics for TensorBoard, too, into tensorboard/ in the run's folder",
    )
    group.add_argument(
        "--output-dir",
        type=Path,
        metavar="FOLDER",
        help="folder of this run (default: runs/DATE-TIME-ARCH-DATASET)",
    )
    group.add_argument(
        "--report",
        action=flag,
        default=True,
        help="draw the run's report.html when it is finished",
    )
    group.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="N",
        help="save a checkpoint every N steps, too (default: at ends of epochs, as often as 1%% of "
        "the time allows, but at least every five minutes; and when interrupted)",
    )
    group.add_argument(
        "--resume",
        metavar="RUN_DIR|auto",
        help="go on with the run in this folder, with its settings; auto goes on with the newest "
        "unfinished run of the given settings (or with the run in --output-dir), and starts a new "
        "one if there is none",
    )

    group = parser.add_argument_group("output on the terminal")
    add_verbosity(group)
    return parser


def add_verbosity(parser: argparse._ActionsContainer) -> None:
    """Adds the options for the output on the terminal."""
    parser.add_argument(
        "--no-progress",
        dest="progress",
        action="store_false",
        help="print lines but no bars (where the output is no terminal, there are never bars)",
    )
    parser.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        help="print warnings, errors and the result only; with --plan, the plan",
    )


def meaning(action: argparse.Action) -> str:
    """Returns the help text of an option with its default, unless the default is to do nothing."""
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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns a question that names what is closest to a word, or nothing if nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f": did you mean {close[0]}?" if close else ""


class _Gone(argparse.Action):
    """Refuses an option of earlier versions."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        option = self.option_strings[0]
        raise UserError(f"{option} is gone: {GONE[option]}; leave it out")


class Parser(argparse.ArgumentParser):
    """A parser that raises `UserError` instead of leaving the process."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Reads a command line, and names options that are close to one that is not known."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            known = [
                name
                for name, action in self._option_string_actions.items()
                if action.help != argparse.SUPPRESS
            ]
            hint = next(filter(None, (did_you_mean(one, known) for one in options)), "")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            choices = [str(one) for one in action.choices or ()]
            error.message += did_you_mean(str(value), choices)
            raise

    def error(self, message: str) -> NoReturn:
        """Raises UserError with the message of argparse."""
        raise UserError(f"{message} (see --help)")
