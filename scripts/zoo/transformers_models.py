"""How an entry for one of transformers' classes is put together."""

import copy
import importlib
from typing import Any

from torch import nn

from .entry import VOCABULARY, Entry, Inputs

WIDTH: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
ENCODER: dict[str, Any] = {
    **WIDTH,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DECODER: dict[str, Any] = {**ENCODER, "bos_token_id": 1, "eos_token_id": 2}
GROUPED: dict[str, Any] = {**DECODER, "num_key_value_heads": 2}
"""A decoder in which two heads share their keys and values with two others."""


def model(
    prefix: str, task: str, inputs: Inputs, settings: dict[str, Any], config: str = ""
) -> Entry:
    """The entry of a class of transformers.

    Args:
        prefix: the start of the class's name, which its configuration's name shares.
        task: the rest of the class's name.
        inputs: see `Entry`.
        settings: of the configuration.
        config: the configuration's class, when it is not `prefix` and "Config".
    """

    def build() -> nn.Module:
        library: Any = importlib.import_module("transformers")
        configuration = getattr(library, config or f"{prefix}Config")
        # Some configurations take what they are given apart.
        built: nn.Module = getattr(library, prefix + task)(configuration(**copy.deepcopy(settings)))
        return built

    return Entry(prefix + task, "transformers", build, inputs)
