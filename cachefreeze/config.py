"""The settings of a run: the command line, checked, with the data set's defaults filled in."""

import argparse
import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from cachefreeze.device import DEVICES, PRECISIONS
from cachefreeze.errors import UserError
from cachefreeze.schedule import SHAPES
from cachefreeze.terminal import Manner
from cachefreeze.tiers import TIERS

ARCHITECTURES = ("wrn", "densenet", "vgg")
CODECS = ("raw", "lz4", "zstd", "int8", "auto")
POLICIES = ("planned", "eager")
DATASETS = ("digits", "cifar10", "cifar100", "imagefolder")

# What `--arch` means without sizes, and how long to train, by data set. CIFAR: the networks,
# epochs and batch size of the FreezeOut paper and its authors' code.
_SMALL = {"wrn": (16, 2), "densenet": (22, 12), "vgg": (11, None)}
_PAPER = {"wrn": (40, 4), "densenet": (76, 12), "vgg": (16, None)}
_MEDIUM = {"wrn": (16, 4), "densenet": (40, 12), "vgg": (16, None)}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"sizes": _SMALL, "epochs": 12, "batch_size": 64, "image_size": 32},
    "cifar10": {"sizes": _PAPER, "epochs": 100, "batch_size": 50, "image_size": 32},
    "cifar100": {"sizes": _PAPER, "epochs": 100, "batch_size": 50, "image_size": 32},
    "imagefolder": {"sizes": _MEDIUM, "epochs": 30, "batch_size": 64, "image_size": 64},
}
MOST_WORKERS = 8
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
# Below, nothing is left to pool over at the network's end.
_SMALLEST_IMAGE = {"wrn": 8, "densenet": 8, "vgg": 32}


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run. `args.json` holds these fields."""

    arch: str
    depth: int | None  # of our own networks only
    width: int | None  # wrn only
    growth_rate: int | None  # densenet only
    bottleneck: bool
    dropout: float
    weights: str | None
    freeze_first: str | int | None
    dataset: str
    data_dir: Path
    image_size: int
    val_fraction: float | None
    augment: bool
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    freeze: bool
    t0: float
    schedule: str
    scale_lr: bool
    cache: bool
    cache_dir: Path
    cache_max_gb: float | None
    cache_policy: str
    cache_codec: str
    cache_dtype: str
    cache_tier: str
    device_cache_gb: float | None
    keep_cache: bool
    plan: bool
    rows: tuple[int, int] | None  # with plan only
    classes: int | None  # with plan only
    seed: int
    device: str
    precision: str
    tf32: bool
    deterministic: bool
    compile: bool
    workers: int
    checkpoint_every: int | None
    verify_cache: bool
    report: bool
    tensorboard: bool
    output_dir: Path

    @property
    def network(self) -> str:
        """The network's name with its sizes, such as wrn16_2 or torchvision:resnet18."""
        if self.library is not None:
            return self.arch
        second = {"wrn": self.width, "densenet": self.growth_rate}.get(self.arch)
        return f"{self.arch}{self.depth}" + (f"_{second}" if second is not None else "")

    @property
    def library(self) -> str | None:
        """Whose network it is, if it is none of ours."""
        return self.arch.rpartition(":")[0] or None

    @property
    def model_name(self) -> str:
        """The network's name in that library."""
        return self.arch.rpartition(":")[2]

    @property
    def stored(self) -> str | None:
        """What activations are stored as instead of their own type, at a loss of precision."""
        if self.cache_codec == "int8":
            return "int8"
        return "bfloat16" if self.cache_dtype == "bf16" else None

    @property
    def codec(self) -> str:
        """How the bytes of stores are encoded."""
        return "raw" if self.cache_codec == "int8" else self.cache_codec

    @property
    def device_cache_bytes(self) -> float | None:
        """Of the device's memory that rows may take, if that is said."""
        return None if self.device_cache_gb is None else self.device_cache_gb * 1e9

    def network_sizes(self) -> dict[str, Any]:
        """What `models.build` takes besides the architecture and the number of classes."""
        names = ("depth", "width", "growth_rate", "bottleneck", "dropout", "image_size")
        return {name: getattr(self, name) for name in names}

    def as_json(self) -> dict[str, Any]:
        """Names and plain values."""
        fields = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}


