"""The settings of a run, read from the command line, with the defaults of the data set."""

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cachefreeze.errors import UserError
from cachefreeze.models import meant_network
from cachefreeze.training.command_line import (
    ARCHITECTURES,
    DEFAULTS,
    MOST_WORKERS,
    Parser,
    add_verbosity,
    options,
)
from cachefreeze.training.terminal import Verbosity

# Below, nothing is left to pool over at the network's end.
_SMALLEST_IMAGE = {"wrn": 8, "densenet": 8, "vgg": 32}


@dataclass(frozen=True)
class Settings:
    """All settings of a run. `args.json` holds these fields."""

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
    skip_broken: bool
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
    cache_codec: str
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
    report: bool
    tensorboard: bool
    output_dir: Path

    @property
    def network(self) -> str:
        """Name of the network with its sizes, such as wrn16_2 or torchvision:resnet18."""
        if self.library is not None:
            return self.arch
        second = {"wrn": self.width, "densenet": self.growth_rate}.get(self.arch)
        return f"{self.arch}{self.depth}" + (f"_{second}" if second is not None else "")

    @property
    def library(self) -> str | None:
        """Name of the library that the network comes from, or None if it is one of ours."""
        return self.arch.rpartition(":")[0] or None

    @property
    def model_name(self) -> str:
        """Name of the network in that library."""
        return self.arch.rpartition(":")[2]

    @property
    def cache_bytes(self) -> int | None:
        """Most bytes that the cache folder may take, or None if no limit was given."""
        return None if self.cache_max_gb is None else int(self.cache_max_gb * 1e9)

    def network_sizes(self) -> dict[str, Any]:
        """Returns arguments of `models.build`: all but the architecture, classes and weights."""
        names = ("depth", "width", "growth_rate", "bottleneck", "dropout", "image_size")
        return {name: getattr(self, name) for name in names}

    def as_json(self) -> dict[str, Any]:
        """Returns the settings as a dict of plain values."""
        fields = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}


def split(argv: Sequence[str]) -> tuple[argparse.Namespace, Verbosity, list[str]]:
    """Splits a command line into options of this process and settings of the run.

    Args:
        argv: Words of the command line.

    Returns:
        Values of `resume` and `output_dir`, the verbosity, and the words that are settings of the
        run.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume")
    parser.add_argument("--output-dir", type=Path)
    add_verbosity(parser)
    known, words = parser.parse_known_args(list(argv))
    return known, Verbosity(not known.quiet, known.progress and not known.quiet), words


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Reads the settings of a run from a command line.

    Args:
        argv: Words of the command line. If None, those of this process.

    Raises:
        UserError: An option does not exist, or a value makes no sense.
    """
    args = options().parse_args(argv)
    arch, depth, second = _parse_arch(args.arch)
    defaults = DEFAULTS[args.dataset]
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
    given = {name: value for name, value in vars(args).items() if value is not None}
    chosen: dict[str, Any] = {
        "dropout": 0.5 if arch == "vgg" else 0.0,
        "data_dir": Path("data"),
        "lr": 0.1 if args.weights is None else 0.01,
        "t0": 0.8,
        "schedule": "cubic",
        "cache": not args.augment,
        "workers": _workers(),
        "output_dir": _new_output_dir(f"{Path(args.arch.rpartition(':')[2]).name}-{args.dataset}"),
        **{name: defaults[name] for name in ("epochs", "batch_size", "image_size")},
        **given,
        "arch": arch,
        "depth": depth,
        "width": width,
        "growth_rate": growth_rate,
        "freeze_first": _unit_or_number(args.freeze_first),
        "freeze": args.freeze and (args.freeze_first is None or args.schedule is not None),
        "rows": None if args.rows is None else tuple(args.rows),
    }
    names = {field.name for field in dataclasses.fields(Settings)}
    values = {name: value for name, value in chosen.items() if name in names}
    settings = Settings(**{**dict.fromkeys(names), **values})
    _check(settings)
    return settings


