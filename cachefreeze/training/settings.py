"""The settings of a run. Each is described once, with its option, help, default and limits."""

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cachefreeze.errors import UserError
from cachefreeze.plan.views import count_views
from cachefreeze.training.options import (
    filled,
    option,
    option_of,
    refuse_senseless,
    refuse_views,
    views_from,
)

ARCHITECTURES = ("wrn", "densenet", "vgg")
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
# Below, nothing is left to pool over at the network's end.
_SMALLEST_IMAGE = {"wrn": 8, "densenet": 8, "vgg": 32}
_MOST_WORKERS = 8
_COUNT = (lambda count: count >= 1, "1 or more")


def _of_data_set(name: str) -> dict[str, Any]:
    told = ", ".join(f"{values[name]} for {data_set}" for data_set, values in DEFAULTS.items())
    return {"default": lambda run: DEFAULTS[run["dataset"]][name], "told": told}


def _size(place: int, *architectures: str) -> dict[str, Any]:
    """Returns the default of one of the sizes of our own networks."""

    def default(run: dict[str, Any]) -> int | None:
        sizes: dict[str, tuple[int, int | None]] = DEFAULTS[run["dataset"]]["sizes"]
        return sizes[run["arch"]][place] if run["arch"] in architectures else None

    return {"default": default, "only": architectures}


def _unit_or_number(text: str) -> str | int:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _workers(_: dict[str, Any]) -> int:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    return min(processors, _MOST_WORKERS)


def _new_output_dir(run: dict[str, Any]) -> Path:
    """Returns the path runs/DATE-TIME-ARCH-DATASET, with a number if that is taken."""
    name = f"{Path(run['arch'].rpartition(':')[2]).name}-{run['dataset']}"
    return new_folder("runs", f"-{name}")


def new_folder(parent: str, ending: str = "") -> Path:
    """Returns the path PARENT/DATE-TIME with an ending, and with a number if that is taken."""
    base = Path(parent) / f"{datetime.now():%Y%m%d-%H%M%S}{ending}"
    candidates = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in range(1, 1000))
    return next(path for path in candidates if not path.exists())