def split_resume(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """What a command line says to resume, and its other words."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume")
    known, others = parser.parse_known_args(list(argv))
    return known.resume, others


def split_output_dir(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The folder that a command line names, and its other words: a run's folder is its own."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output-dir", type=Path)
    known, others = parser.parse_known_args(list(argv))
    return known.output_dir, others


def split_manner(argv: Sequence[str]) -> tuple[Manner, list[str]]:
    """How much a command line wants to be told, and its other words: that is of a terminal, and a
    run that goes on may have another one."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    _add_manner(parser)
    known, others = parser.parse_known_args(list(argv))
    return Manner(lines=not known.quiet, bars=known.progress and not known.quiet), others


def _add_manner(parser: argparse._ActionsContainer) -> None:
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parse(argv: Sequence[str] | None = None) -> Settings:
    """The settings that a command line asks for.

    Raises:
        UserError: an option that does not exist, or a value that makes no sense.
    """
    args = options().parse_args(argv)
    arch, depth, second = _parse_arch(args.arch)
    defaults = _DEFAULTS[args.dataset]
    if arch in ARCHITECTURES:
        default_depth, default_second = defaults["sizes"][arch]
        depth = _only_one("--depth", args.depth, depth, default_depth)
    width = growth_rate = None
    if arch == "wrn":
        width = _only_one("--width", args.width, second, default_second)
    elif arch == "densenet":
        growth_rate = _only_one("--growth-rate", args.growth_rate, second, default_second)
    elif second is not None:
        raise UserError(f"--arch {args.arch}: a VGG has a depth only, as in vgg16")
    _refuse_what_does_not_apply(args, arch)
    if args.augment and args.cache:
        raise UserError(
            "--augment and --cache exclude each other: augmented pixels are new in every epoch, "
            "so there is nothing to keep"
        )
    settings = Settings(
        arch=arch,
        depth=depth,
        width=width,
        growth_rate=growth_rate,
        bottleneck=args.bottleneck,
        dropout=(0.5 if arch == "vgg" else 0.0) if args.dropout is None else args.dropout,
        weights=args.weights,
        freeze_first=_unit_or_number(args.freeze_first),
        dataset=args.dataset,
        data_dir=args.data_dir or Path("data"),
        image_size=defaults["image_size"] if args.image_size is None else args.image_size,
        val_fraction=args.val_fraction,
        augment=args.augment,
        epochs=defaults["epochs"] if args.epochs is None else args.epochs,
        batch_size=defaults["batch_size"] if args.batch_size is None else args.batch_size,
        lr=(0.1 if args.weights is None else 0.01) if args.lr is None else args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        freeze=args.freeze and (args.freeze_first is None or args.schedule is not None),
        t0=0.8 if args.t0 is None else args.t0,
        schedule=args.schedule or "cubic",
        scale_lr=args.scale_lr,
        cache=not args.augment if args.cache is None else args.cache,
        cache_dir=args.cache_dir,
        cache_max_gb=args.cache_max_gb,
        cache_policy=args.cache_policy,
        cache_codec=args.cache_codec,
        cache_dtype=args.cache_dtype,
        cache_tier=args.cache_tier,
        device_cache_gb=args.device_cache_gb,
        keep_cache=args.keep_cache,
        plan=args.plan,
        rows=None if args.rows is None else tuple(args.rows),
        classes=args.classes,
        seed=args.seed,
        device=args.device,
        precision=args.precision,
        tf32=args.tf32,
        deterministic=args.deterministic,
        compile=args.compile,
        workers=_workers() if args.workers is None else args.workers,
        checkpoint_every=args.checkpoint_every,
        verify_cache=args.verify_cache,
        report=args.report,
        tensorboard=args.tensorboard,
        output_dir=args.output_dir
        or _new_output_dir(f"{args.arch.rpartition(':')[2]}-{args.dataset}"),
    )
    _check(settings)
    return settings


def _parse_arch(text: str) -> tuple[str, int | None, int | None]:
    """`wrn40_4` is wrn, 40, 4; sizes may be left out."""
    if re.fullmatch(r"(torchvision|timm):[\w.-]+", text):
        return text, None, None
    match = re.fullmatch(r"([a-z]+)(\d+)?(?:_(\d+))?", text.lower())
    if match is None or match[1] not in ARCHITECTURES:
        raise UserError(
            f"--arch {text} is not known: choose wrn, densenet or vgg, with sizes if you like "
            "(wrn40_4, densenet76_12, vgg16), or torchvision:NAME or timm:NAME"
        )
    depth, second = (int(size) if size else None for size in match.groups()[1:])
    return match[1], depth, second


def _unit_or_number(text: str | None) -> str | int | None:
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else text


def _only_one(option: str, given: int | None, spelled: int | None, default: int) -> int:
    if given is not None and spelled is not None and given != spelled:
        raise UserError(f"{option} {given} contradicts the {spelled} in --arch: give one of them")
    return next(value for value in (given, spelled, default) if value is not None)


def _refuse_what_does_not_apply(args: argparse.Namespace, arch: str) -> None:
    """An option that would do nothing is a mistake that nobody would notice."""
    for option, given, applies, to in (
        ("--depth", args.depth is not None, arch in ARCHITECTURES, "wrn, densenet and vgg"),
        ("--dropout", args.dropout is not None, arch in ARCHITECTURES, "wrn, densenet and vgg"),
        ("--width", args.width is not None, arch == "wrn", "wrn"),
        ("--growth-rate", args.growth_rate is not None, arch == "densenet", "densenet"),
        ("--no-bottleneck", not args.bottleneck, arch == "densenet", "densenet"),
        ("--data-dir", args.data_dir is not None, args.dataset != "digits", "other data sets"),
        ("--image-size", args.image_size is not None, args.dataset == "imagefolder", "imagefolder"),
        (
            "--val-fraction",
            args.val_fraction is not None,
            args.dataset == "imagefolder",
            "imagefolder",
        ),
    ):
        if given and not applies:
            raise UserError(f"{option} is for {to} only: leave it out, or choose {to}")
    if args.t0 is not None and args.freeze_first is not None and args.schedule is None:
        raise UserError(
            "--t0 is for units that freeze by FreezeOut: with --freeze-first the others train to "
            "the end, unless --schedule is given too"
        )
    if args.schedule is not None and not args.freeze and args.freeze_first is not None:
        raise UserError(
            "--schedule asks for FreezeOut and --no-freeze for none: leave out one of them"
        )
    if args.keep_cache and (args.cache is False or args.augment):
        raise UserError("--keep-cache keeps what a cache holds: leave out --no-cache and --augment")
    if (args.rows is None) != (args.classes is None) or (args.rows and not args.plan):
        raise UserError(
            "--rows and --classes describe a data set that is not there, for --plan: give all three"
        )
    if args.rows is not None and args.dataset != "imagefolder":
        raise UserError(f"the size of {args.dataset} is known: leave out --rows and --classes")
    if args.dataset == "imagefolder" and args.data_dir is None and args.rows is None:
        raise UserError(
            "--dataset imagefolder needs --data-dir: a folder with one sub-folder of images a class"
        )
    if args.cache_codec == "int8" and args.cache_dtype == "bf16":
        raise UserError("--cache-codec int8 and --cache-dtype bf16 exclude each other: give one")
    if args.verify_cache and (args.cache_codec == "int8" or args.cache_dtype == "bf16"):
        raise UserError(
            "--verify-cache compares bits, and --cache-codec int8 and --cache-dtype bf16 lose some "
            "of them: leave out one"
        )
    if args.tf32 and args.precision == "bf16":
        raise UserError("--tf32 is about float32: leave it out, or give --precision fp32")
    if args.plan and (args.cache is False or args.augment):
        raise UserError("--plan shows what the cache would do: leave out --no-cache and --augment")


def _check(settings: Settings) -> None:
    smallest = _SMALLEST_IMAGE.get(settings.arch, 8)
    limits: list[tuple[str, Any, bool, str]] = [
        ("--t0", settings.t0, 0 < settings.t0 <= 1, "above 0 and at most 1"),
        ("--epochs", settings.epochs, settings.epochs >= 1, "1 or more"),
        ("--batch-size", settings.batch_size, settings.batch_size >= 1, "1 or more"),
        ("--lr", settings.lr, 0 < settings.lr < float("inf"), "above 0"),
        ("--momentum", settings.momentum, 0 <= settings.momentum < 1, "at least 0 and below 1"),
        ("--weight-decay", settings.weight_decay, settings.weight_decay >= 0, "0 or more"),
        ("--dropout", settings.dropout, 0 <= settings.dropout < 1, "at least 0 and below 1"),
        ("--seed", settings.seed, 0 <= settings.seed < 2**63, "0 or more, and below 2^63"),
        ("--workers", settings.workers, settings.workers >= 0, "0 or more"),
        (
            "--image-size",
            settings.image_size,
            settings.image_size >= smallest,
            f"{smallest} or more with {settings.arch}",
        ),
        (
            "--val-fraction",
            settings.val_fraction,
            settings.val_fraction is None or 0 < settings.val_fraction < 1,
            "between 0 and 1",
        ),
        (
            "--cache-max-gb",
            settings.cache_max_gb,
            settings.cache_max_gb is None or settings.cache_max_gb >= 0,
            "0 or more",
        ),
        (
            "--device-cache-gb",
            settings.device_cache_gb,
            settings.device_cache_gb is None or settings.device_cache_gb >= 0,
            "0 or more",
        ),
        (
            "--checkpoint-every",
            settings.checkpoint_every,
            settings.checkpoint_every is None or settings.checkpoint_every >= 1,
            "1 or more",
        ),
        ("--rows", settings.rows, min(settings.rows or (1,)) >= 1, "1 or more of each"),
        ("--classes", settings.classes, (settings.classes or 2) >= 2, "2 or more"),
    ]
    for option, value, fits, condition in limits:
        if not fits:
            raise UserError(f"{option} {value} does not make sense: it must be {condition}")


def _new_output_dir(name: str) -> Path:
    """runs/DATE-TIME-NAME, with a number when that is taken."""
    base = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    candidates = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in range(1, 1000))
    return next(path for path in candidates if not path.exists())


