"""What two passes must have in common for the trace of one to say something of the other."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cachefreeze.lineage.operations import State
from cachefreeze.lineage.soundness import has_hooks
from cachefreeze.lineage.structure import PLAIN_KINDS, tensors


def _shape(tensor: torch.Tensor) -> tuple[Any, ...]:
    strided = tensor.layout == torch.strided and not tensor.is_nested
    return (
        type(tensor), tuple(tensor.shape), tensor.stride() if strided else None, tensor.dtype,
        tensor.device, tensor.requires_grad,
    )  # fmt: skip


def _switches() -> tuple[Any, ...]:
    autocast = tuple(
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _DEVICES
    )
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


_DEVICES = ("cpu", "cuda")


class Signature:
    """What a pass was given and the state its modules were in.

    Args:
        modules: Modules that the callable uses, each with its name.
        given: Arguments of the pass.
        states: Parameters and buffers that are known when the pass begins.
    """

    def __init__(
        self, modules: Sequence[tuple[str, nn.Module]], given: Any, states: Sequence[State]
    ) -> None:
        self._given = [_shape(tensor) for tensor in tensors(given)]
        self._switches = _switches()
        self._parts = [
            (f"{name}.{path}".strip("."), weakref.ref(part), part.training, has_hooks(part),
             _plain(part))
            for name, module in modules
            for path, part in module.named_modules()
        ]  # fmt: skip
        self._states = [
            (name, weakref.ref(part), kind, key, id(tensor), tensor.requires_grad)
            for name, part_reference, *_ in self._parts
            for part in (part_reference(),)
            if part is not None
            for kind in ("_parameters", "_buffers")
            for key, tensor in getattr(part, kind).items()
            if tensor is not None
        ]
        self._count = len(states)

    def difference(self, given: Any) -> str:
        """Says in a few words how another pass differs, or returns an empty string.

        Args:
            given: Arguments of the other pass.
        """
        if [_shape(tensor) for tensor in tensors(given)] != self._given:
            return "the tensors that are given have other shapes, types or strides"
        if _switches() != self._switches:
            return "gradients, inference mode or autocast are switched otherwise"
        for name, reference, training, hooks, plain in self._parts:
            part = reference()
            if part is None:
                return f"`{name}` is gone"
            if part.training != training:
                return f"`{name}` is in {'training' if part.training else 'eval'} mode"
            if has_hooks(part) != hooks:
                return f"`{name}` has other hooks"
            if plain and _plain(part) != plain:
                return f"an attribute of `{name}` has changed"
        for name, reference, kind, key, identity, requires_grad in self._states:
            tensor = getattr(reference(), kind).get(key)
            if tensor is None or id(tensor) != identity:
                return f"`{name}.{key}` is another tensor"
            if tensor.requires_grad != requires_grad:
                return f"`{name}.{key}` is {'trained' if tensor.requires_grad else 'frozen'} now"
        return ""


def _plain(part: nn.Module) -> dict[str, Any]:
    """Returns the numbers, strings and the like among a module's attributes."""
    return {key: value for key, value in vars(part).items() if type(value) in PLAIN_KINDS}
