"""The network of a run, and the trained weights that it may start from."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cachefreeze.errors import UserError, first_line
from cachefreeze.freezeout import count_of, units_of
from cachefreeze.models import IMAGENET, Statistics, build, weights_statistics
from cachefreeze.training.checkpoint import is_checkpoint, read_saved, verified
from cachefreeze.training.settings import Settings


@dataclass(frozen=True)
class Weights:
    """Trained weights that a network starts from.

    Args:
        words: Description of the weights.
        statistics: Mean and standard deviation of the images that they were trained on. None if
            they are not known.
        state: Tensors by name, read from a file. None if the network's library loads them.
        classes: Names of the classes that they were trained on. None if they are not known.
    """

    words: str
    statistics: Statistics | None
    state: Mapping[str, Tensor] | None = None
    classes: tuple[str, ...] | None = None


def find_weights(settings: Settings) -> Weights | None:
    """Finds the trained weights that a run starts from. Nothing is downloaded yet.

    Args:
        settings: Settings of the run.

    Returns:
        Weights, or None if the network is freshly initialised.

    Raises:
        UserError: There are no such weights, or the file holds none.
    """
    named = settings.weights
    if named is None:
        return None
    path = Path(named)
    # Weights of Hugging Face are a folder, or have a name that may be that of one, too.
    if not path.exists() or (settings.library == "hf" and not path.is_file()):
        if settings.library is None:
            raise UserError(
                f"--weights {named} is not there: {settings.arch} has no weights of its own, give "
                "the file of a run (last.pt or best.pt)"
            )
        usual = weights_statistics(settings.library, settings.model_name, named)
        return Weights(f"{named} of {settings.arch}", usual)
    if not path.is_file():
        kind = "a folder: give a file in it" if path.is_dir() else "no file: give one of weights"
        raise UserError(f"--weights {named} is {kind}")
    found = read_saved(path, f"--weights {path}", "holds no weights")
    if not is_checkpoint(found):
        own = settings.library is None
        return Weights(named, None if own else IMAGENET, _state_dict(found, named))
    state = verified(found, path)
    classes, statistics = trained_on(state, f"--weights {named}")
    if not isinstance(state.get("model"), Mapping):
        raise UserError(f"--weights {named} holds no weights: give another file")
    return Weights(named, statistics, dict(state["model"]), classes)


def trained_on(state: Mapping[str, Any], what: str) -> tuple[tuple[str, ...], Statistics]:
    """Returns the classes of a checkpoint, and the mean and standard deviation of its images.

    Args:
        state: Contents of the checkpoint.
        what: Name of the checkpoint for error messages.

    Raises:
        UserError: The checkpoint does not hold them.
    """
    try:
        classes, _, _, mean, std = state["data"]["same"]
        return tuple(classes), (tuple(map(float, mean)), tuple(map(float, std)))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{what} does not say what it was trained on: use the last.pt or best.pt of a run"
        ) from error


def _state_dict(found: Any, named: str) -> dict[str, Tensor]:
    """Returns a state dict, which may lie in a dict under one of the usual names."""
    for name in ("state_dict", "model", "model_state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    tensors = isinstance(found, Mapping) and all(isinstance(v, Tensor) for v in found.values())
    if not found or not tensors:
        raise UserError(f"--weights {named} holds no state dict: save model.state_dict()")
    return {_plain_name(str(name)): tensor for name, tensor in found.items()}


def _plain_name(name: str) -> str:
    """Returns the name of a parameter as its network has it now.

    DistributedDataParallel and torch.compile put words before it, and torchvision's DenseNets were
    saved with `norm.1` for `norm1`.
    """
    while name.startswith(("module.", "_orig_mod.")):
        name = name.partition(".")[2]
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)", r"\1\2", name)


def make_network(
    settings: Settings, classes: Sequence[str], weights: Weights | None = None
) -> tuple[nn.Module, list[str]]:
    """Builds the network of a run.

    Args:
        settings: Settings of the run.
        classes: Names of the classes.
        weights: Weights that the network starts from. If None, it is freshly initialised.

    Returns:
        Network, and the names of the parameters that are new although it starts from weights: those
        of a head for other classes.

    Raises:
        UserError: The network cannot have such sizes, or the weights do not fit it.
    """
    model = _build(settings, len(classes))
    new: list[str] = []
    if weights is not None and weights.state is not None:
        same = weights.classes is None or tuple(weights.classes) == tuple(classes)
        new = _load(settings, model, len(classes), weights, same)
    elif weights is not None:
        model, new = _with_new_head(_build(settings, len(classes), settings.weights), model)
    return model, new


def _build(settings: Settings, classes: int, weights: str | None = None) -> nn.Module:
    return build(settings.arch, classes, weights=weights, **settings.network_sizes())


def check_network(settings: Settings, image_shape: tuple[int, int, int]) -> None:
    """Checks that a network fits the settings, before anything that takes long.

    Args:
        settings: Settings of the run.
        image_shape: Channels, height and width of the images.

    Raises:
        UserError: There is no such network, it cannot be frozen as asked, or it does not take such
            images.
    """
    model = _outline(settings, 2)
    if settings.freeze_first is not None:
        units = units_of(model)
        count = count_of(units, settings.freeze_first)
        if count in (0, len(units)):
            raise UserError(
                f"--freeze-first {settings.freeze_first} leaves nothing to "
                f"{'train' if count else 'freeze'}: the network has {len(units)} units, from "
                f"{units[0].name} to {units[-1].name}"
            )
    if settings.library is None:
        return
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, *image_shape, device="meta"))
    except NotImplementedError:  # an operation that has no meta device: it will be seen
        return
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = first_line(error)
        shape = "x".join(map(str, image_shape))
        raise UserError(
            f"{settings.arch} does not take images of {shape} ({reason}): choose another "
            "--image-size"
        ) from error


def _outline(settings: Settings, classes: int) -> nn.Module:
    """Builds the network without memory for its weights."""
    try:
        with torch.device("meta"):
            return _build(settings, classes)
    except NotImplementedError:  # it computes its sizes with tensors
        return _build(settings, classes).to("meta")


def _load(
    settings: Settings, model: nn.Module, classes: int, weights: Weights, same: bool
) -> list[str]:
    """Loads a state dict; returns the names of the parameters that are left out.

    Those whose shapes depend on the number of classes are left out if the classes are others.

    Args:
        settings: Settings of the run.
        model: Network to load.
        classes: Number of classes of the network.
        weights: Weights with a state dict.
        same: Whether the weights were trained on the same classes.
    """
    assert weights.state is not None
    state, own = weights.state, model.state_dict()
    other = _outline(settings, classes + 1).state_dict()
    by_class = {name for name, tensor in own.items() if other[name].shape != tensor.shape}
    renew = not same or any(
        name not in state or state[name].shape != own[name].shape for name in by_class
    )
    wanted = {name: tensor for name, tensor in own.items() if not renew or name not in by_class}
    for name, tensor in wanted.items():
        if name not in state or state[name].shape != tensor.shape:
            there = f"has shape {tuple(state[name].shape)}" if name in state else "is missing"
            raise UserError(
                f"--weights {weights.words} do not fit {settings.network}: {name} {there}, and "
                f"should have shape {tuple(tensor.shape)}: give weights of this network"
            )
    # Heads that torchvision's files have and that it leaves out as well.
    unknown = sorted(n for n in set(state) - set(own) if not n.lower().startswith("aux"))
    if unknown:
        raise UserError(
            f"--weights {weights.words} do not fit {settings.network}, which has no {unknown[0]}: "
            "give weights of this network"
        )
    model.load_state_dict({name: state[name] for name in wanted}, strict=False)
    return sorted(by_class) if renew else []


def _with_new_head(trained: nn.Module, fresh: nn.Module) -> tuple[nn.Module, list[str]]:
    """Returns a trained network with the head of a fresh one, and the names of the new parameters.

    The head is all modules whose shapes differ because the networks differ in the number of
    classes.
    """
    ours, theirs = fresh.state_dict(), trained.state_dict()
    new = sorted(
        name
        for name, tensor in ours.items()
        if name in theirs and theirs[name].shape != tensor.shape
    )
    for path in sorted({name.rpartition(".")[0] for name in new}):
        parent, _, name = path.rpartition(".")
        setattr(trained.get_submodule(parent), name, fresh.get_submodule(path))
    return trained, new
