"""Compares another pass with a trace: the given tensors, the switches of torch, and the modules."""

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain
from operator import attrgetter, call, is_, itemgetter
from typing import Any

import torch
from torch import nn

from cachefreeze.lineage.contents import Glance, content, dict_version
from cachefreeze.lineage.soundness import HOOKS, PARTS, shared_hooks
from cachefreeze.lineage.structure import PLAIN_KINDS, tensors
from cachefreeze.lineage.unloaded import kind_of


def _shape(tensor: torch.Tensor) -> tuple[Any, ...]:
    strided = tensor.layout == torch.strided and not tensor.is_nested
    return (
        kind_of(tensor), tuple(tensor.shape), tensor.stride() if strided else None, tensor.dtype,
        tensor.device, tensor.requires_grad,
    )  # fmt: skip


def _switches() -> tuple[Any, ...]:
    autocast = tuple(
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _DEVICES
    )
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


_DEVICES = ("cpu", "cuda")


class Signature:
    """The tensors that a pass was given, the switches of torch, and the state of the modules.

    Args:
        modules: Modules that the callable uses, each with its name.
        given: Arguments of the pass.
    """

    def __init__(self, modules: Sequence[tuple[str, nn.Module]], given: Any) -> None:
        self._given = [_shape(tensor) for tensor in tensors(given)]
        self._switches = _switches()
        self._parts = [
            _Part(f"{name}.{path}".strip("."), part)
            for name, module in modules
            for path, part in module.named_modules()
        ]
        self._shared = _run_for_all()
        parts = [part for _, module in modules for part in module.modules()]
        self._settings = _settings(parts)
        self._glance: _Glance | None = None

    def watch(self, name: str, module: nn.Module) -> None:
        """Adds a module that the pass called and that was not known before."""
        self._parts += [
            _Part(f"{name}.{path}".strip("."), part) for path, part in module.named_modules()
        ]
        self._settings += _settings(list(module.modules()))
        self._glance = None

    def settle(self) -> None:
        """Ignores attributes that the pass itself has changed, such as counters or lists."""
        self._settings = [one for one in self._settings if content(one[1]) == one[2]]
        for part in self._parts:
            part.settle()
        self._glance = None

    def difference(self, given: Any) -> str:
        """Returns a short description of how another pass differs, or an empty string."""
        if [_shape(tensor) for tensor in tensors(given)] != self._given:
            return "the given tensors have other shapes, types or strides"
        if _switches() != self._switches:
            return "gradients, inference mode or autocast are switched differently"
        if _run_for_all() != self._shared:
            return "hooks for all modules were added or removed"
        return self.difference_of_modules()

    def renew(self, counting: Collection[int]) -> bool:
        """Accepts the state of the modules if only freezing has changed it.

        Args:
            counting: Identities of the modules that must not have changed. Containers of torch may
                have another mode, since they only hold their parts.

        Returns:
            Whether the current state was accepted.
        """
        if any(content(value) != before for _, value, before in self._settings):
            return False
        changed = [part for part in self._parts if not part.is_same()]
        modules = [part.module() for part in changed]
        for part, module in zip(changed, modules, strict=True):
            if module is None or not part.is_same_but_for_freezing():
                return False
            if id(module) in counting and part.kind not in _CONTAINERS:
                return False
        for part, module in zip(changed, modules, strict=True):
            assert module is not None
            part.record(module)
        self._glance = None
        return True

    def difference_of_modules(self) -> str:
        """Returns a short description of how the modules differ, or an empty string."""
        if self._glance is None:
            self._glance = _Glance(self._parts, [value for _, value, _ in self._settings])
        if not self._glance.parts_are_same():
            for part in self._parts:
                if not part.is_same():
                    return part.difference()
        if not self._glance.settings.is_same():
            for name, value, before in self._settings:
                if content(value) != before:
                    return f"`{name}` of a module has changed"
        return ""


