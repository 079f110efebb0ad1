"""Holds every way of following a pass against the plain pass, on which no mode is on."""

import copy
import random
from collections.abc import Mapping
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from cachefreeze import lineage
from cachefreeze.lineage import calls

_SIMPLE = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def bits(tensor):
    """Returns the bytes of a tensor's elements, in order."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def look(value, above=()):
    """Describes an object with all tensors in it, so that two descriptions can be compared."""
    if isinstance(value, torch.Tensor):
        form = (value.dtype, tuple(value.shape), value.stride(), value.requires_grad)
        content = bits(value)
        return type(value).__name__, form, content
    if isinstance(value, _SIMPLE):
        return repr(value)
    if id(value) in above or isinstance(value, (nn.Module, type)) or callable(value):
        return type(value).__name__
    above = (*above, id(value))
    found = {}
    if isinstance(value, Mapping):
        found |= {f"[{key!r}]": look(item, above) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        found |= {f"[{place}]": look(item, above) for place, item in enumerate(value)}
    elif isinstance(value, np.ndarray):
        found["array"] = (str(value.dtype), value.shape, value.tobytes())
    for name, item in getattr(value, "__dict__", {}).items():
        found[f".{name}"] = look(item, above)
    return type(value).__name__, found


def tensors_in(value, above=()):
    """Yields the tensors in an object."""
    if isinstance(value, torch.Tensor):
        yield value
    elif id(value) not in above and not isinstance(value, (*_SIMPLE, nn.Module, type)):
        above = (*above, id(value))
        items = []
        if isinstance(value, Mapping):
            items += value.values()
        elif isinstance(value, (list, tuple)):
            items += value
        for item in (*items, *getattr(value, "__dict__", {}).values()):
            yield from tensors_in(item, above)


def differences(expected, seen, path=""):
    """Yields where two descriptions differ."""
    if expected == seen:
        return
    if (
        isinstance(expected, tuple)
        and isinstance(seen, tuple)
        and len(expected) == len(seen) == 2
        and isinstance(expected[1], dict)
        and isinstance(seen[1], dict)
    ):
        if expected[0] != seen[0]:
            yield f"{path}: {expected[0]}, not {seen[0]}"
        expected, seen = expected[1], seen[1]
    if isinstance(expected, dict) and isinstance(seen, dict):
        for key in dict.fromkeys((*expected, *seen)):
            if key not in expected or key not in seen:
                yield f"{path}{key}: {'missing' if key in expected else 'too much'}"
            else:
                yield from differences(expected[key], seen[key], f"{path}{key}")
    elif len(str(expected)) + len(str(seen)) < 400:
        yield f"{path}: {expected}, not {seen}"
    else:
        same_form = expected[:2] == seen[:2]
        yield f"{path}: other bits" if same_form else f"{path}: {expected[:2]}, not {seen[:2]}"


def random_states():
    numpy = np.random.get_state()
    return (
        bits(torch.get_rng_state()),
        random.getstate(),
        (numpy[1].tobytes(), *numpy[2:]),
    )


def seed_all(seed):
    torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a traceback
    random.seed(seed)
    np.random.seed(seed)


class Start:
    """The state of a model, to be put back."""

    def __init__(self, model):
        self._parts = [(part, self._content(vars(part))) for part in model.modules()]
        held = [*model.parameters(), *model.buffers()]
        self._held = [(tensor, tensor.detach().clone(), tensor.requires_grad) for tensor in held]

    @staticmethod
    def _content(held):
        return {
            key: (value, value.copy() if type(value) in (list, dict) else None)
            for key, value in held.items()
        }

    def put_back(self):
        for part, content in self._parts:
            held = vars(part)
            for key in [key for key in held if key not in content]:
                del held[key]
            for key, (value, copied) in content.items():
                held[key] = value
                if isinstance(copied, list):
                    value[:] = copied
                elif isinstance(copied, dict):
                    value.clear()
                    value.update(copied)
        for tensor, value, requires_grad in self._held:
            tensor.grad = None
            tensor.requires_grad_(False)
            tensor.data.copy_(value)
            tensor.requires_grad_(requires_grad)


def loss_of(tensors):
    """Returns a number to which every element contributes, each with another weight."""
    total = None
    for tensor in tensors:
        if tensor.requires_grad and tensor.numel():
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            weights = torch.linspace(0.5, 1.5, real.numel(), dtype=torch.float64)
            part = (real.double() * weights.view(real.shape)).sum()
            total = part if total is None else total + part
    return total


def all_but_head(name):
    return not name.startswith("head")


class Case:
    """A model, the way it is called, and its plain passes.

    Args:
        build: Function that makes the model.
        batch: Function from a seed to positional and keyword arguments.
        frozen: Function from the name of a parameter to whether it is frozen, or prefixes of the
            names of frozen ones.
        call: Function from the model to what is called. By default it is the model itself.
        train: Whether the model is in training mode. None leaves the modes of its parts.
        extra: Function from the model to what the loop reads after the pass.
        around: Function that makes a context around the call.
        before: Function called with the model before every pass.
        backward: Function that runs the backward pass from a loss.
    """

    def __init__(
        self,
        build,
        batch,
        *,
        frozen=all_but_head,
        call=None,
        train=False,
        extra=lambda model: None,
        around=nullcontext,
        before=lambda model: None,
        backward=torch.Tensor.backward,
    ):
        seed_all(0)
        self.model = build()
        prefixes = frozen if isinstance(frozen, (tuple, list)) else None
        for name, parameter in self.model.named_parameters():
            fixed = name.startswith(tuple(prefixes)) if prefixes is not None else frozen(name)
            parameter.requires_grad_(not fixed)
        if train is not None:
            self.model.train(train)
        self.called = call(self.model) if call else self.model
        self._batch, self._extra, self._around = batch, extra, around
        self._before, self._backward = before, backward
        self._start = Start(self.model)

    def run(self, way, seed):
        """Runs a pass from the same start as every other one.

        Args:
            way: Function of the callable and its arguments, which returns the output and more.
            seed: Seed of the batch.

        Returns:
            Description of everything the pass did, and what `way` returned beside the output.
        """
        self._start.put_back()
        self._before(self.model)
        args, kwargs = self._batch(seed)
        given = [tensor for tensor in tensors_in((args, kwargs)) if tensor.requires_grad]
        seed_all(5)
        with self._around():
            output, *rest = way(self.called, args, kwargs)
        extra = self._extra(self.model)
        seen = {"random afterwards ": random_states()}
        seen["output"] = look(output)
        seen["extra"] = look(extra)
        seen["arguments afterwards "] = look((args, kwargs))
        loss = loss_of(dict.fromkeys(tensors_in((output, extra))))
        if loss is not None:
            self._backward(loss)
        for name, parameter in self.model.named_parameters():
            seen[f"gradient of {name} "] = look(parameter.grad)
            seen[f"parameter {name} "] = look(parameter)
        for name, buffer in self.model.named_buffers():
            seen[f"buffer {name} "] = look(buffer)
        seen["gradients of inputs "] = look([tensor.grad for tensor in given])
        seen["random at the end "] = random_states()
        return seen, *rest

    def plain(self, seed):
        """Runs the pass as if this package was not there."""
        return self.run(lambda call, args, kwargs: (call(*args, **kwargs),), seed)[0]

    def trace(self, seed):
        return self.run(lambda call, args, kwargs: lineage.trace(call, *args, **kwargs), seed)

    def capture(self, plan, seed):
        return self.run(
            lambda call, args, kwargs: lineage.capture(plan, call, *args, **kwargs), seed
        )

    def replay(self, plan, kept, seed, leave_at=None):
        own = {number: tensor.clone() for number, tensor in kept.items()}
        return self.run(
            lambda call, args, kwargs: lineage.replay(
                plan, own, call, *args, leave_at=leave_at, **kwargs
            ),
            seed,
        )

    def computed(self, plan, seed):
        """Computes the kept values of a batch along the way of the traced pass."""
        self._start.put_back()
        args, kwargs = self._batch(seed)
        given = dict(zip(plan.trace.inputs, tensors_in((args, kwargs)), strict=True))
        found = plan.program.run(plan.cut.kept, given)
        return {number: tensor.detach().clone() for number, tensor in found.items()}


def held(expected, seen, what):
    found = list(differences(expected, seen))
    assert not found, f"{what}: {'; '.join(found[:6])}"


class Result:
    """What a case has shown.

    Attributes:
        case: The case.
        trace: Trace of the first batch.
        plan: Plan with what crosses.
        report: What happened at the replay of the traced batch.
        captured: What happened while its kept values were taken.
        other: What happened at the replay of another batch. None if it was not replayed.
    """

    def __init__(self, case, trace, plan, report, captured, other):
        self.case, self.trace, self.plan = case, trace, plan
        self.report, self.captured, self.other = report, captured, other

    @property
    def skipped(self):
        return self.report.skipped

    @property
    def left_out(self):
        """Names of the operations that are left out."""
        return [o.name for o in self.trace.operations if o.number not in self.plan.cut.runs]

    @property
    def ran(self):
        """Names of the operations that run, but for those that switch gradients."""
        runs = [o for o in self.trace.operations if o.number in self.plan.cut.runs]
        return [o.name for o in runs if o.name != "_set_grad_enabled"]


def check(build, batch, *, leaves=True, others=(2,), may_leave=False, **options):
    """Holds traced, captured and replayed passes against plain ones.

    Args:
        build: As of `Case`.
        batch: As of `Case`.
        leaves: Whether passes that stop skipping at each event are tried, too.
        others: Seeds of other batches that are replayed with the same plan.
        may_leave: Whether the passes may go on plainly, also with the traced batch.
        **options: As of `Case`.
    """
    case = Case(build, batch, **options)
    expected = case.plain(1)
    held(expected, case.plain(1), "the plain pass itself, repeated")
    seen, trace = case.trace(1)
    held(expected, seen, "trace")
    plan = lineage.Plan(trace, lineage.crossing_cut(trace))
    seen, kept, captured = case.capture(plan, 1)
    held(expected, seen, "capture")
    if kept is None and may_leave:
        report = _other(case, plan, 1)
        return Result(case, trace, plan, report, captured, _other(case, plan, 2))
    assert kept is not None, f"the traced batch was not captured: {captured.left}"
    seen, report = case.replay(plan, kept, 1)
    held(expected, seen, "replay")
    assert may_leave or not report.left, f"the traced batch was not replayed: {report.left}"
    with calls.catching():  # to replace `nn.Module.__call__` takes longer than these passes
        for leave_at in range(len(plan.replayed) + 1) if leaves else ():
            seen, _ = case.replay(plan, kept, 1, leave_at)
            held(expected, seen, f"replay that leaves at {leave_at}")
    _late_outputs(case, trace, kept, expected)
    other = None
    for seed in others:
        other = _other(case, plan, seed)
    return Result(case, trace, plan, report, captured, other)


def with_late_outputs(trace):
    """A plan that keeps nothing for the caller: what it reads of frozen work computes itself."""
    unread = copy.copy(trace)
    unread.outputs = [(number, False) for number, _ in trace.outputs]
    return lineage.Plan(unread, lineage.crossing_cut(unread))


def _late_outputs(case, trace, kept, expected):
    plan = with_late_outputs(trace)
    if kept.keys() >= set(plan.cut.kept):
        few = {number: kept[number] for number in plan.cut.kept}
    else:
        few = case.capture(plan, 1)[1]
    seen, _ = case.replay(plan, few, 1)
    held(expected, seen, "replay with late outputs")


def _other(case, plan, seed):
    expected = case.plain(seed)
    seen, kept, captured = case.capture(plan, seed)
    held(expected, seen, f"capture of batch {seed}")
    if kept is None:
        try:
            kept = case.computed(plan, seed)
        except Exception:
            return captured
    seen, report = case.replay(plan, kept, seed)
    held(expected, seen, f"replay of batch {seed}")
    if not captured.left:
        for leave_at in (1, len(plan.replayed) // 2, len(plan.replayed) - 1):
            seen, _ = case.replay(plan, kept, seed, leave_at)
            held(expected, seen, f"replay of batch {seed} that leaves at {leave_at}")
    return report


def rows(*shape, count=4):
    """Makes a function from a seed to a batch of one tensor of random rows."""

    def batch(seed):
        made = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
        return (made,), {}

    return batch


def body(width=6):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


class Wired(nn.Module):
    """A frozen body and a trained head, joined by a function of the test.

    Args:
        way: Function of the module and its arguments, the forward pass.
        **parts: Further parts.
    """

    def __init__(self, way, /, width=6, **parts):
        super().__init__()
        self.body, self.head = body(width), nn.Linear(width, 3)
        for name, part in parts.items():
            setattr(self, name, part)
        self._way = way

    def forward(self, *args, **kwargs):
        return self._way(self, *args, **kwargs)


def wired(way, **options):
    """Checks a frozen body and a trained head, joined by a function of the test."""
    parts = options.pop("parts", dict)
    batch = options.pop("batch", rows(6))
    width = options.pop("width", 6)
    return check(lambda: Wired(way, width, **parts()), batch, **options)
