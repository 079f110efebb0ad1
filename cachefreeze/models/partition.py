"""A ready-made model cut into units: by names, or between its blocks."""

import copy
import inspect
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from cachefreeze.errors import UserError
from cachefreeze.models.units import Units, agree, is_plain_sequence
from cachefreeze.randomness import random_state, set_random_state

# Blocks of dense layers, each of which takes the outputs of all before it, concatenated:
# torchvision and timm hand them on as a list. One tensor does as well, and can be cut anywhere.
DENSE_BLOCKS = {
    ("torchvision.models.densenet", "_DenseBlock"),
    ("timm.models.densenet", "DenseBlock"),
}
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def partition(
    model: nn.Module, units: Sequence[str] | None = None, *, example: Tensor | None = None
) -> Units:
    """A model as an ordered list of units over its own parameters.

    Nothing is copied, and `state_dict()` has the keys that it had. Change the model first (a new
    head, say) and move it to its device, then cut it: what is exchanged afterwards is not seen.

    Without `units` the cuts lie between blocks: a unit is a convolution or linear layer with the
    norm, activation and pooling behind it, or a module that cannot be cut inside (a residual block,
    an encoder layer), wherever a single tensor is handed on. The children of an `nn.Sequential`
    that all have parameters are its units as they are.

    Args:
        model: its forward pass takes one tensor, (N, ...), and returns anything.
        units: names of modules as in `model.named_modules()`, in the order of the forward pass; a
            unit begins with each, and the first one with the model. What follows a module (pooling,
            flattening) belongs to it. Modules that the forward pass does not call are in no unit,
            nor in `param_groups`.
        example: input of a row or more. With it the units are checked at once (`Units.check`);
            `PrefixCache` does that otherwise, before it keeps anything.

    Raises:
        UserError: the model cannot be cut (names the first place), or there is no such module.
        ValueError: units share parameters.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.resnet18(num_classes=10)
        >>> partition(model).names[:3]
        ('conv1', 'layer1.0', 'layer1.1')
        >>> partition(model, ["conv1", "layer3", "fc"]).names
        ('conv1', 'layer3', 'fc')
    """
    if isinstance(units, str):
        raise UserError(f"units is the text {units!r}: give a list of names")
    if units is not None:
        found = _named(model, list(units))
    elif is_plain_sequence(model) and all(
        next(child.parameters(), None) is not None for child in model.children()
    ):
        # Not `named_children`, which leaves out a module that comes a second time.
        children = {name: child for name, child in model._modules.items() if child is not None}
        found = Units(children, model)
    else:
        found = _automatic(model)
    if example is not None:
        found.check(example)
    return found


def _automatic(model: nn.Module) -> Units:
    try:
        flow = _Flow(model, _blocks(model))
    except _NotTraceableError as error:
        raise UserError(
            f"{type(model).__name__} cannot be cut automatically ({error}): give partition() the "
            "names of the modules at which its units begin"
        ) from error
    starts = _starts(flow)
    if len(starts) < 2:
        raise UserError(
            f"{type(model).__name__} cannot be cut: {flow.first_problem()}, and what is kept of a "
            "prefix is one tensor"
        )
    return flow.units(starts)


def _named(model: nn.Module, names: list[str]) -> Units:
    modules = dict(model.named_modules())
    for number, name in enumerate(names):
        if name not in modules or name == "":
            raise UserError(f"{type(model).__name__} has no module {name!r}")
        if name in names[:number]:
            raise UserError(f"units names {name!r} twice")
    if not names:
        raise UserError("units names no module: a network needs at least one unit")
    # What holds a named module has to be looked into; what is named, or holds none, has not.
    opaque = {
        module
        for path, module in modules.items()
        if path and not any(name.startswith(f"{path}.") for name in names)
    }
    try:
        flow = _Flow(model, opaque)
    except _NotTraceableError as error:
        # They may follow each other directly, and do all the work: `check` tells.
        chain = Units({name: modules[name] for name in names}, model)
        left = {id(p) for p in model.parameters()}
        left -= {id(p) for module in chain for p in module.parameters()}
        if left:
            raise UserError(
                f"{type(model).__name__} cannot be cut at these modules ({error}): name all that "
                "have parameters, or cut an nn.Sequential"
            ) from error
        return chain
    starts: dict[int, str] = {}
    for name in names:
        place = flow.place_of(name)
        if place is None:
            raise UserError(
                f"{type(model).__name__} does not call {name!r}, or calls it in another module "
                "that is named: leave out one of the two"
            )
        if starts:
            if place <= max(starts):
                raise UserError(f"{name!r} runs before {names[len(starts) - 1]!r}: swap them")
            problem = flow.problem_at(place)
            if problem is not None:
                raise UserError(
                    f"{type(model).__name__} cannot be cut before {name!r}: {problem}, and what is "
                    "kept of a prefix is one tensor"
                )
        starts[place if starts else 0] = name
    return flow.units(starts)