class _Glance:
    """Quick comparison of all modules in a few passes over flat lists, with few steps of Python.

    If it finds a difference, the modules may still be equal in all that matters.

    Args:
        parts: States of the modules.
        settings: Settings of the modules.
    """

    def __init__(self, parts: Sequence["_Part"], settings: Iterable[Any]) -> None:
        self.settings = Glance(settings)
        self._parts_of = parts
        self._modules = [part.module for part in parts]
        self._takes = [part.take for part in parts]
        self._plain = [value for part in parts for value in part.plain]
        self._sizes = [max(part.attributes) for part in parts]
        self._empty = [part.take_empty for part in parts]
        self._hooks = [(n, part.hooks) for n, part in enumerate(parts) if part.hooks]
        self._with_parts = [n for n, part in enumerate(parts) if part.parts]
        self._parts = [number for part in parts for _, number in part.parts]
        self._paths = [name for part in parts for name, _ in part.parts]
        self._kinds = [part.kind for part in parts]
        held = [part.parameters for part in parts]
        held += [part.buffers if part.watches_buffers else None for part in parts]
        places = [("_parameters", n) for n in range(len(parts))]
        places += [("_buffers", n) for n in range(len(parts))]
        self._holders = [place for place, one in zip(places, held, strict=True) if one]
        self._names = [name for one in held for name, _ in one or ()]
        self._frozen = [number for one in held for _, number in one or ()]
        self._numbers: list[int] = []
        self._trained: list[bool] = []
        self._real: Callable[[list[Any]], tuple[Any, ...]] = _nothing
        # Versions of the attributes of all modules, and of those dictionaries among them that are
        # not empty; and the others.
        self._versions: list[int] = []
        self._filled: list[tuple[str, int]] = []
        self._unfilled: list[dict[str, Any]] = []

    def parts_are_same(self) -> bool:
        """Returns whether nothing was replaced, added or removed."""
        try:
            modules = [*map(call, self._modules)]
            held: list[dict[str, Any]] = [*map(_held_by, modules)]
            if self._is_untouched(held) and [*map(type, modules)] == self._kinds:
                return True
            if any(map(any, map(call, self._empty, held))):
                return False
            now = chain.from_iterable(map(call, self._takes, held))
            if not all(map(is_, now, self._plain)):
                return False
            tensors = [held[n][kind] for kind, n in self._holders]
            if not self._is_same(modules, held, tensors):
                return False
        except (AttributeError, KeyError):  # a module or one of its attributes was removed
            return False
        self._take_versions(held)
        return True

    def _take_versions(self, held: list[dict[str, Any]]) -> None:
        places = [
            (kind, n)
            for n, part in enumerate(self._parts_of)
            for kind in (*HOOKS, *_HELD)
            if kind in held[n] and (part.watches_buffers or kind != "_buffers")
        ]
        if not all(isinstance(held[n][kind], dict) for kind, n in places):
            return  # scripted modules have no dictionaries
        self._filled = [(kind, n) for kind, n in places if held[n][kind]]
        self._unfilled = [held[n][kind] for kind, n in places if not held[n][kind]]
        filled = [held[n][kind] for kind, n in self._filled]
        self._versions = [*map(dict_version, held), *map(dict_version, filled)]

    def _is_untouched(self, held: list[dict[str, Any]]) -> bool:
        """Says whether nobody has assigned to any attribute, and which tensors take gradient."""
        if not self._versions:
            return False
        filled = [held[n][kind] for kind, n in self._filled]
        if [*map(dict_version, held), *map(dict_version, filled)] != self._versions:
            return False
        tensors = [held[n][kind].values() for kind, n in self._holders]
        real = self._real([*chain.from_iterable(tensors)])
        return not any(self._unfilled) and [*map(_takes_gradient, real)] == self._trained

    def _is_same(
        self, modules: list[Any], held: list[dict[str, Any]], tensors: list[dict[str, Any]]
    ) -> bool:
        parts = [held[n]["_modules"] for n in self._with_parts]
        return (
            [*map(type, modules)] == self._kinds
            and [*map(len, held)] == self._sizes
            and [*chain.from_iterable([one.keys() for one in tensors])] == self._names
            and self._are_same([*chain.from_iterable([one.values() for one in tensors])])
            and [*map(id, chain.from_iterable([one.values() for one in parts]))] == self._parts
            and [*chain.from_iterable([one.keys() for one in parts])] == self._paths
            and all(_hooks(held[n]) == hooks for n, hooks in self._hooks)
        )

    def _are_same(self, tensors: list[Any]) -> bool:
        """Returns whether tensors are the same objects, and the same of them require gradient."""
        numbers = [*map(id, tensors)]
        if numbers == self._numbers:
            return [*map(_takes_gradient, self._real(tensors))] == self._trained
        if [0 if t is not None and t.requires_grad else id(t) for t in tensors] != self._frozen:
            return False
        # Trainable tensors may be replaced by others. The new ones are expected in the next pass.
        self._numbers = numbers
        real = [n for n, tensor in enumerate(tensors) if tensor is not None]
        self._real = itemgetter(*real, *real[:1]) if real else _nothing
        self._trained = [*map(_takes_gradient, self._real(tensors))]
        return True


_held_by, _takes_gradient = attrgetter("__dict__"), attrgetter("requires_grad")
_HELD = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _nothing(held: Any) -> tuple[()]:
    return ()