def network_name(arch: str, sizes: Mapping[str, Any]) -> str:
    """Returns the name of a network with its sizes, such as wrn16_2 or torchvision:resnet18.

    Args:
        arch: Name of the network without its sizes.
        sizes: Settings of a run, or those among them that are sizes.
    """
    if ":" in arch:
        return arch
    second = {"wrn": "width", "densenet": "growth_rate"}.get(arch)
    size = None if second is None else sizes.get(second)
    return f"{arch}{sizes.get('depth')}" + (f"_{size}" if size is not None else "")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run. `args.json` holds these fields."""

    arch: str = option("--model", group="network", default="wrn", metavar="NAME")
    """network to train: wrn, densenet or vgg, with sizes (wrn40_4) or with the default sizes
    for the data set; or one of another library: torchvision:NAME, timm:NAME, or hf:NAME for
    transformers"""
    weights: str | None = option(metavar="DEFAULT|NAME|FILE")
    """start from trained weights: a name of weights in torchvision, timm or transformers, a
    file with a state dict, or a checkpoint of a run; if the classes differ, the head is new"""
    freeze_first: str | int | None = option(metavar="UNIT|N", type=_unit_or_number)
    """freeze all units up to and including UNIT, or the first N units (-N: all but the last N),
    before the first step; the other units train to the end, or freeze by FreezeOut if
    --schedule is given"""
    depth: int | None = option("-L", **_size(0, *ARCHITECTURES))
    """number of layers (6n+4 for wrn and densenet)"""
    width: int | None = option(**_size(1, "wrn"))
    """widening factor of a wrn"""
    growth_rate: int | None = option("-k", **_size(1, "densenet"))
    """number of channels that each dense layer of a densenet adds"""
    bottleneck: bool = option(default=True, only=("densenet",))
    """make a densenet a DenseNet-BC; --no-bottleneck makes it the plain DenseNet"""
    dropout: float = option(
        default=lambda run: 0.5 if run["arch"] == "vgg" else 0.0,
        told="0; for a vgg 0.5",
        limits=(lambda share: 0 <= share < 1, "at least 0 and below 1"),
        only=ARCHITECTURES,
        metavar="P",
    )
    """dropout probability in blocks, or in the head of a vgg"""

    dataset: str = option(group="data", default="digits", choices=tuple(DEFAULTS))
    """data set to train on; imagefolder is a folder with a sub-folder of images for each class"""
    data_dir: Path = option(
        default=Path("data"), only=("cifar10", "cifar100", "imagefolder"), free=True
    )
    """folder of the images for an imagefolder; for cifar, the folder that has the data set or that
    it is downloaded to"""
    image_size: int = option(
        default=lambda run: DEFAULTS[run["dataset"]]["image_size"], told="64", only=("imagefolder",)
    )
    """height and width that images of an imagefolder are resized and cropped to"""
    val_fraction: float | None = option(
        limits=(lambda share: 0 < share < 1, "between 0 and 1"),
        only=("imagefolder",),
        metavar="SHARE",
    )
    """share of each class to use for validation, if an imagefolder has no val or test folder"""
    skip_broken: bool = option(default=False, only=("imagefolder",))
    """leave out images of an imagefolder that cannot be decoded, and name them"""
    augment: bool = option(default=False)
    """crop images (padded by 4 pixels) and flip them at random; this switches the cache off, unless
    --views is given"""
    views: int | str | None = option(metavar="K|flips", type=views_from)
    """with --augment: show K random views of each image, view e modulo K in epoch e, so that views
    come again and can be cached; flips shows an image and its mirror image equally often"""

    t0: float = option(
        "--t_0",
        group="schedule (FreezeOut)",
        default=0.8,
        limits=(lambda t0: 0 < t0 <= 1, "above 0 and at most 1"),
        metavar="SHARE",
    )
    """share of the run after which the first unit freezes, before --schedule is applied: with
    cubic, 0.8 means after 0.8^3 = 51% of the run"""
    schedule: str = option("--how_scale", default="cubic", choices=("linear", "squared", "cubic"))
    """function that spreads the freezes of the other units between that of the first unit and the
    end of the run"""
    scale_lr: bool = option(default=True, hidden={"--scale_lr": True, "--no_scale": False})
    """divide each unit's initial learning rate by the share of the run for which it trains"""
    freeze: bool = option(default=True)
    """freeze units; --no-freeze trains all of them to the end on one cosine, as a baseline"""

    cache: bool = option(
        group="cache",
        default=lambda run: not run["augment"] or run["views"] is not None,
        told="on; off with --augment without --views",
        free=True,
    )
    """cache the outputs of frozen units; with --no-cache frozen units run in every step, as in
    the FreezeOut paper"""
    cache_dir: Path = option(default=Path("data/cache"), free=True)
    """folder for cached outputs; later runs find them there"""
    cache_max_gb: float | None = option(
        told="half of the free disk",
        limits=(lambda size: 0 < size < float("inf"), "above 0 (or give --no-cache)"),
        free=True,
        metavar="GB",
    )
    """largest size of the folder --cache-dir, in GB (10^9 bytes)"""
    cache_codec: str = option(default="raw", free=True, choices=("raw", "zstd"))
    """format of cached outputs on the disk: zstd takes half of the space after a ReLU and nine
    tenths elsewhere, and more time if rows do not fit into memory; the bits are the same"""

    plan: bool = option(group="preview", default=False)
    """measure some steps, print when units freeze and how long the run would take with the
    cache and without, and stop"""
    rows: tuple[int, int] | None = option(
        limits=(lambda counts: min(counts) >= 1, "1 or more of each"),
        type=int,
        nargs=2,
        metavar=("TRAIN", "VAL"),
    )
    """with --plan, if the imagefolder does not exist yet: numbers of its training and validation
    images"""
    classes: int | None = option(limits=(lambda count: count >= 2, "2 or more"))
    """with --plan, if the imagefolder does not exist yet: number of its classes"""

    epochs: int = option(group="training", limits=_COUNT, **_of_data_set("epochs"))
    """number of passes over the data"""
    batch_size: int = option("-b", "--batch_size", limits=_COUNT, **_of_data_set("batch_size"))
    """number of images in a step; under torchrun, in all processes together"""
    lr: float = option(
        default=lambda run: 0.1 if run["weights"] is None else 0.01,
        told="0.1; 0.01 with --weights",
        limits=(lambda rate: 0 < rate < float("inf"), "above 0"),
        metavar="RATE",
    )
    """base learning rate of SGD"""
    momentum: float = option(
        default=0.9,
        limits=(lambda momentum: 0 <= momentum < 1, "at least 0 and below 1"),
        metavar="M",
    )
    """Nesterov momentum of SGD"""
    weight_decay: float = option(
        default=1e-4, limits=(lambda decay: decay >= 0, "0 or more"), metavar="W"
    )
    """weight decay of SGD"""
    seed: int = option(
        default=0, limits=(lambda seed: 0 <= seed < 2**63, "0 or more, and below 2^63")
    )
    """seed of weights, dropout and row order"""
    device: str = option(default="auto", choices=("auto", "cpu", "cuda", "mps"))
    """device to train on; auto is the fastest of this machine"""
    precision: str = option(default="auto", choices=("auto", "fp32", "bf16"))
    """precision of the arithmetic; auto is bf16 autocast where the hardware multiplies bf16
    natively, and fp32 elsewhere"""
    tf32: bool = option(default=False)
    """on CUDA with fp32: multiply with 10 bits of mantissa (TensorFloat-32)"""
    deterministic: bool = option(default=False)
    """on CUDA: use only algorithms that give the same bits every time, so that runs with the
    cache and without agree; torch warns of operations that have none (a CPU always uses such
    algorithms)"""
    compile: bool = option(default=False)
    """compile every unit that trains (torch.compile); frozen units run uncompiled"""
    workers: int = option(
        "-j",
        default=_workers,
        told=f"number of processors, at most {_MOST_WORKERS}",
        limits=(lambda count: count >= 0, "0 or more"),
        free=True,
    )
    """number of processes that decode images of an imagefolder; under torchrun, for all processes
    of a machine together"""

    tensorboard: bool = option(group="files of a run, and resuming it", default=False, free=True)
    """write metrics for TensorBoard, too, into tensorboard/ in the run's folder"""
    output_dir: Path = option(
        default=_new_output_dir, told="runs/DATE-TIME-ARCH-DATASET", free=True
    )
    """folder of this run"""
    report: bool = option(default=True, free=True)
    """draw the run's report.html when it is finished"""
    checkpoint_every: int | None = option(
        told="at ends of epochs, as often as 1% of the time allows, but at least every five "
        "minutes; and when interrupted",
        limits=_COUNT,
        free=True,
    )
    """save a checkpoint every N steps, too"""

    @property
    def network(self) -> str:
        """Name of the network with its sizes, such as wrn16_2 or torchvision:resnet18."""
        return network_name(self.arch, vars(self))

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
        """Largest size of the cache folder in bytes, or None if no limit was given."""
        return None if self.cache_max_gb is None else int(self.cache_max_gb * 1e9)

    @property
    def views_of_a_row(self) -> int:
        """Number of views of each image that come again."""
        return count_views(self.views)

    def network_sizes(self) -> dict[str, Any]:
        """Returns arguments of `models.build`: all but the architecture, classes and weights."""
        names = ("depth", "width", "growth_rate", "bottleneck", "dropout", "image_size")
        return {name: getattr(self, name) for name in names}

    def as_json(self) -> dict[str, Any]:
        """Returns the settings as a dict of plain values."""
        fields = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}


