"""One run: builds the network, trains it, and leaves its files and its words."""

import shlex
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from cachefreeze import data
from cachefreeze.errors import UserError
from cachefreeze.models import Statistics
from cachefreeze.report.metrics import check_tensorboard
from cachefreeze.report.summary_text import RESULT, closing_words, opening_words
from cachefreeze.training.checkpoint import load_last_checkpoint
from cachefreeze.training.device import (
    keep_freed_memory,
    resolve_device,
    resolve_precision,
    set_numerics,
)
from cachefreeze.training.network import (
    Weights,
    check_network,
    find_weights,
    make_network,
    trained_on,
)
from cachefreeze.training.preview import preview
from cachefreeze.training.resume import Start
from cachefreeze.training.run_folder import RunFolder, check_cache_folder, make_cache_folder
from cachefreeze.training.settings import Settings
from cachefreeze.training.terminal import say, this_python, track, warn
from cachefreeze.training.trainer import Trainer


def carry_out(start: Start) -> None:
    """Plans or trains, as the command line asks; see `run`."""
    settings = start.settings
    keep_freed_memory()
    if settings.plan:
        preview(settings)
    elif start.finished:
        say(f"the run in {settings.output_dir} is finished: see its summary.json", always=True)
    else:
        run(start)


def run(start: Start) -> dict[str, Any]:
    """Trains; returns the contents of summary.json.

    Args:
        start: Settings of the run, and whether it goes on with an earlier one.

    Raises:
        UserError: Something is not there, does not fit, or cannot be written.
        Interrupted: The user or the system asked to stop, and the state was saved.
    """
    with closing(RunFolder(start.settings.output_dir, resume=start.resuming)) as folder:
        return _run_in(folder, start)


def _run_in(folder: RunFolder, start: Start) -> dict[str, Any]:
    settings, began = start.settings, time.perf_counter()
    device = resolve_device(settings.device)
    dtype = resolve_precision(settings.precision, device)
    set_numerics(device, dtype, tf32=settings.tf32, deterministic=settings.deterministic)
    if settings.cache:
        check_cache_folder(settings.cache_dir)
    if settings.tensorboard:
        check_tensorboard()
    check_network(settings, (3, settings.image_size, settings.image_size))  # before the wait
    state = load_last_checkpoint(folder.path, warn) if start.resuming else None
    # A checkpoint holds the weights, and how images are normalised: the file may be gone.
    weights = None if state is not None else find_weights(settings)
    images = data.load(
        settings.dataset,
        settings.data_dir,
        image_size=settings.image_size,
        val_fraction=settings.val_fraction,
        workers=settings.workers,
        skip_broken=settings.skip_broken,
        bar=track,
        normalization=statistics_of(settings, weights, state),
    )

    torch.manual_seed(settings.seed)
    model, new = make_network(settings, images.classes, weights)
    if settings.cache:
        make_cache_folder(settings.cache_dir)
    command = start.command
    trainer = Trainer(settings, images, model, device, dtype, folder, command)
    trainer.state.started = began
    facts = {**settings.as_json(), "network": settings.network, "command": command}
    folder.create(facts)
    about: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "data_set": images.outline.description,
        "where": f"{device}, {'bf16 autocast' if dtype else 'fp32'}",
    }
    started_from = None if weights is None else (weights.words, new)
    for line in opening_words(
        facts, trainer.names, **about, weights=started_from, first=trainer.scheduler.frontier
    ):
        say(line)
    if start.resuming:
        if state is None:
            trainer.written.rewrite([])  # of epochs that no checkpoint came after
        else:
            trainer.resume(state)
            say(f"resume    after {trainer.place}")
    summary = {**trainer.fit(), "about": about}
    folder.write_json("summary.json", summary)
    for line in closing_words(summary, facts, folder.path, this_python(), device.type == "cpu"):
        result = line.startswith(RESULT)
        say(line, always=result, whole=not result)
    # The last thing done: all that the run gave is on disk, and told.
    if settings.report:
        say(f"report    {draw_report(folder.path)}", always=True, whole=True)
    return summary


def draw_report(folder: Path) -> str:
    """Makes report.html of a run, and returns its path.

    If that fails, the run is finished all the same: the error is returned as a text, with the
    command that draws the report.
    """
    again = f"{this_python()} scripts/write_report.py {shlex.quote(str(folder))}"
    try:
        # Half a second, and an extra.
        from cachefreeze.report.html_report import write_report

        return str(write_report(folder))
    except UserError as error:
        return f"none: {error}; then: {again}"
    except Exception as error:
        reason = str(error).partition("\n")[0]
        return (
            f"none: it could not be drawn ({type(error).__name__}: {reason}); to see why: {again}"
        )


def statistics_of(
    settings: Settings, weights: Weights | None, state: dict[str, Any] | None
) -> Statistics | None:
    """Returns the mean and standard deviation to normalise with.

    Args:
        settings: Settings of the run.
        weights: Weights that the run starts from, or None.
        state: Contents of the checkpoint that the run goes on from, or None.

    Returns:
        Mean and standard deviation of each channel. None for those of the training images.

    Raises:
        UserError: The checkpoint does not hold them.
    """
    if weights is not None:
        return weights.statistics
    if state is None or settings.weights is None:
        return None
    return trained_on(state, "the checkpoint of this run")[1]
