"""`--plan`: what a run would keep and what that would bring, without training."""

import math

import torch

from cachefreeze import data
from cachefreeze.config import Settings
from cachefreeze.data import ArrayImages, InputRows, Outline
from cachefreeze.device import resolve_device, resolve_precision, set_numerics
from cachefreeze.files import nearest_folder
from cachefreeze.forecast import Forecast
from cachefreeze.network import check_network, find_weights, make_network
from cachefreeze.planner import Run
from cachefreeze.profiler import MAX_PASSES, Residence, measure, profile
from cachefreeze.report import opening_words, plan_table, room_words
from cachefreeze.freezeout.schedule import Schedule
from cachefreeze.staging import default_threads
from cachefreeze.store import check_cache_dir
from cachefreeze.terminal import say
from cachefreeze.tiers import Tiers


def preview(settings: Settings, max_cache_bytes: float) -> Forecast:
    """Measure, plan, and print it. Nothing is trained; what is written is removed again.

    The data set need not be there, and none of it is read but a few images: the measurement takes
    random pixels, for which the same arithmetic is done.

    Raises:
        UserError: something does not fit, or a folder is not as it should be.
    """
    device = resolve_device(settings.device)
    dtype = resolve_precision(settings.precision, device)
    set_numerics(device, dtype, tf32=settings.tf32, deterministic=settings.deterministic)
    check_cache_dir(settings.cache_dir)
    about = _outline(settings)
    generator = torch.Generator().manual_seed(0)
    channels, height, width = about.image_shape
    shape = (settings.batch_size, channels, height, width)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    torch.manual_seed(settings.seed)
    check_network(settings, about.image_shape)
    find_weights(settings)  # that they are there
    # Arithmetic takes as long with any weights.
    units, _ = make_network(settings, [str(number) for number in range(about.classes)])
    units.model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if settings.freeze_first is not None:
        units.freeze(settings.freeze_first)
    parameters = sum(parameter.numel() for parameter in units.model.parameters())
    where = f"{device}, {'bf16 autocast' if dtype else 'fp32'}"
    facts = {**settings.as_json(), "network": settings.network}
    for line in opening_words(
        facts, units.names, parameters, about.description, where, first=units.frontier
    ):
        say(line)

    nothing = ArrayImages(pixels[:0].permute(0, 2, 3, 1).numpy(), torch.zeros(0).long().numpy())
    inputs = InputRows(nothing, (0.5,) * channels, (0.25,) * channels, device)
    measured = profile(
        measure(
            units,
            inputs.from_pixels(pixels),
            passes=MAX_PASSES,
            device=device,
            autocast_dtype=dtype,
        ),
        inputs,
        pixels,
        row_passes=math.inf,
        device=device,
        decode_seconds=about.decode_seconds,
        directory=nearest_folder(settings.cache_dir),
        max_bytes=max_cache_bytes,
        stored=settings.stored,
        codec=settings.codec,
    )
    steps = settings.epochs * -(-about.train_rows // settings.batch_size)
    schedule = Schedule(
        len(units),
        steps,
        settings.t0 if settings.freeze else 1.0,
        settings.schedule,
        first=units.frontier,
    )
    run = Run(schedule.freeze_steps, steps, about.train_rows, about.val_rows, settings.batch_size)
    splits = {"train": about.train_rows, "val": about.val_rows}
    forecast = Forecast(
        measured,
        run,
        splits,
        max_cache_bytes,
        codec=settings.codec,
        policy=settings.cache_policy,
        residence=residence_of(settings, device),
    )
    say("")
    if units.frontier:
        say("(stores that are in the cache already are not counted)")
    for line in plan_table(forecast.first, run, units.names, forecast.why_nothing):
        say(line, always=True)
    if (roomy := forecast.with_more_room) is not None:
        say(room_words(roomy, max_cache_bytes).strip(), always=True)
    return forecast


def residence_of(settings: Settings, device: torch.device) -> Residence:
    """Where a run of these settings would hold its rows."""
    tiers = Tiers(device, settings.cache_tier, settings.device_cache_bytes)
    return Residence(tiers.first_with_room, default_threads(device))


def _outline(settings: Settings) -> Outline:
    if settings.rows is not None and settings.classes is not None:
        shape = (3, settings.image_size, settings.image_size)
        name = "an imagefolder that is not there (decoding is not counted)"
        return Outline(name, *settings.rows, settings.classes, shape, 0.0)
    return data.outline(
        settings.dataset,
        settings.data_dir,
        image_size=settings.image_size,
        val_fraction=settings.val_fraction,
        workers=settings.workers,
    )
