"""The contents of summary.json."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from cachefreeze.cache import ActivationCache
from cachefreeze.freezeout import FreezeOutLR
from cachefreeze.keys.hashing import weights_sha256
from cachefreeze.plan.forecast import Run
from cachefreeze.report.run_results import SCHEMA
from cachefreeze.training.finite import rates_at
from cachefreeze.training.run_state import PARTS, RunState
from cachefreeze.training.settings import Settings


def summary_of(
    settings: Settings,
    run: Run,
    state: RunState,
    now: Mapping[str, float],
    scheduler: FreezeOutLR,
    model: nn.Module,
    cache: ActivationCache | None,
) -> dict[str, Any]:
    """Returns the results of a finished run.

    Args:
        settings: Settings of the run.
        run: Sizes of the run.
        state: Progress of the run: all of it is done.
        now: Seconds and counts of the whole run, from `RunState.so_far`.
        scheduler: Schedule of the rates.
        model: Trained network.
        cache: Cache of the run, or None if it never opened.
    """
    last = state.metrics[-1]
    starts = sorted({0, *(step for step in run.freeze_steps if step < run.total_steps)})
    return {
        "schema": SCHEMA,
        "epochs": settings.epochs,
        "steps": state.step,
        "val_accuracy": last["val_accuracy"],
        "best_val_accuracy": state.best_val_accuracy,
        "train_loss": last["train_loss"],
        "weights_sha256": weights_sha256(model.state_dict()),
        "frozen_units": scheduler.frontier,
        "units": list(scheduler.names),
        "initial_rates": rates_at(scheduler, 0),
        "freeze_steps": list(run.freeze_steps),
        "processes": state.processes,
        # From each step on, in which the gradients of fewer units are exchanged than before.
        "reduced": [
            {"step": step, "bytes": _reduced_bytes(scheduler, step)}
            for step in (starts if state.processes != [1] else ())
        ],
        **{f"{part}_seconds": now[part] for part in (*PARTS, "wall")},
        "cache": {
            "enabled": settings.cache,
            "directory": str(settings.cache_dir) if settings.cache else None,
            "rows_served": int(now["rows_served"]),
            "rows_computed": int(now["rows_computed"]),
            "rows_kept": 0 if cache is None else cache.stats.rows_kept,
            "bytes": 0 if cache is None else cache.stats.bytes,
            "seconds_saved": now["seconds_saved"],
            "messages": [],
            "fills": state.fills,
        },
        "forecast": None if state.costs is None else run.forecast(state.costs),
        "resumed_at": state.resumed_at,
    }


def _reduced_bytes(scheduler: FreezeOutLR, step: int) -> int:
    """Returns the number of bytes of gradients of the units that train at a step."""
    frozen = scheduler.schedule.frontier(step)
    units = enumerate(scheduler.optimizer.param_groups)
    return sum(one.nbytes for unit, group in units if unit >= frozen for one in group["params"])