def settings_of(given: dict[str, Any]) -> Settings:
    """Returns the settings of a run from what was given on the command line.

    Args:
        given: Values that were given, by the name of the setting.

    Raises:
        UserError: A value makes no sense, or two of them contradict each other.
    """
    if "arch" in given:
        given = given | _parse_arch(given["arch"], given)
    run = filled(Settings, given)
    _refuse_what_does_not_apply(run, given)
    run["freeze"] = run["freeze"] and (run["freeze_first"] is None or "schedule" in given)
    run["rows"] = None if run["rows"] is None else tuple(run["rows"])
    refuse_senseless(Settings, run)
    smallest = _SMALLEST_IMAGE.get(run["arch"], 8)
    if run["image_size"] < smallest:
        raise UserError(
            f"--image-size {run['image_size']} does not make sense: it must be {smallest} or more "
            f"with {run['arch']}"
        )
    return Settings(**run)


def _parse_arch(text: str, given: dict[str, Any]) -> dict[str, Any]:
    """Splits a name such as `wrn40_4` into the settings wrn, 40 and 4. Sizes may be left out."""
    if re.fullmatch(r"(torchvision|timm):[\w.-]+|hf:[\w./~-]+", text):
        return {"arch": text}
    match = re.fullmatch(r"([a-z]+)(\d+)?(?:_(\d+))?", text.lower())
    if match is None or match[1] not in ARCHITECTURES:
        # Here, where nobody waits for the import of the libraries any more.
        from cachefreeze.models import meant_network

        meant = meant_network(text, ARCHITECTURES)
        if meant is not None:
            raise UserError(f"--arch {text} is not known: did you mean {meant}?")
        raise UserError(
            f"--arch {text} is not known: choose wrn, densenet or vgg, with sizes if you like "
            "(wrn40_4, densenet76_12, vgg16), or torchvision:NAME, timm:NAME or hf:NAME"
        )
    second = {"wrn": "width", "densenet": "growth_rate"}.get(match[1])
    if second is None and match[3]:
        raise UserError(f"--arch {text}: a VGG has a depth only, as in vgg16")
    found: dict[str, Any] = {"arch": match[1]}
    for name, size in (("depth", match[2]), (second, match[3])):
        if name is not None and size:
            found[name] = int(size)
            if given.get(name, found[name]) != found[name]:
                raise UserError(
                    f"{option_of(name)} {given[name]} contradicts the {size} in --arch: give one "
                    "of them"
                )
    return found