class _Part:
    """State of one module. Compared only if the quick comparison has found a difference."""

    __slots__ = (
        "attributes", "buffers", "empty", "hooks", "keys", "kind", "module", "name", "parameters",
        "parts",
        "plain", "take", "take_empty", "training", "watches_buffers",
    )  # fmt: skip

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.record(module)

    def record(self, module: nn.Module) -> None:
        """Records the current state of a module."""
        held = vars(module)
        # At least two keys, so that `itemgetter` returns a tuple. Every module has `training`.
        keys = [key for key, value in held.items() if type(value) in PLAIN_KINDS]
        self.module = weakref.ref(module)
        self.training = module.training
        self.keys = [*keys, keys[0]]
        self.take = itemgetter(*self.keys)
        self.plain = self.take(held)
        self.attributes = {len(held)}
        self.watches_buffers = True
        self.hooks = _hooks(held)
        self.parameters = _tensors(_held(module, "_parameters"))
        self.buffers = _tensors(_held(module, "_buffers"))
        self.kind = type(module)
        self.parts = [(key, id(part)) for key, part in held.get("_modules", {}).items()]
        # These must stay empty. Most modules have no hooks and no buffers.
        self._stay_empty([key for key in (*HOOKS, *_HELD) if key in held and not held[key]])

    def _stay_empty(self, kinds: list[str]) -> None:
        self.empty = kinds
        self.take_empty = itemgetter(*kinds, kinds[0]) if kinds else _nothing

    def settle(self) -> None:
        """Ignores attributes that the pass itself has changed, such as a counter."""
        module = self.module()
        if module is None or self.is_same():
            return
        before, now = dict(zip(self.keys, self.plain, strict=True)), vars(module)
        same = [key for key in self.keys if key in now and _equal(now[key], before[key])]
        self.keys = [*same, same[0]]
        self.take = itemgetter(*self.keys)
        self.plain = self.take(now)
        self.attributes |= {len(now)}
        self.watches_buffers = _tensors(_held(module, "_buffers")) == self.buffers
        if not self.watches_buffers:
            self._stay_empty([key for key in self.empty if key != "_buffers"])

    def is_same(self) -> bool:
        module = self.module()
        if type(module) is not self.kind:  # also if it was deleted
            return False
        held = module.__dict__
        try:
            now = self.take(held)
            filled = any(self.take_empty(held))
        except KeyError:
            return False
        return (
            (all(map(is_, now, self.plain)) or all(map(_equal, now, self.plain)))
            and len(held) in self.attributes
            and not filled
            and (not self.hooks or _hooks(held) == self.hooks)
            and (not self.parameters or _tensors(held["_parameters"]) == self.parameters)
            and (
                not self.buffers
                or not self.watches_buffers
                or _tensors(held["_buffers"]) == self.buffers
            )
            and (not self.parts or [(k, id(v)) for k, v in held["_modules"].items()] == self.parts)
        )

    def is_same_but_for_freezing(self) -> bool:
        """Returns whether nothing changed but its mode and which parameters require gradient.

        Parts are always compared, since a list of modules is never called itself.
        """
        module = self.module()
        if module is None or type(module) is not self.kind:
            return False
        other = _Part(self.name, module)
        before = dict(zip(self.keys, self.plain, strict=True))
        now = vars(module)
        return (other.parts, other.hooks) == (self.parts, self.hooks) and all(
            key in now and (key == "training" or _equal(now[key], value))
            for key, value in before.items()
        )

    def difference(self) -> str:
        """Returns a description of what has changed."""
        module = self.module()
        if module is None:
            return f"`{self.name}` was deleted"
        if type(module) is not self.kind:
            return f"`{self.name}` is of another class"
        other = _Part(self.name, module)
        if module.training != self.training:
            return f"`{self.name}` is in {'training' if module.training else 'eval'} mode now"
        if other.hooks != self.hooks:
            return f"hooks of `{self.name}` were added or removed"
        if other.parameters != self.parameters:
            return f"parameters of `{self.name}` were frozen, unfrozen or replaced"
        if other.buffers != self.buffers:
            return f"buffers of `{self.name}` were replaced"
        if other.parts != self.parts:
            return f"modules in `{self.name}` were replaced"
        return f"an attribute of `{self.name}` has changed"


def _held(module: nn.Module, kind: str) -> dict[str, torch.Tensor | None]:
    """Returns parameters or buffers of a module. Scripted modules do not have this attribute."""
    return vars(module).get(kind) or {}


def _tensors(held: dict[str, torch.Tensor | None]) -> list[tuple[str, int]] | None:
    """Returns the name and the identity of each tensor. The identity of trainable ones is 0.

    Trainable tensors may be replaced, as `functional_call` does: no skipped work depends on them.
    """
    if not held:
        return None
    return [
        (key, 0 if tensor is not None and tensor.requires_grad else id(tensor))
        for key, tensor in held.items()
    ]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (float, complex)):
        return type(one) is type(other) and repr(one) == repr(other)  # -0.0 == 0.0
    return type(one) is type(other) and one == other


def _hooks(held: dict[str, Any]) -> int:
    return sum(len(held[kind]) for kind in HOOKS)


def _settings(modules: Sequence[nn.Module]) -> list[tuple[str, Any, Any]]:
    """Returns name, object and content of each setting of some modules, each object once."""
    found: list[tuple[str, Any, Any]] = []
    seen: set[int] = set()
    for module in modules:
        for name, value in vars(module).items():
            if name in PARTS or type(value) in PLAIN_KINDS or id(value) in seen:
                continue
            seen.add(id(value))
            held = content(value)
            if held is not None:
                found.append((name, value, held))
    return found


def _run_for_all() -> tuple[Any, ...]:
    """Returns what runs at the calls of all modules."""
    return nn.Module._call_impl, *shared_hooks()
