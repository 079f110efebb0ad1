"""Networks of torchvision, timm and transformers, by name."""

import difflib
import inspect
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from cachefreeze.errors import UserError, first_line
from cachefreeze.models.hugging_face import build_hugging_face, hugging_face_statistics

# Of most weights that were trained on ImageNet: mean and standard deviation by channel.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def build_ready_made(
    library: str, name: str, classes: int, *, image_size: int, weights: str | None = None
) -> nn.Module:
    """Builds a classification network of torchvision, timm or transformers.

    Args:
        library: Name of the library: `torchvision`, `timm` or `hf`.
        name: Name of the network in `torchvision.models.list_models()` or `timm.list_models()`. For
            `hf`, a folder with a config.json or a name on the hub.
        classes: Number of outputs. Weights bring their own number of outputs.
        image_size: Height and width of the images. Only networks that take a single size are built
            for it.
        weights: Name of trained weights of the network, or `DEFAULT`. If None, the network is
            freshly initialised.

    Raises:
        UserError: The library is not installed, there is no such network or no such weights, the
            weights cannot be downloaded, or the network does not take images of this size.
    """
    if library == "hf":
        return build_hugging_face(name, classes, image_size=image_size, weights=weights)
    if library == "timm":
        return _timm_model(name, classes, image_size, weights)
    _check_name("torchvision", name, torchvision_names())
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": weights is None}
        if weights is None:
            options["aux_logits"] = False
    elif name.startswith("vit_"):
        options = {"image_size": image_size}
    if weights is None:
        with _sized(f"torchvision:{name}", image_size):
            return _torchvision_models().get_model(name, num_classes=classes, **options)
    chosen = _torchvision_weights(name, weights)
    needed = chosen.meta.get("min_size", (1, 1))[0]
    if "image_size" in options and image_size != needed:
        raise UserError(
            f"the weights {weights} of {name} are for images of {needed}x{needed}: give "
            f"--image-size {needed}"
        )
    with _loading(f"the weights {weights} of {name}", chosen.url):
        return _torchvision_models().get_model(name, weights=chosen, progress=False, **options)


def weights_statistics(library: str, name: str, weights: str) -> Statistics | None:
    """Returns the mean and standard deviation of the images that weights were trained on.

    No weights are downloaded.

    Args:
        library: Name of the library: `torchvision`, `timm` or `hf`.
        name: Name of the network in the library.
        weights: Name of the weights, or `DEFAULT`.

    Returns:
        Mean and standard deviation of each channel, of pixels scaled to 0 .. 1. None if they are
        not known.

    Raises:
        UserError: The library is not installed, or there is no such network or no such weights.
    """
    if library == "hf":
        return hugging_face_statistics(name, weights)
    if library == "timm":
        timm = import_timm()
        _check_name("timm", name, timm.list_models())
        known = timm.get_pretrained_cfg(_tagged(name, weights))
        if known is None:
            raise UserError(f"timm has no weights {weights} for {name}: leave out --weights")
        return tuple(known.mean), tuple(known.std)
    _check_name("torchvision", name, torchvision_names())
    preset = _torchvision_weights(name, weights).transforms()
    return tuple(preset.mean), tuple(preset.std)


def meant_network(text: str, own: Sequence[str]) -> str | None:
    """Guesses which network is meant by an unknown name.

    It may import torchvision and timm, which takes seconds.

    Args:
        text: Name that was given, such as resnet18 or densnet40_12.
        own: Names of our own networks, without sizes.

    Returns:
        Name with its library, or with its sizes. None if nothing is close.
    """
    name = text.rpartition(":")[2].lower()
    if "/" in name:
        return f"hf:{text.rpartition(':')[2]}"
    letters = re.match("[a-z]*", name)
    assert letters is not None
    libraries = {"torchvision": torchvision_names()}
    with suppress(UserError):
        libraries["timm"] = import_timm().list_models()
    for cutoff in (1.0, 0.8):
        for library, names in libraries.items():
            for close in difflib.get_close_matches(name, names, n=1, cutoff=cutoff):
                return f"{library}:{close}"
    for close in difflib.get_close_matches(letters[0], own, n=1):
        return close + name[letters.end() :]
    return None


def torchvision_names() -> list[str]:
    """Returns the names of torchvision's networks for classification."""
    models = _torchvision_models()
    return models.list_models(module=models)


def _torchvision_models() -> Any:
    # With it come torchvision's detection operators and torch's compiler: seconds, which no other
    # network needs.
    import torchvision

    return torchvision.models


def import_timm() -> Any:
    """Returns timm.

    Raises:
        UserError: The package timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(
            "timm is not installed: pip install 'cachefreeze[timm]', or use a torchvision network"
        ) from error
    return timm


def _check_name(library: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        close = difflib.get_close_matches(name, names)
        hint = f"did you mean {' or '.join(close)}?"
        if not close:
            hint = f"choose another, such as {', '.join(names[:3])}"
        raise UserError(f"{library} has no network {name!r} for classification: {hint}")


def _torchvision_weights(name: str, weights: str) -> Any:
    known = _torchvision_models().get_model_weights(name)
    wanted = weights.removeprefix(f"{known.__name__}.")
    if wanted != "DEFAULT" and wanted not in known.__members__:
        choice = f"choose {', '.join(known.__members__)}" if known.__members__ else "leave them out"
        raise UserError(
            f"there is no file {weights}, and torchvision has no such weights for {name}: {choice}"
        )
    try:
        return known[wanted]
    except KeyError:
        raise UserError(f"torchvision has no weights for {name}: leave out --weights") from None


def _timm_model(name: str, classes: int, image_size: int, weights: str | None) -> nn.Module:
    timm = import_timm()
    _check_name("timm", name, timm.list_models())
    options: dict[str, Any] = {}
    known = timm.get_pretrained_cfg(name)
    by_name = "img_size" in inspect.signature(timm.model_entrypoint(name)).parameters
    if by_name or (known is not None and known.fixed_input_size):
        options["img_size"] = image_size
    if weights is None:
        with _sized(f"timm:{name}", image_size):
            return timm.create_model(name, num_classes=classes, **options)
    with _loading(f"the weights {weights} of {name}", None):
        return timm.create_model(_tagged(name, weights), pretrained=True, **options)


def _tagged(name: str, weights: str) -> str:
    """Returns timm's name of a network with one of its weights."""
    return name if weights == "DEFAULT" else f"{name}.{weights}"


@contextmanager
def _sized(what: str, size: int) -> Iterator[None]:
    """Turns errors of a network that does not take a size of images into a UserError."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"{what} does not take images of {size}x{size} ({reason}): choose another --image-size"
        ) from error


@contextmanager
def _loading(what: str, url: str | None) -> Iterator[None]:
    """Turns errors of loading into a UserError. Nothing in the weights can run code."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    except Exception as error:  # of a file, a network, a server, or a hash
        reason = first_line(error)
        mend = "give --weights a file"
        if url is not None:
            mend = f"download {url} yourself and give it as --weights FILE"
        raise UserError(f"cannot load {what} ({reason}): {mend}") from error
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
