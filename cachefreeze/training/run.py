"""One run: builds the network, trains it, and leaves its files and its words."""

import functools
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
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
from cachefreeze.training.launch import Launch
from cachefreeze.training.network import (
    Weights,
    check_network,
    find_weights,
    make_network,
    trained_on,
)
from cachefreeze.training.preview import preview
from cachefreeze.training.ranks import Ranks, code_of, refuse_others, weights_of
from cachefreeze.training.resume import Start
from cachefreeze.training.run_folder import RunFolder, check_cache_folder, make_cache_folder
from cachefreeze.training.settings import Settings
from cachefreeze.training.terminal import say, this_python, track, warn
from cachefreeze.training.trainer import Trainer

LOST = "another process of this run has ended, so this one ends, too: see above what it said"


@contextmanager
def joined(
    launch: Launch, argv: Sequence[str], start: Start | None
) -> Iterator[tuple[Start, Ranks]]:
    """Joins the processes that torchrun has started, and leaves them at the end.

    Of processes that fail alike, all but one end here without a word.

    Args:
        launch: Place of this process.
        argv: Words of the command line.
        start: Run that the command line asks for. None if this is not the first process.

    Yields:
        Run that the command line asks for, and the processes.

    Raises:
        UserError: The processes run other code or another command.
    """
    ranks = Ranks(launch)
    try:
        refuse_others(ranks, lambda: code_of(argv), "other code")
        if ranks.count > 1:
            found = ranks.from_first(None if start is None else start.as_json())
            start = start if start is not None else Start.from_json(found)
        assert start is not None
        yield start, ranks
        ranks.close()
    except UserError:
        if not ranks.tells_errors():
            raise SystemExit(2) from None
        raise
    except RuntimeError as error:
        if not ranks.lost_another(error):
            raise
        if ranks.tells_errors():
            print(f"error: {LOST}", file=sys.stderr)
        raise SystemExit(1) from None


def carry_out(start: Start, ranks: Ranks) -> None:
    """Plans or trains, as the command line asks; see `run`."""
    settings = start.settings
    keep_freed_memory()
    if settings.plan:
        if ranks.count > 1:
            raise UserError("--plan is for one process: leave out torchrun")
        preview(settings)
    elif start.finished:
        say(f"the run in {settings.output_dir} is finished: see its summary.json", always=True)
    else:
        run(start, ranks)


def run(start: Start, ranks: Ranks) -> dict[str, Any]:
    """Trains; returns the contents of summary.json.

    Args:
        start: Settings of the run, and whether it goes on with an earlier one.
        ranks: Processes that train it together.

    Raises:
        UserError: Something is not there, does not fit, or cannot be written.
        Interrupted: The user or the system asked to stop, and the state was saved.
    """
    path = start.settings.output_dir
    with closing(RunFolder(path, resume=start.resuming, writes=ranks.first)) as folder:
        return _run_in(folder, start, ranks)


def _run_in(folder: RunFolder, start: Start, ranks: Ranks) -> dict[str, Any]:
    settings, began = start.settings, time.perf_counter()
    device = resolve_device(settings.device)
    ranks.take(device)
    dtype = resolve_precision(settings.precision, device)
    set_numerics(device, dtype, tf32=settings.tf32, deterministic=settings.deterministic)
    if settings.cache:
        check_cache_folder(settings.cache_dir)
    if settings.tensorboard:
        check_tensorboard()
    check_network(settings, (3, settings.image_size, settings.image_size))  # before the wait
    state = None
    if start.resuming:
        state = ranks.in_turn(lambda: load_last_checkpoint(folder.path, warn))
    # A checkpoint holds the weights, and how images are normalised: the file may be gone.
    weights = None if state is not None else ranks.in_turn(lambda: find_weights(settings))
    images = _images_of(settings, ranks, statistics_of(settings, weights, state))
    ranks.check_batch(min(settings.batch_size, len(images.train)), settings.cache, warn)

    torch.manual_seed(settings.seed)
    model, new = make_network(settings, images.classes, weights)
    if settings.cache:
        make_cache_folder(settings.cache_dir)
    command = start.command
    trainer = Trainer(settings, images, model, device, dtype, folder, ranks, command)
    trainer.state.started = began
    facts = {**settings.as_json(), "network": settings.network, "command": command}
    if ranks.launch.launcher:  # which may start the run again
        facts["launcher"] = ranks.launch.launcher
    folder.create(facts)
    processes = f", in {ranks.count} processes" if ranks.count > 1 else ""
    about: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "data_set": images.outline.description,
        "where": f"{device}, {'bf16 autocast' if dtype else 'fp32'}{processes}",
    }
    started_from = None if weights is None else (weights.words, new)
    for line in opening_words(
        facts, trainer.names, **about, weights=started_from, first=trainer.scheduler.frontier
    ):
        say(line)
    if start.resuming:
        if state is not None:
            trainer.resume(state)
            say(f"resume    after {trainer.place}")
        elif ranks.first:
            trainer.written.rewrite([])  # of epochs that no checkpoint came after
    refuse_others(ranks, lambda: weights_of(model), "other weights")
    summary = {**trainer.fit(), "about": about}
    if not ranks.first:
        return summary
    folder.write_json("summary.json", summary)
    for line in closing_words(summary, facts, folder.path, this_python(), device.type == "cpu"):
        result = line.startswith(RESULT)
        say(line, always=result, whole=not result)
    # The last thing done: all that the run gave is on disk, and told.
    if settings.report:
        say(f"report    {draw_report(folder.path)}", always=True, whole=True)
    return summary


def _images_of(settings: Settings, ranks: Ranks, normalization: Statistics | None) -> data.DataSet:
    """Loads the data set: first in the first process, which may download and decode it."""
    load = functools.partial(
        data.load,
        settings.dataset,
        settings.data_dir,
        image_size=settings.image_size,
        val_fraction=settings.val_fraction,
        workers=-(-settings.workers // ranks.launch.local_count),
        skip_broken=settings.skip_broken,
        bar=track,
    )
    if ranks.first:
        images = load(normalization=normalization)
        ranks.from_first([images.mean, images.std])
    else:
        mean, std = map(tuple, ranks.from_first(None))
        images = load(normalization=(mean, std))
    refuse_others(ranks, lambda: {"the list of images": repr(images.facts["same"])}, "other images")
    return images


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
