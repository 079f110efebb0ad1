"""Image classifiers of Hugging Face transformers, by folder or by name on the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cachefreeze.errors import UserError, first_line


class Logits(nn.Module):
    """An image classifier of transformers that takes a tensor and returns a tensor.

    Args:
        model: Image classifier of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Maps images, (N, 3, H, W), to logits, (N, classes)."""
        return self.model(pixel_values=x).logits


def build_hugging_face(
    name: str, classes: int, *, image_size: int, weights: str | None = None
) -> nn.Module:
    """Builds an image classifier. No code of a model's folder is run.

    Args:
        name: Folder with a config.json, or a name on the hub.
        classes: Number of outputs. Weights bring their own number of outputs.
        image_size: Height and width of the images.
        weights: Folder or name on the hub that safetensors are loaded from, or `DEFAULT` for those
            of `name` itself. If None, weights are initialised.

    Raises:
        UserError: The package transformers is not installed, there is no such image classifier, it
            cannot be downloaded, or its weights are for images of another size.
    """
    transformers = _import_transformers()
    auto = transformers.AutoModelForImageClassification
    name = _place(name, "DEFAULT")
    if weights is None:
        with _loading(f"an image classifier hf:{name}", "a folder with a config.json"):
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            config.num_labels = classes
            if isinstance(getattr(config, "image_size", None), int):
                config.image_size = image_size
            return Logits(auto.from_config(config, trust_remote_code=False).float())
    where = _place(name, weights)
    with _loading(f"weights of an image classifier {where}", "a folder with a model.safetensors"):
        model, found = auto.from_pretrained(
            where, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    # Weights that were trained without labels have no head, which is initialised then.
    body = f"{model.base_model_prefix}."
    missing = sorted(key for key in found["missing_keys"] if key.startswith(body))
    if missing:
        raise UserError(
            f"the weights {where} do not fit this network: they have no {missing[0]}. Give weights "
            "of this network"
        )
    made = Logits(model.float().train())
    size = getattr(model.config, "image_size", image_size)
    if size != image_size and not _takes(made, image_size):
        raise UserError(
            f"the weights {where} are for images of {size}x{size}: give --image-size {size}"
        )
    return made


def hugging_face_statistics(name: str, weights: str) -> tuple[Any, Any] | None:
    """Reads the mean and standard deviation of the images that weights were trained on.

    Args:
        name: Folder with a config.json, or a name on the hub.
        weights: Folder or name on the hub, or `DEFAULT` for the weights of `name` itself.

    Returns:
        Mean and standard deviation of each channel, of pixels scaled to 0 .. 1. None if the weights
        come without them.

    Raises:
        UserError: The package transformers is not installed.
    """
    processors = _import_transformers().ImageProcessingMixin
    try:
        found, _ = processors.get_image_processor_dict(_place(name, weights))
    except (OSError, ValueError):  # there is none, or no network
        return None
    mean, std = found.get("image_mean"), found.get("image_std")
    if not found.get("do_normalize", True) or not isinstance(mean, list):
        return None
    return tuple(map(float, mean)), tuple(map(float, std))


def _place(name: str, weights: str) -> str:
    place = name if weights == "DEFAULT" else weights
    folder = Path(place).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.is_absolute() or place.count("/") > 1 or place.startswith("."):
        raise UserError(f"there is no folder {place}: give one, or a name on the hub")
    return place


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "transformers is not installed: pip install 'cachefreeze[hf]', or use a torchvision "
            "network"
        ) from error
    return transformers


def _takes(model: nn.Module, size: int) -> bool:
    parameter = next(model.parameters())
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(torch.zeros(1, 3, size, size, dtype=parameter.dtype))
    except (RuntimeError, ValueError):
        return False
    finally:
        model.train()
    return True


@contextmanager
def _loading(what: str, instead: str) -> Iterator[None]:
    """Turns errors of loading into a UserError, and hides the progress bars of transformers."""
    logging = _import_transformers().logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # of a file, a network, a server, or a class
        reason = first_line(error).rstrip(".")
        raise UserError(f"cannot load {what} ({reason}): give {instead}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