def _workers() -> int:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    return min(processors, MOST_WORKERS)


def options() -> argparse.ArgumentParser:
    """All options of the program, in groups by topic."""
    width = max(len(theirs) for theirs, _ in FREEZEOUT)
    names = "\n".join(f"  {theirs:<{width}}  {ours}" for theirs, ours in FREEZEOUT)
    parser = _Parser(
        prog="python -m cachefreeze.train",
        usage="%(prog)s [options]",
        description="Train with FreezeOut, the frozen prefix's activations served from a cache.",
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
        "data set decides; torchvision:NAME and timm:NAME are their networks",
    )
    group.add_argument(
        "--weights",
        metavar="DEFAULT|NAME|FILE",
        help="start from weights that were trained before: those of torchvision or timm by name, a "
        "state dict, or a checkpoint of a run; the head is new if the classes are",
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
        help="--no-cache is FreezeOut as published (default: on, but for --augment)",
    )
    group.add_argument(
        "--cache-dir",
        type=Path,
        default=Path("data/cache"),
        metavar="FOLDER",
        help="where activations are stored",
    )
    group.add_argument(
        "--cache-max-gb",
        type=float,
        metavar="GB",
        help="what the folder may take, in GB (default: 80%% of the free disk)",
    )
    group.add_argument(
        "--cache-policy",
        choices=POLICIES,
        default="planned",
        help="planned keeps what is predicted to save time; eager keeps whatever freezes",
    )
    group.add_argument(
        "--cache-codec",
        choices=CODECS,
        default="raw",
        help="lz4 and zstd take less disk and serve rows from memory; auto is raw, and one of them "
        "where raw does not fit and it still pays; int8 loses precision",
    )
    group.add_argument(
        "--cache-dtype",
        choices=("own", "bf16"),
        default="own",
        help="bf16 halves what fp32 activations take, and loses precision",
    )
    group.add_argument(
        "--cache-tier",
        choices=("auto", *TIERS),
        default="auto",
        help="where the rows in use are held: auto is the GPU's memory if they fit there, else the "
        "host's, else the disk; without a GPU the disk (which is memory while there is some free)",
    )
    group.add_argument(
        "--device-cache-gb",
        type=float,
        metavar="GB",
        help="of the device's memory that rows may take (default: 60%% of what is free beside a "
        "training step)",
    )
    group.add_argument(
        "--keep-cache",
        action="store_true",
        help="keep this run's stores for later runs, also those of units that freeze in its course",
    )
    group.add_argument(
        "--verify-cache",
        action="store_true",
        help="compute a batch of rows of each split anew in every epoch, and stop if they differ "
        "from those that the cache serves",
    )

    group = parser.add_argument_group("a look ahead")
    group.add_argument(
        "--plan",
        action="store_true",
        help="measure, print what would be kept and what that would bring, and stop",
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
        name: ", ".join(f"{values[name]} for {data_set}" for data_set, values in _DEFAULTS.items())
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
        help="save every N steps too (default: after every epoch, and when interrupted)",
    )
    group.add_argument(
        "--resume",
        metavar="RUN_DIR|auto",
        help="go on with a run and its settings; auto: with the newest one of these settings that "
        "has not come to its end (or with the one in --output-dir), else start one",
    )

    group = parser.add_argument_group("what is told on the terminal")
    _add_manner(group)
    return parser
