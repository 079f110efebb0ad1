"""A module whose calls are cached, with a route for each signature and way through it."""

import weakref
from typing import Any

import torch
from torch import nn

from cachefreeze import lineage
from cachefreeze.cache.route import Route, State
from cachefreeze.cache.shared import Shared
from cachefreeze.lineage import calls
from cachefreeze.lineage.structure import PLAIN_KINDS, tensors

# Number of signatures of a module, and of ways through it for one signature, that are followed.
_MOST = 16
# Number of them for one mode of which the user is told.
_MANY_SHAPES = 4
# Number of times that a signature is traced anew because something has changed.
_MOST_ANEW = 64


class Site:
    """A module whose calls are cached.

    Args:
        shared: What all routes of the cache have in common.
        name: Name of the module, for people.
        module: Module.
    """

    def __init__(self, shared: Shared, name: str, module: nn.Module) -> None:
        self._shared = shared
        self._name = name
        self._module = weakref.ref(module)
        self._refresh(module)
        self._routes: dict[Any, list[Route]] = {}
        self._traced: dict[Any, int] = {}
        self._alike: dict[Any, list[tuple[int, Any]]] = {}

    def _refresh(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        self._parameters = list(module.parameters())

    def is_current(self) -> bool:
        """Says whether the module is still made of the same parts."""
        module = self._module()
        return module is not None and all(
            one is other for one, other in zip(module.modules(), self._modules, strict=False)
        )

    def routes(self) -> list[Route]:
        """Returns all routes."""
        return [route for routes in self._routes.values() for route in routes]

    def call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], inner: bool
    ) -> Any:
        """Runs a call of the module, or replays it with kept values.

        Args:
            module: Module that is called: this one, or what was compiled from it.
            args: Positional arguments.
            kwargs: Keyword arguments.
            inner: Whether the call is within one whose frozen modules are cached by themselves.
        """
        trained = [one.requires_grad for one in self._parameters]
        if inner and any(trained):
            return self._by_parts(module, args, kwargs)
        if all(trained):
            return module(*args, **kwargs)
        given = list(tensors((args, kwargs)))
        if not given or not all(_is_plain(tensor) for tensor in given):
            return module(*args, **kwargs)
        about = (
            tuple(trained),
            tuple([one.training for one in self._modules]),
            _switches(),
            _plain_in((args, kwargs)),
        )
        shapes = tuple(
            (tuple(one.shape), one.stride(), one.dtype, one.device, one.requires_grad)
            for one in given
        )
        routes = self._routes.get((about, shapes))
        if routes is None:
            if self._is_smaller_than_others(about, given):
                return module(*args, **kwargs)
            if len(self._routes) >= _MOST:
                return self._give_up(
                    "signatures", f"was called with more than {_MOST} combinations of shapes and "
                    "modes: further ones are not cached. For padded batches, a fixed length or "
                    "pad_to_multiple_of=64 helps", module, args, kwargs,
                )  # fmt: skip
            routes = self._routes[about, shapes] = []
            self._alike.setdefault(about, []).append((_rows(given), shapes))
            if len(self._alike[about]) == _MANY_SHAPES:
                self._shared.note(
                    f"{self._name}: shapes",
                    f"{self._name} was called with {_MANY_SHAPES} combinations of shapes and more. "
                    "A row that is padded to another length is another row: a fixed length, or "
                    "pad_to_multiple_of=64, makes rows come again.",
                )
        self._shared.moving.look()
        if any(route.stale for route in routes):
            routes[:] = [route for route in routes if not route.stale]
            self._refresh(self._module() or module)
            if self._traced.get((about, shapes), 0) >= _MOST_ANEW:
                return self._give_up(
                    "changes", "changes too often: hooks, attributes or parameters of it are "
                    "others in every few calls", module, args, kwargs,
                )  # fmt: skip
        for route in routes:
            if route.fits((args, kwargs)):
                if route.state is State.BY_PARTS:
                    return self._by_parts(module, args, kwargs)
                return route.call(module, args, kwargs)
        if len(routes) >= _MOST:
            return module(*args, **kwargs)
        self._traced[about, shapes] = self._traced.get((about, shapes), 0) + 1
        before = self._before(about, shapes)
        return self._trace(routes, module, args, kwargs, given, before)

    def _give_up(
        self, about: str, why: str, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        self._shared.tell(f"{self._name}: {about}", f"{self._name} {why}.")
        return module(*args, **kwargs)

    def _by_parts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a call in which frozen modules are cached by themselves."""
        with calls.rooted():
            return calls.real_call(module, *args, **kwargs)

    def _trace(
        self,
        routes: list[Route],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[torch.Tensor],
        before: Route | None,
    ) -> Any:
        # The pass may write to what it is given.
        copies = [tensor.detach().clone() for tensor in given]
        output, trace = lineage.trace(module, *args, moving=self._shared.moving.tensors, **kwargs)
        self._shared.stats.rows_computed += _rows(given)
        routes.append(Route(self._shared, self._name, trace, copies, before))
        return output

    def _before(self, about: Any, shapes: Any) -> Route | None:
        """Finds a route of the same calls from when less was frozen: the last one, if several."""
        found = None
        for (others, their_shapes), routes in self._routes.items():
            trained, _, *rest = others
            less = all(one or not now for one, now in zip(trained, about[0], strict=False))
            if their_shapes == shapes and less and trained != about[0] and tuple(rest) == about[2:]:
                found = next((one for one in routes if one.serves), found)
        return found

    def _is_smaller_than_others(self, about: Any, given: list[torch.Tensor]) -> bool:
        """Hands the rows of a smaller batch to the route of a larger one, if there is one."""
        rows = _rows(given)
        larger = [shapes for count, shapes in self._alike.get(about, []) if count > rows]
        fitting = [shapes for shapes in larger if _differ_in_rows(shapes, given)]
        for shapes in fitting:
            for route in self._routes[about, shapes]:
                if not route.stale:
                    route.take_smaller(given)
        return bool(fitting)


def _rows(given: list[torch.Tensor]) -> int:
    return given[0].shape[0] if given[0].dim() else 1


def _differ_in_rows(shapes: Any, given: list[torch.Tensor]) -> bool:
    return len(shapes) == len(given) and all(
        tensor.dim() == len(shape)
        and tensor.dtype == dtype
        and tuple(tensor.shape[1:]) == shape[1:]
        for tensor, (shape, _, dtype, _, _) in zip(given, shapes, strict=True)
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and tensor.device.type != "meta"
    )


def _switches() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple(
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            for kind in ("cpu", "cuda")
        ),
        torch.get_num_threads(),
    )


def _plain_in(value: Any) -> Any:
    """Returns the numbers and strings among arguments, with the places that they are in."""
    if isinstance(value, torch.Tensor):
        return None
    if type(value) in PLAIN_KINDS:
        return value
    if isinstance(value, (tuple, list)):
        return tuple([_plain_in(item) for item in value])
    if isinstance(value, dict):
        return tuple((str(key), _plain_in(item)) for key, item in value.items())
    return type(value)