def _refuse_what_does_not_apply(run: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuses options that would do nothing: nobody would notice the mistake."""
    for one in dataclasses.fields(Settings):
        only = one.metadata["only"]
        if only and one.name in given and not {run["arch"], run["dataset"]} & set(only):
            names = " or ".join(only)
            raise UserError(
                f"{option_of(one.name)} is for {names} only: leave it out, or choose {names}"
            )
    views = run["views"]
    refuse_views(views)
    if views is not None and not run["augment"]:
        raise UserError("--views needs --augment: give --augment too, or leave out --views")
    if run["augment"] and views is None and given.get("cache"):
        raise UserError(
            "--augment and --cache exclude each other: augmented pixels are new in every epoch, "
            "so there is nothing to keep; give --views K, so that K views of each image come again"
        )
    if "t0" in given and "freeze_first" in given and "schedule" not in given:
        raise UserError(
            "--t0 is for units that freeze by FreezeOut, and with --freeze-first the others train "
            "to the end: leave out --t0, or give --schedule too"
        )
    if "schedule" in given and not run["freeze"] and "freeze_first" in given:
        raise UserError(
            "--schedule is for FreezeOut, and --no-freeze trains without it: leave out one of them"
        )
    if (run["rows"] is None) != (run["classes"] is None) or (run["rows"] and not run["plan"]):
        raise UserError(
            "--rows and --classes are for --plan, and describe an imagefolder that is not there: "
            "give all three"
        )
    if run["rows"] is not None and run["dataset"] != "imagefolder":
        raise UserError(f"the size of {run['dataset']} is known: leave out --rows and --classes")
    if run["dataset"] == "imagefolder" and "data_dir" not in given and run["rows"] is None:
        raise UserError(
            "--dataset imagefolder needs --data-dir: a folder with a sub-folder of images for each "
            "class"
        )
    if run["tf32"] and run["precision"] == "bf16":
        raise UserError("--tf32 has no effect on bf16: leave it out, or give --precision fp32")
    if run["plan"] and not run["cache"]:
        raise UserError(
            "--plan shows what the cache would do: leave out --no-cache, and give --views with "
            "--augment"
        )
