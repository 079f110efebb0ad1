"""One traced path through a module: decides for each call whether its frozen work is skipped."""

from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch

from cachefreeze import lineage
from cachefreeze.cache import messages
from cachefreeze.cache.batch_inputs import Keys
from cachefreeze.cache.cache_state import CacheState
from cachefreeze.cache.comparison import Comparison
from cachefreeze.cache.guards import Guards
from cachefreeze.cache.missed_time import MissedTime
from cachefreeze.cache.module_call import ModuleCall
from cachefreeze.cache.row_collector import RowCollector, earlier_values, unknown
from cachefreeze.cache.row_history import RowHistory
from cachefreeze.cache.runner import MOST_LOST, Runner
from cachefreeze.cache.selection import Selection
from cachefreeze.cache.state import State
from cachefreeze.keys import ExternalState
from cachefreeze.lineage import Trace
from cachefreeze.lineage.program import copy_of
from cachefreeze.plan.overhead import Kind

Tensor = torch.Tensor

# Number of calls within which frozen bits must not change twice.
_REST = 4


class CachedTrace:
    """One traced path through a module, for calls of one kind.

    Args:
        shared: State that all parts of the cache share.
        name: Name of the module, for messages.
        trace: Trace of a forward pass.
        around: State outside of the call that its result depends on.
        inputs: Copies of the tensors that the pass was given.
        before: Trace of the same calls that was made when less was frozen. Rows of this trace are
            computed from its rows. None if there is none.
        like: Trace of the same calls with rows of another length. If it keeps the same values, the
            two share rows. None if there is none.
        last: Whether to decide by this trace if frozen work seems to take little time. If False,
            another trace may be made.

    Attributes:
        state: State of the trace, which decides what happens to batches.
        history: History of the rows.
        selection: Values that are kept.
        guards: Guards of the trace.
        runner: Runner of the calls.
    """

    def __init__(
        self,
        shared: CacheState,
        name: str,
        trace: Trace,
        around: ExternalState,
        inputs: Sequence[Tensor],
        before: "CachedTrace | None" = None,
        like: "CachedTrace | None" = None,
        last: bool = True,
    ) -> None:
        self.state = State.KEEPING
        self._shared = shared
        self._name = name
        self._trace = trace
        self._stored = self._carries_on = False
        self._moved_at, self._moving = -_REST, shared.moving.version
        example = dict(zip(trace.inputs, inputs, strict=True))
        if like is not None and not like.selection.is_like(trace):
            like = None
        self.history: RowHistory = RowHistory() if like is None else like.history
        self.history.batches += 1
        self.history.traces += 1
        alike: Selection | None = like.selection if like is not None else None
        self.selection: Selection = Selection(shared, trace, example, name, alike)
        selection = self.selection
        self._missed = MissedTime(trace, selection.plan.cut.kept)
        self.guards = Guards(selection, around)
        self.runner = Runner(shared, selection)
        self._comparison = Comparison(shared, name, selection, self.history)
        earlier = None if before is None else earlier_values(before, selection, shared)
        self._collector = RowCollector(
            shared, name, selection, self.history, self.guards, self.runner.timer, example, earlier
        )
        self._last = last
        self._begin(example)
        held = trace.take_held(selection.plan.cut.kept)
        if self.state is State.KEEPING and held is not None:
            self._keep_traced({number: copy_of(tensor) for number, tensor in held.items()})

    def _keep_traced(self, kept: dict[int, Tensor]) -> None:
        """Keeps the batch of the traced pass, or compares it if its rows are on disk already."""
        keys = self._collector.keys_of_traced()
        places = self._collector.stored(keys) if self._stored else {}
        stored = self.selection.kept.read(keys, places) if places else None
        if stored is None:
            self._rest_if(*self._collector.keep(keys, kept))
            return
        self._settle()
        self._rest_if(*self._comparison.check(kept, stored, self.look_at_all, followed=True))

    def _begin(self, inputs: Mapping[int, Tensor]) -> None:
        """Decides what happens to batches, by the values that can be kept."""
        selection = self.selection
        if not selection.is_enough:
            if not self._last and selection.may_be_enough:
                self.state = State.UNDECIDED
                return
            more = lineage.limits_of(self._trace, selection.share)
            self.rest(selection.why_not_enough(), more)
            return
        if selection.joins():
            self.state = State.BY_PARTS
            return
        self._stored = selection.begin()
        self._collector.look_on_disk(inputs)
        self._collector.note(selection.batch.keys(inputs))

    def rest(self, why: str, more: Sequence[str] = ()) -> None:
        """Runs all further calls without the cache, and tells the user why."""
        self.state = State.RESTING
        self._collector.stop()
        sentence = " ".join([f"{self._name} is not cached: {why}.", *more])
        self._shared.tell(f"{self._name}: {why}", sentence)

    def _rest_if(self, why: str, more: str) -> None:
        if why:
            self.rest(why, [more])

    def free(self) -> None:
        """Drops everything that is kept."""
        self._collector.drop()
        self.selection.kept.forget()

    @property
    def has_rows(self) -> bool:
        """Whether rows are kept, from which those of a later trace can be computed."""
        follows = self.state in (State.KEEPING, State.PROBATION, State.SERVING)
        return follows and not self.stale and self._collector.has_rows

    @property
    def stale(self) -> bool:
        """Whether the trace is invalid: parameters began or stopped changing, or are gone."""
        return (
            self.state is State.STALE
            or self._moving != self._shared.moving.version
            or self.selection.frozen.gone
            or self.history.broken
        )

    def carry_on(self, call: ModuleCall) -> bool:
        """Goes on serving the same values although more parameters have become frozen.

        That work still runs. When it has taken as long as a new trace, one is made.

        Returns:
            Whether this is possible: where something is skipped, only freezing may have changed.
        """
        if self.state is not State.SERVING or self.stale or self.is_outgrown:
            return False
        renewed = self._trace.signature.renew(self.selection.plan.modules_around())
        if not renewed or not self.guards.fit(call):
            return False
        self._carries_on = True
        self._missed.look(self.batches_of_an_epoch)
        return True

    @property
    def is_outgrown(self) -> bool:
        """Whether more parameters have become frozen, and it is time for a new trace."""
        return self._carries_on and self._missed.is_enough(self._shared)

    @property
    def batches_of_an_epoch(self) -> int:
        """Number of batches before rows came again, of this trace or an earlier one."""
        return self._collector.batches_of_an_epoch

    @property
    def pauses(self) -> bool:
        """Whether calls run without the cache for now, to save time."""
        return self.state is State.KEEPING and not self.history.again and self.runner.timer.pauses

    @property
    def at_rest(self) -> bool:
        """Whether the next calls run without the cache, whatever their input is."""
        return self.state is State.RESTING or (self.pauses and not self.runner.timer.may_note)

    def would_serve(self, rows: Sequence[np.ndarray]) -> bool:
        """Returns whether a batch with the given keys would be served, as far as can be told."""
        proven = self.state is State.PROBATION and self._comparison.is_proven
        ready = self.state is State.SERVING or proven
        ready = ready and self._shared.report.verify != "all"
        return ready and not self.stale and self.selection.knows(rows)

    def pass_by(self, call: ModuleCall) -> Any:
        """Runs a call without the cache. Its rows are noted if that takes almost no time."""
        timer = self.runner.timer
        if timer.may_note:
            call.load()
            call.time_on(self.runner.device)
            began = call.now()
            self.history.batches += 1
            self.history.left_alone += 1
            if self._collector.note(self.selection.batch.keys(call.inputs(self._trace.inputs))):
                self.look_at_weights()
                if self.state is State.KEEPING:
                    self._settle()
            self.runner.note_rows(began, call.now())
        return call.run()

    def run(self, call: ModuleCall) -> Any:
        """Runs a call, with kept values in place of frozen work if all of its rows are known."""
        self._missed.count()
        call.time_on(self.runner.device)
        inputs = call.inputs(self._trace.inputs)
        self._look_at_late_values(call, inputs)
        self.look_at_weights()
        keys = self.selection.batch.keys(inputs)
        if self.selection.frozen.learn():
            self.look_at_weights()
        if self.state in (State.RESTING, State.STALE):
            return call.run()
        history, kept = self.history, self.selection.kept
        self._count_batch()
        earlier = None
        if self.state is State.KEEPING:
            inputs = call.loaded(self._trace.inputs)
            earlier = self._collector.values_of_before(inputs)
            again = history.again or self._collector.note(keys)
            again = again or self._collector.lie_on_disk(keys, self._stored)
            if not again and earlier is None:
                if self.runner.timer.wants_plain(Kind.KEPT):
                    self._collector.put_aside(inputs)
                    return self._run_plainly(call)
                output, found = self._capture(call)
                if found is not None and self.state is State.KEEPING:
                    self._rest_if(*self._collector.keep(keys, found))
                return output
            began = perf_counter()
            self._settle()
            call.leave_out(began)
        history.after += 1
        self._collector.publish()
        self._shared.stats.batches += 1
        places = kept.find(keys)
        first = next(iter(places.values()))
        history.count((len(first), int((first >= 0).sum())))
        if unknown(places):
            inputs = call.loaded(self._trace.inputs)
            earlier = earlier or self._collector.values_of_before(inputs)
            if earlier is None:
                return self._add(call, keys)
            kept.write(keys, self.selection.compute(inputs, earlier))
            places = kept.find(keys)
            if unknown(places):  # some rows did not fit in memory
                return self._add(call, keys)
        history.known += 1
        self._shared.stats.batches_known += 1
        if self.state is State.PROBATION and self._comparison.is_proven:
            self.state = State.SERVING
        all_of_them = self._shared.report.verify == "all"
        on_probation = self.state is State.PROBATION
        if on_probation or all_of_them or self._comparison.is_due(self.runner.served):
            return self._compare(call, keys, places)
        if self.runner.timer.wants_plain(Kind.SERVED):
            return self._run_plainly(call)
        found = kept.read(keys, places)
        if found is None:  # a row on disk is damaged
            return self._add(call, keys)
        return self._serve(call, inputs, found)

    def _count_batch(self) -> None:
        self.history.batches += 1
        self._shared.entries.now += 1

    def run_of_another_length(self, call: ModuleCall) -> tuple[Any, bool]:
        """Runs a call with rows of another length, and keeps its rows.

        Returns:
            Output of the module, and whether the call ran. It does not run if all of its rows are
            known, because a trace of this length pays then.
        """
        self.look_at_weights()
        if self.state is State.STALE:
            return None, False
        keys = self.selection.batch.keys(call.inputs(self._trace.inputs))
        if not self.history.again and self._collector.note(keys):
            self._settle()
        if self.history.again and not unknown(self.selection.kept.find(keys)):
            return None, False
        self._count_batch()
        output, kept = self.selection.capture_of_another_length(call)
        self._shared.stats.rows_computed += self.selection.rows
        if kept is not None and self.state is State.KEEPING:
            self._rest_if(*self._collector.keep(keys, kept))
        elif kept is not None:
            self.selection.kept.write(keys, kept)
        return output, True

    def take_smaller(self, inputs: Sequence[Tensor]) -> None:
        """Keeps the rows of a batch that is smaller than others, such as the last one of an epoch.

        In the next epoch, these rows come in other batches. They are computed in batches of the
        usual size.
        """
        if self.state is State.RESTING or len(inputs) != len(self._trace.inputs):
            return
        batch = dict(zip(self._trace.inputs, inputs, strict=True))
        if self._collector.put_smaller_aside(batch) and self.selection.kept.settled:
            self.look_at_weights()
            self._collector.fill_up()

    def fill(self, call: ModuleCall) -> bool:
        """Keeps the rows of a batch without a forward pass.

        Returns:
            Whether the call need not run any more.
        """
        self.look_at_weights()
        if self.state is State.RESTING:
            return True
        if self.state is State.STALE or not self.guards.is_as_traced():
            return False
        self._count_batch()
        self._collector.fill(call)
        return True

    def known(self, given: Iterable[Tensor]) -> dict[int, Tensor] | None:
        """Returns the kept values of a batch, or None if some of its rows are unknown."""
        if not self.has_rows:
            return None
        self.look_at_weights()
        if not self.has_rows:
            return None
        return self._collector.known(dict(zip(self._trace.inputs, given, strict=True)))

    def _settle(self, inputs: Mapping[int, Tensor] | None = None) -> None:
        self.state = State.PROBATION
        self._collector.settle(inputs)

    def write_all(self) -> None:
        """Writes all waiting rows to disk."""
        if self.state is State.KEEPING and self._collector.waits:
            self.look_at_weights()
            self._collector.write_all()
        self.selection.kept.write_waiting()

    def _run_plainly(self, call: ModuleCall) -> Any:
        if self.state is State.KEEPING:
            self._shared.note(f"{self._name}: overhead", messages.short_calls(self._name))
            self.history.left_alone += 1
        return self.runner.run_plainly(call)

    def _capture(self, call: ModuleCall) -> tuple[Any, dict[int, Tensor] | None]:
        found = self.runner.capture(call)
        self._rest_if_lost()
        return found

    def _serve(
        self, call: ModuleCall, inputs: Mapping[int, Tensor], kept: dict[int, Tensor]
    ) -> Any:
        output = self.runner.replay(call, inputs, kept)
        self._rest_if_lost()
        timer = self.runner.timer
        if timer.loses:
            self.selection.kept.forget()
            self.rest(messages.slow_reason(timer.seconds(Kind.SERVED), timer.plain_seconds))
        return output

    def _rest_if_lost(self) -> None:
        left = self.runner.left
        if left and self._carries_on:
            self._missed.end()
        elif self.runner.is_lost and self.state is not State.RESTING:
            self.rest(messages.other_path_reason(MOST_LOST, left))

    def _add(self, call: ModuleCall, keys: Keys) -> Any:
        """Runs a call, and keeps its rows."""
        output, kept = self._capture(call)
        if self.state is State.RESTING:
            return output
        if kept is not None:
            self.selection.kept.write(keys, kept)
        history = self.history
        if history.hardly_known:
            why = messages.hardly_known_reason(history.known, history.after, history.share_again)
            self._rest_if(*self._collector.withdraw(why))
        return output

    def _compare(self, call: ModuleCall, keys: Keys, places: dict[int, np.ndarray]) -> Any:
        """Computes a batch that could be served, and compares its kept values."""
        began = perf_counter()
        output, computed = self._capture(call)
        self._shared.report.seconds += perf_counter() - began
        if computed is None or self.state is State.RESTING:
            return output
        stored = self.selection.kept.read(keys, places)
        if stored is not None:
            self._rest_if(*self._comparison.check(computed, stored, self.look_at_all))
        return output

    def _look_at_late_values(self, call: ModuleCall, inputs: Mapping[int, Tensor]) -> None:
        """Chooses again what is kept if the user's code reads skipped values repeatedly."""
        if wanted := self.runner.read_late():
            call.load()
            self.selection.keep_as_well(wanted, inputs)
            self._begin(inputs)
            if self.state is not State.RESTING:
                began = perf_counter()
                self._settle(inputs)
                call.leave_out(began)

    def look_at_weights(self) -> None:
        """Checks whether frozen bits have changed, so that no row of other bits is served."""
        if moved := self.selection.look():
            self._moved(moved)

    def _moved(self, moved: Sequence[Tensor]) -> None:
        """Goes on with rows of the new bits. Tensors that change often count as trained."""
        self._shared.report.changes += 1
        self._collector.drop()
        history = self.history
        if history.batches - self._moved_at <= _REST:
            self._shared.moving.add(moved)
            self.state = State.STALE
        elif self.state is not State.KEEPING:
            self.state = State.PROBATION
            self._comparison.begin_again()
        else:
            history.seen = {}
        self._moved_at = history.batches

    def look_at_all(self) -> bool:
        """Hashes all frozen bits. Returns whether any have changed."""
        self.selection.frozen.doubt_all()
        if moved := self.selection.kept.update_names():
            self._moved(moved)
        return bool(moved)

    @property
    def was_used(self) -> bool:
        """Whether kept rows were served or compared."""
        return bool(self.runner.served or self._comparison.batches)
