"""Tiny models of the libraries that people take models from, with random weights and inputs.

Nothing is downloaded, and no library is imported before its entries are asked for.
"""

import importlib
import importlib.util
from collections.abc import Callable, Collection
from typing import Any

from . import (
    other_models,
    peft_models,
    timm_models,
    torchvision_models,
    transformers_other,
    transformers_text,
    transformers_vision,
)
from .entry import Entry, enliven, first_parameters

__all__ = ["FAMILIES", "Entry", "enliven", "first_parameters", "zoo"]


def _transformers() -> list[Entry]:
    """The entries of those classes that the installed version has."""
    library: Any = importlib.import_module("transformers")
    made = [
        *transformers_text.entries(),
        *transformers_vision.entries(),
        *transformers_other.entries(),
    ]
    return [entry for entry in made if hasattr(library, entry.name)]


FAMILIES: dict[str, tuple[tuple[str, ...], Callable[[], list[Entry]]]] = {
    "transformers": (("transformers",), _transformers),
    "timm": (("timm",), timm_models.entries),
    "torchvision": (("torchvision",), torchvision_models.entries),
    "peft": (("peft", "transformers"), peft_models.entries),
    "diffusers": (("diffusers",), other_models.diffusers),
    "segmentation-models-pytorch": (
        ("segmentation_models_pytorch",),
        other_models.segmentation_models,
    ),
    "open_clip": (("open_clip",), other_models.open_clip),
    "sentence-transformers": (
        ("sentence_transformers", "transformers"),
        other_models.sentence_transformers,
    ),
}
"""Name -> the modules that have to be installed, what makes its entries."""


def zoo(families: Collection[str] | None = None) -> list[Entry]:
    """The entries of some families, or of all, by family.

    A family whose library is not installed is left out.

    Raises:
        KeyError: there is no such family.
    """
    entries = []
    for family in FAMILIES if families is None else families:
        modules, make = FAMILIES[family]
        if all(importlib.util.find_spec(module) for module in modules):
            entries += make()
    return entries
