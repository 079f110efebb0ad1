"""Networks of torchvision, timm and transformers, by name."""

import difflib
import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    """A classification network of torchvision, timm or transformers.

    Args:
        library: `torchvision`, `timm` or `hf`.
        name: as in `torchvision.models.list_models()` or `timm.list_models()`; of `hf`, see
            `build_hugging_face`.
        classes: outputs; weights bring their own number of them.
        image_size: that networks of one size only are built for.
        weights: `DEFAULT`, or a name of the network's weights; None initialises it.

    Raises:
        UserError: the library is not installed, there is no such network or weights, or they are
            not here and cannot be downloaded.
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
    """Mean and standard deviation by channel of the images that weights were trained on, of pixels
    scaled to 0 .. 1, or None if they are not known. No weights are downloaded.

    Raises:
        UserError: there is no such network, or weights.
    """
    if library == "hf":
        return hugging_face_statistics(name, weights)
    if library == "timm":
        timm = import_timm()
        _check_name("timm", name, timm.list_models())
        known = timm.get_pretrained_cfg(_tagged(name, weights))
        if known is None:
            raise UserError(f"timm has no weights {weights} of {name}: leave out --weights")
        return tuple(known.mean), tuple(known.std)
    _check_name("torchvision", name, torchvision_names())
    preset = _torchvision_weights(name, weights).transforms()
    return tuple(preset.mean), tuple(preset.std)


def torchvision_names() -> list[str]:
    """Of the networks for classification."""
    models = _torchvision_models()
    return models.list_models(module=models)


def _torchvision_models() -> Any:
    # With it come torchvision's detection operators and torch's compiler: seconds, which no other
    # network needs.
    import torchvision

    return torchvision.models


def import_timm() -> Any:
    """The library.

    Raises:
        UserError: it is not installed.
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
        hint = (
            f": did you mean {' or '.join(close)}?" if close else f", but {', '.join(names[:5])}..."
        )
        raise UserError(f"{library} has no network {name!r} for classification{hint}")


def _torchvision_weights(name: str, weights: str) -> Any:
    known = _torchvision_models().get_model_weights(name)
    wanted = weights.removeprefix(f"{known.__name__}.")
    if wanted != "DEFAULT" and wanted not in known.__members__:
        raise UserError(
            f"there is no file {weights}, and torchvision has no such weights of {name}: choose "
            f"{', '.join(known.__members__) or 'none, for it has none'}"
        )
    try:
        return known[wanted]
    except KeyError:
        raise UserError(f"torchvision has no weights of {name}: leave out --weights") from None


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
    """timm's way to name a network with one of its weights."""
    return name if weights == "DEFAULT" else f"{name}.{weights}"


@contextmanager
def _sized(what: str, size: int) -> Iterator[None]:
    """A size that is no multiple of a network's patches is the user's to mend."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"{what} does not take images of {size}x{size} ({reason}): choose another --image-size"
        ) from error


@contextmanager
def _loading(what: str, url: str | None) -> Iterator[None]:
    """What keeps weights from being loaded is the user's to mend. Nothing in them can run code."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    except Exception as error:  # of a file, a network, a server, or a hash
        reason = first_line(error)
        mend = "give --weights a file"
        if url is not None:
            mend = f"download {url} yourself and give it as --weights FILE"
        raise UserError(f"{what} are not here and cannot be had ({reason}): {mend}") from error
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