class _NotTraceableError(Exception):
    """A forward pass that symbolic tracing does not get through; why, in a few words."""


class _Tracer(fx.Tracer):
    """Writes down what a forward pass does, with some modules as steps that it does not look into.

    Args:
        opaque: those modules, beside torch's own; None is all.
    """

    def __init__(self, opaque: set[nn.Module] | None) -> None:
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.opaque is None or m in self.opaque:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        # The first argument alone is traced: the others have the values they have by default.
        name = next(iter(inspect.signature(self.root.forward).parameters), "x")
        return root_fn, [self.root, self.create_proxy("placeholder", name, (), {})]

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        if not torch.is_grad_enabled():
            raise _NotTraceableError("it switches gradients off for a part of its forward pass")
        return super().create_proxy(*args, **kwargs)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if _is_dense_block(m) and self.opaque is not None and m not in self.opaque:
            (x,) = args
            for layer in m.children():
                x = torch.cat([x, layer(x)], 1)
            return x
        return super().call_module(m, forward, args, kwargs)


def _is_dense_block(module: nn.Module) -> bool:
    kind = type(module)
    return (kind.__module__, kind.__name__) in DENSE_BLOCKS


def _trace(module: nn.Module, opaque: set[nn.Module] | None, training: bool) -> fx.Graph:
    parameters = list(inspect.signature(module.forward).parameters.values())
    inputs = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if sum(p.default is p.empty for p in inputs) > 1:
        raise _NotTraceableError("it takes more than one input")
    before = {each: dict(vars(each)) for each in module.modules()}
    here = torch.device("cpu")
    numbers = random_state(here)
    try:
        for each in before:
            each.training = training
        with torch.enable_grad():
            graph = _Tracer(opaque).trace(module)
        # What tracing sees is a constant from then on.
        if not agree(random_state(here), numbers):
            raise _NotTraceableError("it draws random numbers outside of its modules")
        for each, attributes in before.items():
            for name, value in vars(each).items():
                own = name == "training" or name.startswith("_tensor_constant")
                if not own and attributes.get(name) is not value:
                    raise _NotTraceableError(f"it sets its attribute {name}")
        return graph
    except _NotTraceableError:
        raise
    except Exception as error:  # whatever a forward pass may do with what is no tensor
        words = str(error).strip().partition("\n")[0] or type(error).__name__
        raise _NotTraceableError(words) from error
    finally:
        for each, attributes in before.items():
            constants = {n: v for n, v in vars(each).items() if n.startswith("_tensor_constant")}
            vars(each).clear()
            vars(each).update(attributes | constants)
        set_random_state(numbers, here)


def _blocks(model: nn.Module) -> set[nn.Module]:
    """Modules that are not looked into: those without parts, and all of a class of which one does
    more than to run its parts one after the other.

    All of a class: residual blocks that change the shape could often be cut in the middle, those
    that keep it cannot, and both are one thing to whoever freezes them.
    """
    modules = [module for module in model.modules() if module is not model]
    whole = {
        type(layer) for block in filter(_is_dense_block, modules) for layer in block.children()
    }
    for module in modules:
        if type(module) not in whole and not _is_container(module) and not _is_chain(module):
            whole.add(type(module))
    return {module for module in modules if type(module) in whole}


def _is_container(module: nn.Module) -> bool:
    """Whether a module does nothing but to hold others."""
    held = isinstance(module, nn.ModuleList | nn.ModuleDict) and not _is_custom(module)
    return held or is_plain_sequence(module) or _is_dense_block(module)


