"""The preview of `--plan`: the steps at which units freeze, and predicted times of the run."""

import time
from bisect import bisect_left

import torch

from cachefreeze import data
from cachefreeze.data import ArrayImages, InputRows, Outline
from cachefreeze.freezeout import units_of
from cachefreeze.plan.costs import Costs
from cachefreeze.plan.forecast import Run
from cachefreeze.report.summary_text import opening_words, plan_words, views_line
from cachefreeze.training.device import resolve_device, resolve_precision, set_numerics, synchronize
from cachefreeze.training.measuring import TIMED, WARM_UP, forward_seconds
from cachefreeze.training.network import check_network, find_weights, make_network
from cachefreeze.training.settings import Settings
from cachefreeze.training.step import prepare, take_step
from cachefreeze.training.terminal import say


def preview(settings: Settings) -> dict[str, float]:
    """Measures some steps on random pixels, and prints a prediction of the run.

    The data set need not be there: steps on random pixels with random weights take as long.

    Args:
        settings: Settings of the run.

    Returns:
        Predicted seconds of the whole run, for each way to train.

    Raises:
        UserError: The settings do not fit the network, the data set or the device.
    """
    device = resolve_device(settings.device)
    dtype = resolve_precision(settings.precision, device)
    set_numerics(device, dtype, tf32=settings.tf32, deterministic=settings.deterministic)
    about = _outline(settings)
    check_network(settings, about.image_shape)
    find_weights(settings)  # that they are there
    torch.manual_seed(settings.seed)
    model, _ = make_network(settings, [str(number) for number in range(about.classes)])
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    channels, height, width = about.image_shape
    batch_size = min(settings.batch_size, about.train_rows)
    pixels = torch.randint(0, 256, (batch_size, height, width, channels), dtype=torch.uint8)
    nothing = ArrayImages(pixels[:0].numpy(), torch.zeros(0).long().numpy())
    x = InputRows(nothing, (0.5,) * channels, (0.25,) * channels, device).from_pixels(pixels)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    steps_per_epoch = -(-about.train_rows // batch_size)
    total_steps = settings.epochs * steps_per_epoch
    optimizer, scheduler = prepare(settings, model, x[:2], total_steps)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    where = f"{device}, {'bf16 autocast' if dtype else 'fp32'}"
    facts = {**settings.as_json(), "network": settings.network}
    frozen, names = scheduler.frontier, scheduler.names
    for line in opening_words(facts, names, parameters, about.description, where, first=frozen):
        say(line)

    for step in range(WARM_UP + TIMED):
        if step == WARM_UP:
            synchronize(device)
            began = time.perf_counter()
        take_step(model, optimizer, x, labels, dtype)
    synchronize(device)
    seconds = (time.perf_counter() - began) / TIMED
    load = about.decode_seconds * batch_size
    measured = forward_seconds(model, units_of(model, x[:2]), x, dtype)
    costs = Costs.measured(seconds + load, load, *measured, frozen, on_gpu=device.type == "cuda")
    steps = scheduler.schedule.freeze_steps
    run = Run(
        steps, total_steps, steps_per_epoch, about.train_rows, about.val_rows, batch_size,
        settings.views_of_a_row, True,
    )  # fmt: skip
    forecast = run.forecast(costs)
    say("")
    for line in plan_words(names, steps, total_steps, steps_per_epoch, forecast, TIMED):
        say(line, always=True)
    kept = max(measured[1][1 : bisect_left(steps, total_steps) + 1], default=0) / batch_size
    views = settings.views_of_a_row
    say(views_line(about.train_rows, kept, settings.epochs, views), always=True)
    return forecast


def _outline(settings: Settings) -> Outline:
    if settings.rows is not None and settings.classes is not None:
        shape = (3, settings.image_size, settings.image_size)
        name = "an imagefolder that is not there (decoding is not counted)"
        return Outline(name, *settings.rows, settings.classes, shape)
    return data.outline(
        settings.dataset,
        settings.data_dir,
        image_size=settings.image_size,
        val_fraction=settings.val_fraction,
        workers=settings.workers,
        skip_broken=settings.skip_broken,
    )
