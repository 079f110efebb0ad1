"""What the items of a PyTorch data set depend on, and their targets without the items."""

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torchvision
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.datasets.vision import StandardTransform

from cachefreeze.fingerprint import Sources, members, plain, settings_of
from cachefreeze.hashing import tensors_sha256

# Transforms that are drawn anew for every item, beside all whose names begin with Random.
RANDOM = {
    "AugMix",
    "AutoAugment",
    "ColorJitter",
    "CutMix",
    "ElasticTransform",
    "GaussianNoise",
    "MixUp",
    "RandAugment",
    "TrivialAugmentWide",
}
# What torchvision's data sets know of targets, by attribute.
OF_TARGETS = {"targets", "labels", "_labels", "classes", "class_to_idx", "target_transform"}
# Of objects in objects: a transform that goes deeper holds itself.
MAX_DEPTH = 20


def identity_of(dataset: Any) -> str | None:
    """A hash of all that the inputs depend on: arrays by their bytes, files by their paths, sizes
    and modification times, transforms by their settings and code. Targets are not: rows are of
    inputs.

    None if that cannot be known: only the data sets of torch and torchvision say what they read.
    """
    kind = type(dataset)
    if kind is TensorDataset:
        return tensors_sha256([("", dataset.tensors[0])])
    if kind is Subset:
        inner = identity_of(dataset.dataset)
        return None if inner is None else _hash(inner, [int(i) for i in dataset.indices])
    if kind is ConcatDataset:
        parts = [identity_of(part) for part in dataset.datasets]
        return None if None in parts else _hash(*parts)
    if kind.__module__.startswith("torchvision.datasets."):
        return _of_torchvision(dataset)
    return None


def _of_torchvision(dataset: Any) -> str | None:
    found: list[object] = []
    rows = 0
    for name, value in sorted(vars(dataset).items()):
        if name in OF_TARGETS:
            continue
        if isinstance(value, StandardTransform):  # of input and target
            value = value.transform
        if isinstance(value, np.ndarray | Tensor):
            rows = max(rows, len(value))
            found.append((name, plain(value)))
        elif isinstance(value, list | tuple):
            paths = _paths(value)
            rows = max(rows, len(paths))
            rest = "" if len(paths) == len(value) else _hash(repr(value))
            found.append((name, _hash(*map(_of_file, paths)), rest))
        else:
            found.append((name, described(value)))
    if rows < len(dataset):  # what it reads is not among what it knows
        return None
    return _hash(type(dataset).__qualname__, repr(found), torchvision.__version__, PIL.__version__)


def _paths(values: Iterable[Any]) -> list[Path]:
    """Of files that are there: of a list of paths, or of tuples that begin with one."""
    firsts = [value[0] if isinstance(value, tuple) and value else value for value in values]
    return [Path(f) for f in firsts if isinstance(f, str | Path) and Path(f).is_file()]


def _of_file(path: Path) -> str:
    stat = path.stat()
    return f"{path} {stat.st_size} {stat.st_mtime_ns}"


def described(value: Any, depth: int = 0) -> object:
    """A transform, or a setting, as something whose `repr` is equal if and only if it does the same
    (see `fingerprint.plain`)."""

    def inner(value: Any) -> object:
        return described(value, depth + 1)

    if isinstance(value, list | tuple):
        return [inner(item) for item in value]
    if isinstance(value, Mapping):
        return [(inner(key), inner(item)) for key, item in value.items()]
    kind = type(value)
    if (
        depth > MAX_DEPTH
        or not callable(value)
        or inspect.isroutine(value)
        or isinstance(value, type)
    ):
        return plain(value)
    if isinstance(value, nn.Module):
        return (
            *(kind.__module__, kind.__qualname__, Sources([value]).of(value), value.extra_repr()),
            inner(settings_of(value)),  # with modules in lists, which are not its children
            tensors_sha256(value.state_dict().items()),
            [inner(child) for child in value.children()],
        )
    if kind.__module__.startswith("torchvision."):
        return kind.__module__, kind.__qualname__, inner(vars(value))
    does = [members(each) for each in kind.__mro__ if each is not object]
    return kind.__module__, kind.__qualname__, does, inner(getattr(value, "__dict__", {}))


def random_transform(dataset: Any) -> str | None:
    """The name of a transform of the data set that draws anew for every item, if there is one."""
    return next((name for name in _transforms(dataset) if _is_random(name)), None)


def _is_random(name: str) -> bool:
    return name.startswith("Random") or name in RANDOM


def _transforms(value: Any, depth: int = 0) -> Iterable[str]:
    """Class names of a data set's transforms, and of what they are made of."""
    if depth > 8:
        return
    inner: Iterable[Any] = ()
    if isinstance(value, Dataset):
        names = ("dataset", "datasets", "transform", "transforms")
        inner = [getattr(value, name) for name in names if getattr(value, name, None) is not None]
    elif isinstance(value, list | tuple | nn.ModuleList):
        inner = value
    elif value is not None and hasattr(value, "__dict__"):
        yield type(value).__name__
        inner = [each for name, each in vars(value).items() if "transform" in name]
        if isinstance(value, nn.Module):
            inner = [*inner, *value.children()]
    for each in inner:
        yield from _transforms(each, depth + 1)


def targets_of(dataset: Any) -> Any:
    """The target of every item, as a list, array or tensor, without making the items; None if they
    cannot be had so."""
    kind = type(dataset)
    if kind is TensorDataset:
        _, *others = dataset.tensors
        return others[0] if len(others) == 1 else list(zip(*others, strict=True)) or None
    if kind is Subset:
        inner = targets_of(dataset.dataset)
        return None if inner is None else [inner[int(i)] for i in dataset.indices]
    if kind is ConcatDataset:
        parts = [targets_of(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [y for part in parts for y in part]
    if not kind.__module__.startswith("torchvision.datasets."):
        return None
    for name in ("targets", "labels", "_labels"):
        found = getattr(dataset, name, None)
        if isinstance(found, list | np.ndarray | Tensor) and len(found) == len(dataset):
            change = getattr(dataset, "target_transform", None)
            try:
                return found if change is None else [change(_plain_number(each)) for each in found]
            except Exception:  # it is for something else than what is known here
                return None
    return None


def _plain_number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic | Tensor) and value.ndim == 0 else value


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=repr).encode()).hexdigest()