def _is_custom(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _is_chain(module: nn.Module) -> bool:
    """Whether a module runs its parts one after the other, a single tensor handed on."""
    if next(module.children(), None) is None or isinstance(module, NORMS):
        return False
    try:
        flow = _Flow(module, None)
    except _NotTraceableError:
        return False
    # What runs its parts in another way in training follows its own mode, as a module.
    return flow.same_in_both_modes() and all(
        len(stretch) == 1
        for _, stretch in flow.stretches()
        if any(node.op == "call_module" for node in stretch if flow.owned(node))
    )


class _Flow:
    """What a forward pass does, in order, and where it can be cut.

    A place is a number of steps that come before it. It can be cut where one value only is needed
    afterwards, and no parameter is used on both sides.

    Args:
        model: whose forward pass it is.
        opaque: see `_Tracer`.

    Raises:
        _NotTraceableError: tracing does not get through.
    """

    def __init__(self, model: nn.Module, opaque: set[nn.Module] | None) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        graphs = [_trace(model, opaque, training) for training in (True, False)]
        self.trained, self.evaluated = map(_in_order, graphs)
        self.nodes = self.evaluated
        self.alike = _alike(self.trained, self.evaluated)
        self._crossing = [_crossing(nodes, self._held) for nodes in (self.trained, self.evaluated)]
        # Where the two modes part for good, nothing can be cut that both have.
        self.places = [
            place
            for place in range(1, self.alike + 1)
            if all(len(values[place]) == 1 for values in self._crossing)
        ]

    def owned(self, node: fx.Node) -> list[int]:
        """The parameters that a step uses."""
        if node.op == "call_module":
            return [id(each) for each in self.modules[str(node.target)].parameters()]
        if node.op == "get_attr":
            value = _attribute(self.model, str(node.target))
            return [id(value)] if isinstance(value, nn.Parameter) else []
        return []

    def _held(self, node: fx.Node) -> list[int]:
        """The parameters and buffers that a step uses: running statistics change like weights."""
        buffers: list[int] = []
        if node.op == "call_module":
            buffers = [id(each) for each in self.modules[str(node.target)].buffers()]
        return self.owned(node) + buffers

    def same_in_both_modes(self) -> bool:
        """Whether training does all that evaluation does, and nothing else."""
        steps = [
            [(node.op, node.target, str(node.args), str(node.kwargs)) for node in nodes]
            for nodes in (self.trained, self.evaluated)
        ]
        return steps[0] == steps[1]

    def has_parameters(self, nodes: Iterable[fx.Node]) -> bool:
        return any(self.owned(node) for node in nodes)

    def stretches(self) -> Iterator[tuple[int, list[fx.Node]]]:
        """From every place where it can be cut to the next: where they begin, and their steps."""
        for start, stop in pairwise(sorted({0, *self.places, len(self.nodes)})):
            yield start, self.nodes[start:stop]

    def place_of(self, name: str) -> int | None:
        """Before the first call of a module."""
        for place, node in enumerate(self.nodes):
            if node.op == "call_module" and node.target == name:
                return place
        return None

    def problem_at(self, place: int) -> str | None:
        """Why it cannot be cut there, if so."""
        if place in self.places:
            return None
        values = sorted(map(str, self._crossing[-1][place]))
        if len(values) > 1:
            some = ", ".join(values[:4])
            return f"{len(values)} values are still needed there ({some})"
        return "in training mode it goes another way than in eval mode"

    def first_problem(self) -> str:
        """The first place where more than one value is needed, or that there is nothing to cut."""
        for place in range(1, len(self.nodes)):
            problem = self.problem_at(place)
            if problem is not None:
                return f"after {self.nodes[place - 1].name} {problem}"
        return "it has parameters in one place only"

    def units(self, starts: dict[int, str]) -> Units:
        """The units that begin at these places, by their names."""
        bounds = [*starts, len(self.nodes)]
        spans = list(pairwise(bounds))
        calls: dict[str, set[int]] = {}  # which units call a module
        for number, (start, stop) in enumerate(spans):
            for nodes in self._both(start, stop):
                for node in nodes:
                    if node.op == "call_module":
                        calls.setdefault(str(node.target), set()).add(number)
        shared = {id(self.modules[name]) for name, users in calls.items() if len(users) > 1}
        names = self._unique(list(starts.values()))
        modules = [self._unit(start, stop, shared) for start, stop in spans]
        return Units(dict(zip(names, modules, strict=True)), self.model)

    @staticmethod
    def _unique(names: list[str]) -> list[str]:
        return [
            name if names.count(name) == 1 else f"{name}_{names[:i].count(name) + 1}"
            for i, name in enumerate(names)
        ]

    def _both(self, start: int, stop: int) -> tuple[list[fx.Node], list[fx.Node]]:
        """A stretch in training and in eval mode; the last one goes to the end of both."""
        if stop == len(self.evaluated):
            return self.trained[start:], self.evaluated[start:]
        return self.trained[start:stop], self.evaluated[start:stop]

    def _unit(self, start: int, stop: int, shared: set[int]) -> nn.Module:
        trained, evaluated = self._both(start, stop)
        if len(evaluated) == 1 and len(trained) == 1:
            (node,) = evaluated
            module = self.modules.get(str(node.target))
            simple = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
            returned = stop < len(self.nodes) or self._output(evaluated).args[0] is node
            if module is not None and simple and returned and id(module) not in shared:
                return module
        graphs = [
            self._graph(nodes, start, stop, crossing)
            for nodes, crossing in zip((trained, evaluated), self._crossing, strict=True)
        ]
        parts = [fx.GraphModule(self.model, graph, type(self.model).__name__) for graph in graphs]
        borrowed: dict[int, Borrowed] = {}
        for part in parts:
            for path, module in list(part.named_modules(remove_duplicate=False)):
                if id(module) in shared:
                    own = borrowed.setdefault(id(module), Borrowed(module))
                    parent, _, name = path.rpartition(".")
                    setattr(part.get_submodule(parent), name, own)
        if parts[0].code == parts[1].code:
            return parts[1]
        return Modes(self.model, *parts)

    def _output(self, nodes: list[fx.Node]) -> fx.Node:
        return next(node for node in reversed(nodes[-1].graph.nodes) if node.op == "output")

    def _graph(
        self, nodes: list[fx.Node], start: int, stop: int, crossing: list[set[Any]]
    ) -> fx.Graph:
        """A stretch as a graph of its own, from the one value that it takes to what it gives."""
        graph = fx.Graph()
        if start == 0:
            source = next(node for node in nodes[0].graph.nodes if node.op == "placeholder")
        else:
            (source,) = crossing[start]
        values = {source: graph.placeholder("x")}
        for node in nodes:
            values[node] = graph.node_copy(node, lambda used: values[used])
        if stop < len(self.nodes):
            (result,) = crossing[stop]
            graph.output(values[result])
        else:
            output = self._output(nodes)
            graph.output(fx.node.map_arg(output.args[0], lambda used: values[used]))
        graph.lint()
        return graph


class Modes(nn.Module):
    """A stretch of a model that does something else when it trains, and is not a module there."""

    _mode_of: nn.Module

    def __init__(self, model: nn.Module, trained: nn.Module, evaluated: nn.Module) -> None:
        super().__init__()
        self.trained = trained
        self.evaluated = evaluated
        # Whose mode it follows: not a part of this.
        object.__setattr__(self, "_mode_of", model)

    def forward(self, x: Tensor) -> Any:
        # Nothing but freezing puts this itself into eval mode.
        train = self.training and self._mode_of.training
        return self.trained(x) if train else self.evaluated(x)


class Borrowed(nn.Module):
    """A module without parameters that several units use, as one of them has it: it freezes with
    that unit, and follows the original's mode until then."""

    _mode_of: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.own = copy.deepcopy(original)
        object.__setattr__(self, "_mode_of", original)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Nothing but freezing puts this itself into eval mode.
        for own, original in zip(self.own.modules(), self._mode_of.modules(), strict=True):
            own.training = self.training and original.training
        return self.own(*args, **kwargs)


def _starts(flow: _Flow) -> dict[int, str]:
    """Where automatic units begin, and their names."""
    units: list[tuple[int, list[fx.Node]]] = []
    kind = parent = ""
    for start, stretch in flow.stretches():
        what, where = _kind(flow, stretch)
        if not any(flow.has_parameters(nodes) for _, nodes in units):
            begins = not units
        elif kind == "layer":  # a norm belongs to the layer before it
            begins = what in ("layer", "block")
        elif kind == "norm":  # or to the one behind it, in a part that begins with one
            together = where == parent != ""
            begins = what in ("norm", "block") or (what == "layer" and not together)
        else:
            begins = what in ("layer", "norm", "block")
        if begins:
            units.append((start, []))
        units[-1][1].extend(stretch)
        if what in ("layer", "norm", "block"):
            if begins or kind in ("", "norm"):
                kind = what
            parent = where
    within: dict[str, set[int]] = {}  # which units have parameters of a module
    for number, (_, nodes) in enumerate(units):
        for node in filter(flow.owned, nodes):
            for path in _paths(str(node.target)):
                within.setdefault(path, set()).add(number)
    several = {path for path, numbers in within.items() if len(numbers) > 1}
    return {start: _unit_name(flow, nodes, several) for start, nodes in units}


def _kind(flow: _Flow, nodes: list[fx.Node]) -> tuple[str, str]:
    """What a stretch is for its neighbours, and the module that it lies in: a bare `layer`, a
    `norm`, a `block`, something `small` with parameters of its own, or nothing that can freeze."""
    owning = [node for node in nodes if flow.owned(node)]
    if not owning:
        return "nothing", ""
    calls = [node for node in owning if node.op == "call_module"]
    parent = str(owning[0].target).rpartition(".")[0]
    if not calls:
        return "small", parent
    if len(calls) > 1:
        return "block", parent
    module = flow.modules[str(calls[0].target)]
    if isinstance(module, NORMS):  # which may hold its activation
        return "norm", parent
    if next(module.children(), None) is not None:
        return "block", parent
    if "norm" in type(module).__name__.lower():
        return "norm", parent
    small = isinstance(module, nn.PReLU) or sum(p.dim() > 1 for p in module.parameters()) == 0
    return ("small" if small else "layer"), parent


def _paths(name: str) -> list[str]:
    """A module's name and those of all that hold it, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _unit_name(flow: _Flow, nodes: list[fx.Node], several: set[str]) -> str:
    """Of the outermost module whose parameters are all in one unit."""
    for node in nodes:
        if flow.owned(node):
            paths = _paths(str(node.target))
            return next((path for path in paths if path not in several), paths[-1])
    return nodes[0].name


def _in_order(graph: fx.Graph) -> list[fx.Node]:
    """The steps of a graph, what it takes from the model's attributes just before its use."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    attributes = {node for node in nodes if node.op == "get_attr"}
    ordered: list[fx.Node] = []
    for node in nodes:
        if node not in attributes:
            ordered += [used for used in node.all_input_nodes if used in attributes - set(ordered)]
            ordered.append(node)
    return ordered


def _crossing(nodes: list[fx.Node], owned: Any) -> list[set[Any]]:
    """For every place the values, and parameters in use, that are needed on both sides."""
    places: dict[fx.Node, int] = {node: place for place, node in enumerate(nodes)}
    result: list[set[Any]] = [set() for _ in range(len(nodes) + 1)]
    inputs = [node for node in nodes[0].graph.nodes if node.op == "placeholder"] if nodes else []
    for node in (*inputs[:1], *nodes):
        made = places.get(node, -1)
        # What the output returns is needed at the very end.
        last = max((places.get(user, len(nodes)) for user in node.users), default=made)
        for place in range(made + 1, last + 1):
            result[place].add(node)
    uses: dict[int, list[int]] = {}
    for place, node in enumerate(nodes):
        for parameter in owned(node):
            uses.setdefault(parameter, []).append(place)
    for at in uses.values():
        for place in range(at[0] + 1, at[-1] + 1):
            result[place].add(f"a parameter of {nodes[at[0]].name}")
    return result


def _alike(trained: list[fx.Node], evaluated: list[fx.Node]) -> int:
    """Up to which place two lists of steps are the same, but for constants: all, or how many of the
    first."""

    def shape(node: fx.Node) -> tuple[Any, ...]:
        return node.op, node.target, [used.name for used in node.all_input_nodes]

    for place, (one, other) in enumerate(zip(trained, evaluated, strict=False)):
        if shape(one) != shape(other):
            return place
    if len(trained) != len(evaluated):
        return min(len(trained), len(evaluated))
    return len(trained)


def _attribute(model: nn.Module, path: str) -> Any:
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name)
    return value