def _parse_arch(text: str) -> tuple[str, int | None, int | None]:
    """Splits a name such as `wrn40_4` into wrn, 40 and 4. Sizes may be left out."""
    if re.fullmatch(r"(torchvision|timm):[\w.-]+|hf:[\w./~-]+", text):
        return text, None, None
    match = re.fullmatch(r"([a-z]+)(\d+)?(?:_(\d+))?", text.lower())
    if match is None or match[1] not in ARCHITECTURES:
        meant = meant_network(text, ARCHITECTURES)
        if meant is not None:
            raise UserError(f"--arch {text} is not known: did you mean {meant}?")
        raise UserError(
            f"--arch {text} is not known: choose wrn, densenet or vgg, with sizes if you like "
            "(wrn40_4, densenet76_12, vgg16), or torchvision:NAME, timm:NAME or hf:NAME"
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
    """Refuses options that would do nothing: nobody would notice the mistake."""
    for option, given, applies, to in (
        ("--depth", args.depth is not None, arch in ARCHITECTURES, "wrn, densenet and vgg"),
        ("--dropout", args.dropout is not None, arch in ARCHITECTURES, "wrn, densenet and vgg"),
        ("--width", args.width is not None, arch == "wrn", "wrn"),
        ("--growth-rate", args.growth_rate is not None, arch == "densenet", "densenet"),
        ("--no-bottleneck", not args.bottleneck, arch == "densenet", "densenet"),
        ("--data-dir", args.data_dir is not None, args.dataset != "digits", "other data sets"),
        ("--image-size", args.image_size is not None, args.dataset == "imagefolder", "imagefolder"),
        ("--skip-broken", args.skip_broken, args.dataset == "imagefolder", "imagefolder"),
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
            "--t0 is for units that freeze by FreezeOut, and with --freeze-first the others train "
            "to the end: leave it out, or give --schedule too"
        )
    if args.schedule is not None and not args.freeze and args.freeze_first is not None:
        raise UserError(
            "--schedule is for FreezeOut, and --no-freeze trains without it: leave out one of them"
        )
    if (args.rows is None) != (args.classes is None) or (args.rows and not args.plan):
        raise UserError(
            "--rows and --classes are for --plan, and describe an imagefolder that is not there: "
            "give all three"
        )
    if args.rows is not None and args.dataset != "imagefolder":
        raise UserError(f"the size of {args.dataset} is known: leave out --rows and --classes")
    if args.dataset == "imagefolder" and args.data_dir is None and args.rows is None:
        raise UserError(
            "--dataset imagefolder needs --data-dir: a folder with one sub-folder of images a class"
        )
    if args.tf32 and args.precision == "bf16":
        raise UserError("--tf32 has no effect on bf16: leave it out, or give --precision fp32")
    if args.plan and (args.cache is False or args.augment):
        raise UserError("--plan shows what the cache would do: leave out --no-cache and --augment")


def _check(settings: Settings) -> None:
    smallest = _SMALLEST_IMAGE.get(settings.arch, 8)
    limits: dict[str, tuple[Callable[[Any], bool], str]] = {
        "t0": (lambda t0: 0 < t0 <= 1, "above 0 and at most 1"),
        "epochs": (lambda count: count >= 1, "1 or more"),
        "batch_size": (lambda count: count >= 1, "1 or more"),
        "lr": (lambda rate: 0 < rate < float("inf"), "above 0"),
        "momentum": (lambda momentum: 0 <= momentum < 1, "at least 0 and below 1"),
        "weight_decay": (lambda decay: decay >= 0, "0 or more"),
        "dropout": (lambda share: 0 <= share < 1, "at least 0 and below 1"),
        "seed": (lambda seed: 0 <= seed < 2**63, "0 or more, and below 2^63"),
        "workers": (lambda count: count >= 0, "0 or more"),
        "image_size": (lambda size: size >= smallest, f"{smallest} or more with {settings.arch}"),
        "val_fraction": (lambda share: 0 < share < 1, "between 0 and 1"),
        "cache_max_gb": (lambda size: 0 < size < float("inf"), "above 0 (or give --no-cache)"),
        "checkpoint_every": (lambda count: count >= 1, "1 or more"),
        "rows": (lambda counts: min(counts) >= 1, "1 or more of each"),
        "classes": (lambda count: count >= 2, "2 or more"),
    }
    for name, (fits, condition) in limits.items():
        value = getattr(settings, name)
        if value is not None and not fits(value):
            option = option_of(name)
            raise UserError(f"{option} {value} does not make sense: it must be {condition}")


def option_of(name: str) -> str:
    """Returns the command line's name of a setting."""
    return "--" + name.replace("_", "-")


def _new_output_dir(name: str) -> Path:
    """Returns the path runs/DATE-TIME-NAME, with a number if that is taken."""
    base = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    candidates = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in range(1, 1000))
    return next(path for path in candidates if not path.exists())


def _workers() -> int:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    return min(processors, MOST_WORKERS)
