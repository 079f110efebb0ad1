"""One traced way through a model: when its kept values are trusted, and when they are served."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from cachefreeze import lineage
from cachefreeze.cache.family import Family
from cachefreeze.cache.selection import Keys, Selection
from cachefreeze.cache.shared import Shared
from cachefreeze.keys import Surroundings, same_bits
from cachefreeze.lineage import Trace, unloaded
from cachefreeze.lineage.operations import CONSTANT, INPUT
from cachefreeze.lineage.program import copy_of
from cachefreeze.lineage.structure import matches, tensors
from cachefreeze.plan.costs import LEAST_SHARE
from cachefreeze.plan.pace import Kind, Meter
from cachefreeze.store.files import human_bytes

Tensor = torch.Tensor

# Share of a forward pass for whose sake the user is told of modules in training mode.
_WORTH_TELLING = 0.05
# Number of served batches after which one is compared, and then at twice that number, and so on.
_FIRST_SAMPLE = 16
# Number of passes in a row that may go another way than the traced one.
_MOST_LOST = 3
# Number of calls within which frozen bits must not move twice.
_REST = 4
# Number of batches after which it is noted that no row has come again.
_FIRST_NOTE = 8
# Number of batches that wait in memory where there is a directory for their rows.
_FEW_WAITING = 8
# Largest number of smaller batches whose inputs wait to be computed in whole ones.
_MOST_SMALLER = 16
# Number of served passes after which the caller has read the same values again and again.
_OFTEN = 2


class State(Enum):
    """What becomes of a batch.

    Until a row comes again, batches are kept as they are. Then they are taken apart into rows, and
    the first batches that could be served are computed and compared. Then batches are served. A
    route that rests leaves its model alone, one by parts leaves it to the frozen modules inside;
    a stale one must be traced anew, and so must an undecided one, whose times make no sense.
    """

    KEEPING = "keeping"
    PROBATION = "probation"
    SERVING = "serving"
    RESTING = "resting"
    BY_PARTS = "by parts"
    UNDECIDED = "undecided"
    STALE = "stale"


@dataclass(eq=False)
class _Batch:
    """A batch that is not taken apart into rows yet.

    Attributes:
        keys: Keys of its rows.
        kept: Kept values, by number.
    """

    keys: Keys
    kept: dict[int, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.kept.values())


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _unknown(places: Mapping[int, np.ndarray]) -> bool:
    return any((place < 0).any() for place in places.values())


class Route:
    """One traced way through a model, for one signature.

    Args:
        shared: What all routes of the cache have in common.
        name: Name of the module, for people.
        trace: Trace of a pass.
        around: What code has read beside its arguments in that pass.
        inputs: Copies of the tensors that the pass was given.
        before: Route of the same calls from when less was frozen, if there is one. Its rows serve
            to compute those of this one.
        like: Route of the same calls on rows that are padded to another length, if there is one.
            If the same values can be kept, rows are shared with it.
        last: Whether the pass is not traced once more, if frozen work seems to take little time.

    Attributes:
        state: What becomes of a batch.
        selection: What is kept of the pass.
        meter: Seconds of its calls.
    """

    def __init__(
        self,
        shared: Shared,
        name: str,
        trace: Trace,
        around: Surroundings,
        inputs: Sequence[Tensor],
        before: "Route | None" = None,
        like: "Route | None" = None,
        last: bool = True,
    ) -> None:
        self.state = State.KEEPING
        self._shared = shared
        self._name = name
        self._trace = trace
        self._around = around
        self._example = dict(zip(trace.inputs, inputs, strict=True))
        self._smaller: list[dict[int, Tensor]] = []
        self._pending: list[_Batch] = []
        self._compared = self._served = self._lost = 0
        self.family = Family()
        self._like: Selection | None = None
        if like is not None and like.selection.is_like(trace):
            self.family, self._like = like.family, like.selection
        self.family.batches += 1
        self.family.routes += 1
        self._next_sample = _FIRST_SAMPLE
        self._moved_at, self._moving = -_REST, shared.moving.version
        self._began = 0.0
        self._stored = False
        self._written = 0
        self._calls, self._carries_on = 0, False
        self._reports: list[lineage.Report] = []
        self._last = last
        self._guards = [
            one
            for one in trace.operations
            if one.escapes and all(trace.values[n].kind in (INPUT, CONSTANT) for n in one.reads)
        ]
        self._has_traced = False
        self._select(self._example)
        plan = self.selection.plan
        # The route from when less was frozen, if its rows lead to those of this one.
        self._earlier: tuple[Route, lineage.Extension] | None = None
        if before is not None:
            extension = lineage.Extension(before.selection.plan, plan)
            # What is made of rounded rows is too far from what is computed.
            exact = shared.entries.codec != "int8"
            self._earlier = (before, extension) if extension.is_complete and exact else None
        self.meter = Meter(shared.pace, plan.followed, plan.cut.seconds_saved)
        held = trace.take_held(plan.cut.kept)
        if self.state is State.KEEPING and held is not None:
            self._has_traced = True
            kept = {number: copy_of(tensor) for number, tensor in held.items()}
            self._pend(_Batch(self.selection.keys(self._example), kept))

    def _select(self, inputs: Mapping[int, Tensor]) -> None:
        """Chooses what is kept, and rests if that saves too little."""
        self.selection = Selection(self._shared, self._trace, inputs, self._name, self._like)
        share, states = self.selection.share, self._trace.states
        if self.selection.kept and share >= LEAST_SHARE:
            if self.selection.joins():
                self.state = State.BY_PARTS
                return
            self.selection.name()
            self._stored = self.selection.is_stored
            if hidden := self.selection.in_memory_only:
                self._shared.tell(
                    f"{self._name}: directory",
                    f"Rows of {hidden} in {self._name} are kept in memory only: code that is not "
                    "torch's made them in one operation, and might be edited without being "
                    "noticed.",
                )
            self._note(self.selection.keys(inputs))
            if lineage.more_in_eval_mode(self._trace) > _WORTH_TELLING:
                limits = lineage.limits_of(self._trace, share)
                self._shared.tell(
                    f"{self._name}: modes",
                    f"The cache leaves out {share:.0%} of the forward pass of {self._name}. "
                    f"{limits[-1]}",
                )
            return
        operations = len(self._trace.operations)
        left_out = operations - len(self.selection.plan.cut.runs)
        if not self._last and self.selection.kept and left_out > LEAST_SHARE * operations:
            # Other processes may have held up one operation.
            self.state = State.UNDECIDED
            return
        if all(state.trained for state in states if isinstance(state.tensor(), nn.Parameter)):
            # A call is not followed unless some parameter of it takes no gradient.
            why = "what takes no gradient in it moves from call to call all the same"
        elif any(self._trace.values[number].requires_grad for number in self._trace.inputs):
            why = "its input takes gradient"
        elif share >= LEAST_SHARE:
            why = "nothing in the call itself takes what its frozen work makes"
        else:
            why = f"frozen work that could be left out is {share:.0%} of its forward pass"
        self.rest(why, lineage.limits_of(self._trace, share))

    def rest(self, why: str, more: Sequence[str] = ()) -> None:
        """Leaves the model alone from now on, and says why.

        Args:
            why: Reason, to follow a colon.
            more: Further sentences.
        """
        self.state = State.RESTING
        self._drop_batches()
        self._smaller = []
        sentence = " ".join([f"{self._name} is not cached: {why}.", *more])
        self._shared.tell(f"{self._name}: {why}", sentence)

    def free(self) -> None:
        """Forgets everything that was kept."""
        self._drop_batches()
        self.selection.forget()

    def _drop_batches(self) -> None:
        self._has_traced = False
        self._shared.held -= sum(batch.nbytes for batch in self._pending)
        self._pending = []

    @property
    def has_rows(self) -> bool:
        """Whether rows are kept, by which those of a route with more frozen work may be made."""
        follows = self.state in (State.KEEPING, State.PROBATION, State.SERVING)
        return follows and not self.stale and (self.selection.settled or bool(self._pending))

    @property
    def stale(self) -> bool:
        """Whether the pass must be traced anew, for parameters have moved, rest or are gone."""
        return (
            self.state is State.STALE
            or self._moving != self._shared.moving.version
            or self.selection.gone
            or self.family.broken
        )

    def difference(self, given: Any) -> str:
        """Says in a few words what has changed since the traced pass, or returns nothing."""
        return self._trace.signature.difference(given) or self._around.difference()

    def fits(self, given: Any) -> bool:
        """Says whether a call is one of this kind, and goes this way.

        It does as far as modules, hooks, attributes and python numbers taken from the batch tell.
        """
        if self.difference(given):
            return False
        if not self._guards:
            return True
        inputs = dict(zip(self._trace.inputs, tensors(given), strict=True))
        unloaded.load_in([inputs[n] for one in self._guards for n in one.reads if n in inputs])
        program = self.selection.plan.program
        return all(
            matches(guard.output, program.result(guard, inputs), lambda tensor: -1)
            for guard in self._guards
        )

    def carry_on(self) -> bool:
        """Goes on serving the same values although more has frozen in the meantime.

        What has frozen anew runs as it did. A new trace costs as much as some steps: where units
        freeze faster than an epoch passes, one does for several of them.

        Returns:
            Whether modules in which something is left out are as they were.
        """
        if self.state is not State.SERVING or self.stale or self.is_outgrown:
            return False
        if not self._trace.signature.renew(self.selection.plan.modules_around()):
            return False
        self._carries_on = True
        return True

    @property
    def is_outgrown(self) -> bool:
        """Whether more has frozen, and it is time to leave out more."""
        return self._carries_on and (
            self._shared.filling is not None or self._calls >= self._batches_of_an_epoch
        )

    @property
    def _batches_of_an_epoch(self) -> int:
        before = self._earlier[0]._batches_of_an_epoch if self._earlier is not None else 0
        return max(self.family.epoch, before)

    @property
    def pauses(self) -> bool:
        """Whether calls are left alone for now, since nothing has come of keeping them."""
        return self.state is State.KEEPING and not self.family.again and self.meter.pauses

    @property
    def at_rest(self) -> bool:
        """Whether the next calls are left alone whatever they are given."""
        return self.state is State.RESTING or (self.pauses and not self.meter.may_note)

    def pass_by(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leaves a call alone, but for noting its rows where that costs next to nothing."""
        unloaded.load_in((args, kwargs))
        if self.meter.may_note:
            began = perf_counter()
            inputs = dict(zip(self._trace.inputs, tensors((args, kwargs)), strict=True))
            self.family.batches += 1
            self.family.left_alone += 1
            if self._note(self.selection.keys(inputs)):
                self._look_at_weights()
                if self.state is State.KEEPING:
                    self._settle(self._example)
            seconds = perf_counter() - began
            self.meter.note(Kind.NOTED, seconds, seconds)
        return module(*args, **kwargs)

    def call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], began: float
    ) -> Any:
        """Runs a call of the module, or replays it with kept values.

        Args:
            module: Module that is called.
            args: Positional arguments.
            kwargs: Keyword arguments.
            began: Time at which the call began, in seconds.
        """
        self._began = began
        self._calls += 1
        inputs = dict(zip(self._trace.inputs, tensors((args, kwargs)), strict=True))
        self._look_at_late_values(inputs)
        self._look_at_weights()
        if self.state in (State.RESTING, State.STALE):
            return self._uncached(module, args, kwargs)
        family = self.family
        family.batches += 1
        self._shared.entries.now += 1
        keys = self.selection.keys(inputs)
        earlier = None
        if self.state is State.KEEPING:
            self._load(inputs)
            earlier = self._from_before(inputs)
            again = family.again or self._note(keys) or self._lie_on_disk(keys)
            if not again and earlier is None:
                if self.meter.wants_plain(Kind.KEPT):
                    self._put_aside(inputs)
                    return self._plainly(module, args, kwargs)
                return self._keep(module, args, kwargs, keys)
            self._settle(self._example)
        family.after += 1
        self._shared.stats.batches += 1
        places = self.selection.find(keys)
        first = next(iter(places.values()))
        family.count((len(first), int((first >= 0).sum())))
        if _unknown(places):
            self._load(inputs)
            earlier = earlier or self._from_before(inputs)
            if earlier is None:
                return self._add(module, args, kwargs, keys)
            self.selection.write(keys, self.selection.compute(inputs, earlier))
            places = self.selection.find(keys)
            if _unknown(places):  # there was no room for all rows
                return self._add(module, args, kwargs, keys)
        family.known += 1
        self._shared.stats.batches_known += 1
        if self.state is State.PROBATION and self._is_proven:
            self.state = State.SERVING
        all_of_them = self._shared.report.verify == "all"
        if self.state is State.PROBATION or all_of_them or self._sample_is_due():
            return self._compare(module, args, kwargs, keys, places)
        if self.meter.wants_plain(Kind.SERVED):
            return self._plainly(module, args, kwargs)
        kept = self.selection.read(keys, places)
        if kept is None:  # on the disk, and damaged
            return self._add(module, args, kwargs, keys)
        return self._serve(module, args, kwargs, kept)

    def _plainly(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Runs a call as if there were no cache, to see how long it takes."""
        if self.state is State.KEEPING:
            self._shared.note(
                f"{self._name}: pace",
                f"Calls of {self._name} are short, so that following all of them takes more than "
                "1 % of the time: some are left alone until rows come again.",
            )
        self._load((args, kwargs))
        self.family.left_alone += self.state is State.KEEPING
        began = perf_counter()
        output = module(*args, **kwargs)
        self.meter.note_plain(perf_counter() - began)
        self._shared.stats.rows_computed += self.selection.rows
        return output

    def _uncached(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        unloaded.load_in((args, kwargs))
        return module(*args, **kwargs)

    def _load(self, given: Any) -> None:
        """Loads what is not loaded yet. It takes the loader's time, and not that of the call."""
        began = perf_counter()
        unloaded.load_in(given)
        self._began += perf_counter() - began

    def would_serve(self, rows: Sequence[np.ndarray]) -> bool:
        """Says whether a batch is served without a look at its values, as far as can be told.

        Args:
            rows: Keys of its rows, for each of the tensors that it is made of.
        """
        ready = self.state is State.SERVING or (self.state is State.PROBATION and self._is_proven)
        ready = ready and self._shared.report.verify != "all"
        return ready and not self.stale and self.selection.knows(rows)

    # Before a row has come again.

    def _note(self, keys: Keys) -> bool:
        """Notes the rows of a batch. Says whether half of them were there before."""
        alike = self.selection.alike
        return self.family.note([(alike(group), wanted) for group, wanted in keys.items()])

    def _lie_on_disk(self, keys: Keys) -> bool:
        """Says whether half of the rows of a batch are there from other runs."""
        if not self._stored:
            return False
        if not self.selection.settled:
            self._split(self._example)
        places = self.selection.find(keys)
        return all(2 * (place >= 0).sum() >= len(place) for place in places.values())

    def _keep(self, module: nn.Module, args: Any, kwargs: dict[str, Any], keys: Keys) -> Any:
        output, kept = self._capture(module, args, kwargs)
        if kept is not None and self.state is State.KEEPING:
            self._pend(_Batch(keys, kept))
        return output

    def _pend(self, batch: _Batch) -> None:
        """Keeps a batch as it is until rows come again, or in rows if it is known how."""
        if self.selection.settled:
            self.selection.write(batch.keys, batch.kept)
            self._written += batch.nbytes
            if self._shared.most_useless < self._written:
                self._withdraw(
                    f"{self.family.share_again}, and those that are kept fill "
                    f"{human_bytes(self._written)} of the directory"
                )
            return
        self._pending.append(batch)
        self._shared.held += batch.nbytes
        limit = self._shared.entries.max_bytes
        if self._shared.entries.directory is not None:
            if len(self._pending) == _FEW_WAITING or self._shared.held > limit:
                self._split(self._example)
        elif self._shared.held > limit:
            self._shared.entries.make_room(0, self._shared.held)
        if self._shared.held > limit:
            self.rest(
                f"no row came again among the first {self._rows_seen:,}, which fill "
                f"max_bytes ({limit / 1e9:.2g} GB)",
                ["If it is the data set that is larger, a larger max_bytes helps."],
            )
        elif self.family.batches >= _FIRST_NOTE and _is_power_of_two(self.family.batches):
            self._shared.note(
                f"{self._name}: rows",
                f"No row of {self._name} has come again among the first {self._rows_seen:,}: "
                "nothing was served. Augmentation, mixup or noise in front of frozen work make "
                "every row another one.",
            )

    @property
    def _rows_seen(self) -> int:
        return self.family.batches * self.selection.rows

    def _settle(self, inputs: Mapping[int, Tensor]) -> None:
        """Takes what was kept apart into rows, now that rows come again.

        Args:
            inputs: Inputs of some batch, by which the place of the rows is found.
        """
        began = perf_counter()
        self._shared.messages.pop(f"{self._name}: rows", None)
        self._shared.messages.pop(f"{self._name}: pace", None)
        self.state = State.PROBATION
        is_known = self._earlier is not None and self._earlier[0].family.is_proven
        self.family.begin(self._shared.probation, is_known)
        if not self.selection.settled:
            self._split(inputs)
        self._fill_up()
        # It is counted by itself, and not as a part of this call.
        self._began += perf_counter() - began

    def _split(self, inputs: Mapping[int, Tensor]) -> None:
        """Finds where the rows are in kept values, and takes apart what was kept in batches.

        Args:
            inputs: Inputs of some batch.
        """
        selection, began = self.selection, perf_counter()
        if self._shared.entries.directory is not None:
            # What gets to the disk stays: all bits are looked at before.
            self._shared.weights.suspect(selection.frozen)
            if moved := selection.name():
                self._tell_if_late(moved)
                self._drop_batches()
        known: dict[int, tuple[Tensor, lineage.Axis]] = {}
        if self._earlier is not None:
            before, extension = self._earlier
            axes = extension.values(before.selection.axes)
            found = self._from_before(inputs) or {}
            known = {number: (found[number], axes[number]) for number in axes.keys() & found}
        kept = selection.settle(inputs, known)
        if not self._has_traced:
            keys = selection.keys(inputs)
            if _unknown(selection.find(keys)):
                given = {number: tensor for number, (tensor, _) in known.items()}
                selection.write(keys, kept or selection.compute(inputs, given))
        # What is left of the traced batch are the inputs that all rows share.
        self._example = selection.shared_of(self._example)
        for batch in self._pending:
            selection.write(batch.keys, batch.kept)
            self._shared.held -= batch.nbytes
            batch.kept = {}
        self._pending = []
        self.meter.note_once(perf_counter() - began)

    def write_all(self) -> None:
        """Takes apart what is kept in batches still, so that it gets to the disk."""
        if self.state is State.KEEPING and self._pending:
            self._look_at_weights()
            if self._pending and self._is_as_traced():
                self._split(self._example)
        self.selection.write_waiting()

    def _is_as_traced(self) -> bool:
        """Whether recorded operations make now what they made in the traced pass.

        Some of them are calls of modules, which read their attributes and modes of now.
        """
        return (
            not self._trace.signature.difference_of_modules()
            and not self._around.difference()
            and self.selection.is_under_same_switches
            and not self.selection.gone
        )

    def call_of_another_length(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, bool]:
        """Runs a call on rows that are padded to another length, and keeps what can be kept.

        Returns:
            Output of the module, and whether the call ran: it does not if all of its rows are
            known, so that following it pays from now on.
        """
        self._look_at_weights()
        if self.state is State.STALE:
            return None, False
        inputs = dict(zip(self._trace.inputs, tensors((args, kwargs)), strict=True))
        keys = self.selection.keys(inputs)
        if not self.family.again and self._note(keys):
            self._settle(self._example)
        if self.family.again and not _unknown(self.selection.find(keys)):
            return None, False
        self.family.batches += 1
        self._shared.entries.now += 1
        output, kept = self.selection.capture_of_another_length(module, args, kwargs)
        self._shared.stats.rows_computed += self.selection.rows
        if kept is not None and self.state is not State.KEEPING:
            self.selection.write(keys, kept)
        elif kept is not None:
            self._pend(_Batch(keys, kept))
        return output, True

    def take_smaller(self, inputs: Sequence[Tensor]) -> None:
        """Takes the rows of a batch that is smaller than others, to be computed in a whole one.

        The last batch of an epoch is smaller, and its rows meet others in the next epoch.

        Args:
            inputs: Tensors that the call was given.
        """
        if self.state is State.RESTING or len(inputs) != len(self._trace.inputs):
            return
        batch = dict(zip(self._trace.inputs, inputs, strict=True))
        if not self.selection.takes(batch, self._example):
            return
        self._put_aside(batch)
        if self.selection.settled:
            self._look_at_weights()
            self._fill_up()

    def _put_aside(self, inputs: Mapping[int, Tensor]) -> None:
        """Copies the inputs of a batch, to compute its rows once rows come again."""
        if sum(map(len, self._smaller)) < _MOST_SMALLER:
            self._smaller.append({number: one.detach().clone() for number, one in inputs.items()})

    def _fill_up(self) -> None:
        """Computes the rows of smaller batches in whole ones, by recorded operations."""
        selection = self.selection
        batches, self._smaller = self._smaller, []
        if not batches or not selection.by_rows or not self._is_as_traced():
            return
        for whole, real in selection.merge(batches):
            keys = selection.keys(whole)
            places = selection.find(keys)
            if any((place[:real] < 0).any() for place in places.values()):
                selection.write(keys, selection.compute(whole), np.arange(real))

    def _from_before(self, inputs: Mapping[int, Tensor]) -> dict[int, Tensor] | None:
        """Reads the rows of when less was frozen, if they are all there.

        Returns:
            Values of this trace, by number. Those that are kept can be computed from them.
        """
        if self._earlier is None:
            return None
        before, extension = self._earlier
        kept = before.known(inputs.values())
        return None if kept is None else extension.values(kept)

    def known(self, given: Iterable[Tensor]) -> dict[int, Tensor] | None:
        """Returns the kept values of a batch, or None if some of its rows are not known.

        Rows that are known only from when still less was frozen are computed from those.
        """
        if not self.has_rows:
            return None
        self._look_at_weights()
        if not self.has_rows:
            return None
        if not self.selection.settled:
            self._split(self._example)
        inputs = dict(zip(self._trace.inputs, given, strict=True))
        keys = self.selection.keys(inputs)
        places = self.selection.find(keys)
        if not _unknown(places):
            return self.selection.read(keys, places)
        earlier = self._from_before(inputs)
        return None if earlier is None else self.selection.compute(inputs, earlier)

    def fill(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Keeps the rows of a batch without a forward pass.

        Returns:
            Whether nothing else is to be done with the call.
        """
        self._look_at_weights()
        if self.state is State.RESTING:
            return True
        if self.state is State.STALE or not self._is_as_traced():
            return False
        inputs = dict(zip(self._trace.inputs, tensors((args, kwargs)), strict=True))
        self._shared.entries.now += 1
        self.family.batches += 1
        keys = self.selection.keys(inputs)
        if not self.family.again:
            self._note(keys)
        if not self.selection.settled:
            self._split(self._example)
        if _unknown(self.selection.find(keys)):
            self._load(inputs)
            self.selection.write(keys, self.selection.compute(inputs, self._from_before(inputs)))
            self._shared.stats.rows_computed += self.selection.rows
        return True

    # Once rows come again.

    def _capture(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[int, Tensor] | None]:
        self._load((args, kwargs))
        before = perf_counter()
        output, kept, report = lineage.capture(
            self.selection.plan, module, *args, known_to_fit=True, **kwargs
        )
        self.meter.note(Kind.KEPT, perf_counter() - self._began, before - self._began)
        self._shared.stats.rows_computed += self.selection.rows
        self._count_lost(report.left if kept is None else "")
        return output, kept

    def _count_lost(self, left: str) -> None:
        self._lost = self._lost + 1 if left else 0
        if left and self._carries_on:
            self._calls = self._batches_of_an_epoch
        elif self._lost == _MOST_LOST and self.state is not State.RESTING:
            self.rest(f"{_MOST_LOST} passes in a row went another way than the first ({left})")

    def _add(self, module: nn.Module, args: Any, kwargs: dict[str, Any], keys: Keys) -> Any:
        output, kept = self._capture(module, args, kwargs)
        if self.state is State.RESTING:
            return output
        if kept is not None:
            self.selection.write(keys, kept)
        family = self.family
        if family.hardly_known:
            self._withdraw(
                f"{family.known} of {family.after} batches had only rows that came before, so "
                f"that hardly any could be served ({family.share_again})"
            )
        return output

    def _withdraw(self, why: str) -> None:
        """Leaves the model alone, and removes rows that hardly anybody asks for."""
        self.selection.withdraw()
        mixes = self.selection.mixes
        self.rest(
            why,
            [
                f"{mixes} looks across the rows of a batch: its results are kept for whole "
                "batches, and those come with other rows in each epoch."
                if mixes
                else "Augmentation or noise in front of frozen work makes every row another one, "
                "and so does padding to other lengths: there, a fixed length or "
                "pad_to_multiple_of=64 helps."
            ],
        )

    def _compare(
        self,
        module: nn.Module,
        args: Any,
        kwargs: dict[str, Any],
        keys: Keys,
        places: dict[int, np.ndarray],
    ) -> Any:
        """Computes a batch that could be served, and compares what is kept with it."""
        began = perf_counter()
        output, kept = self._capture(module, args, kwargs)
        report = self._shared.report
        report.seconds += perf_counter() - began
        if kept is None or self.state is State.RESTING:
            return output
        stored = self.selection.read(keys, places)
        if stored is None:
            return output
        report.batches_compared += 1
        report.rows_compared += self.selection.rows
        different = [
            one.number
            for one in self.selection.kept
            if not same_bits(kept[one.number], stored[one.number])
        ]
        if different:
            self.selection.look_again(at_all=True)
            if moved := self.selection.name():
                self._moved(moved)
                return output
        for number in different:
            self._differs(number, kept[number], stored[number])
            if self.at_rest:
                return output
        self._compared += 1
        self.family.passed += 1
        return output

    def _differs(self, number: int, computed: Tensor, stored: Tensor) -> None:
        name = self._trace.describe(number)
        far = (computed.double() - stored.double()).abs().max().item()
        size = computed.double().abs().max().item()
        close = far <= self._shared.closeness(computed) * size
        if close and not self._shared.exact:
            self._shared.find(
                f"{self._name}: {name} differs",
                f"Kept rows of {name} differ from computed ones by up to {far:.1e}, of {size:.1e}: "
                "they are served all the same, for exact=False.",
            )
            return
        row = self.selection.rows_that_differ(number, computed, stored)
        self.selection.forget(wrong=True)
        if self.family.routes > 1:
            self.family.broken = True
            self._shared.find(
                f"{self._name}: padding",
                f"{self._name} is not cached: rows of {name} that are padded to another length "
                f"differ by {far:.1e}, of {size:.1e}, which is more than rounding. A fixed length "
                "or pad_to_multiple_of=64 makes rows come again.",
            )
            return
        why = f"kept rows of {name} differ from computed ones by {far:.1e}, of {size:.1e}, in {row}"
        more = "exact=False would serve them." if close else (
            "Rows depend on the others of their batch, or on something that the cache cannot see."
        )  # fmt: skip
        self.rest(why, [more])
        self._shared.report.found.append(f"{self._name}: {why}. {more}")

    @property
    def _is_proven(self) -> bool:
        """Whether enough batches were compared, one of the very length among them."""
        return self._compared > 0 and self.family.passed >= self.family.wanted

    def _sample_is_due(self) -> bool:
        if self._shared.report.verify == "off" or self._served < self._next_sample:
            return False
        # Within 1 % of the time samples come evenly, else at growing distances.
        further = _FIRST_SAMPLE if self._shared.may_compare else self._served
        self._next_sample = self._served + further
        return True

    def _serve(
        self,
        module: nn.Module,
        args: Any,
        kwargs: dict[str, Any],
        kept: dict[int, Tensor],
    ) -> Any:
        self._served += 1
        given = dict(zip(self._trace.inputs, tensors((args, kwargs)), strict=True))
        self._load([given[number] for number in self.selection.read_by_others])
        cost = perf_counter() - self._began
        output, report = lineage.replay(
            self.selection.plan, kept, module, *args, known_to_fit=True, **kwargs
        )
        seconds = perf_counter() - self._began
        self._shared.served_seconds += seconds
        self.meter.note(Kind.SERVED, seconds, cost)
        self._count_lost(report.left)
        stats = self._shared.stats
        if report.left:
            stats.rows_computed += self.selection.rows
        else:
            stats.rows_served += self.selection.rows
            stats.seconds_saved += self.selection.plan.cut.seconds_saved - cost
            self._reports.append(report)
        if self.meter.loses:
            self.selection.forget()
            self.rest(
                f"serving its frozen work takes {1e3 * self.meter.seconds(Kind.SERVED):.1f} ms, as "
                f"long as doing it ({1e3 * self.meter.plain_seconds:.1f} ms in all)"
            )
        return output

    # What may have changed between two calls.

    def _look_at_late_values(self, inputs: Mapping[int, Tensor]) -> None:
        """Keeps values from now on that the caller has read again and again after the call."""
        read = [report.computed for report in self._reports]
        self._reports = self._reports[-1:] if len(read) < _OFTEN else []
        if len(read) >= _OFTEN and all(read):
            known = {number for number, is_read in self._trace.outputs if is_read}
            wanted = {number for computed in read for number in computed} - known
            if wanted:
                self._load(inputs)
                self._trace.outputs += [(number, True) for number in wanted]
                self._select(inputs)
                if self.state is not State.RESTING:
                    self._settle(inputs)

    def _look_at_weights(self) -> None:
        """Sees whether frozen bits have changed. Nothing that was made from others is served."""
        self.selection.look()
        if self._shared.may_hash:
            self.selection.look_again()
        if moved := self.selection.name():
            self._moved(moved)

    def _moved(self, moved: Sequence[Tensor]) -> None:
        """Goes on with the rows of other frozen bits.

        Args:
            moved: Parameters and buffers that have changed.
        """
        self._tell_if_late(moved)
        self._shared.report.changes += 1
        self._drop_batches()
        family = self.family
        if family.batches - self._moved_at <= _REST:
            self._shared.moving.add(moved)
            self.state = State.STALE
        elif self.state is not State.KEEPING:
            self.state, family.passed, self._compared = State.PROBATION, 0, 0
        else:
            family.seen = {}
        self._moved_at = family.batches

    def _tell_if_late(self, moved: Sequence[Tensor]) -> None:
        """Says that frozen bits have changed some time ago, if nothing had shown it."""
        if not self.selection.late:
            return
        self.selection.late = False
        names = [
            state.name for state in self._trace.states if any(state.tensor() is t for t in moved)
        ]
        self._shared.find(
            f"{self._name}: late",
            f"{', '.join(names[:1])} of {self._name} was changed in a few places by a way that "
            "shows nowhere, such as .data or numpy, and was found by a hash of all bits: rows that "
            "were served just before may be of the weights of before. "
            'verify="all" compares every batch.',
        )

    def look_at_the_end(self) -> None:
        """Hashes all frozen bits a last time, for rows that were served since the last hash."""
        unused = not (self._served or self._compared) or self.stale
        if unused or self._shared.report.verify == "off":
            return
        self.selection.look()
        self.selection.look_again(at_all=True)
        self._tell_if_late(self.selection.name())
