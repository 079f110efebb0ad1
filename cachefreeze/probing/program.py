"""The program `python -m cachefreeze.probe`: one pass of the network, and many heads on it."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachefreeze.errors import UserError
from cachefreeze.plan.views import FLIPS, count_views
from cachefreeze.probing.options import ProbeSettings, network_settings, parse
from cachefreeze.training.settings import network_name
from cachefreeze.training.terminal import printable, progress_bar, say, speaking, this_python, track

if TYPE_CHECKING:
    import torch

    from cachefreeze.probing.grid import Trial
    from cachefreeze.probing.saved import Saved

# Lines of a table on the terminal, and of predictions.
_MOST_LINES = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        settings, shared = parse(argv)
        with speaking(settings.verbosity):
            _run(settings, shared, list(argv))
    except UserError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "stopped at once: rows that were computed so far are kept, and the same command finds "
            "them",
            file=sys.stderr,
        )
        return 130
    return 0


def _run(settings: ProbeSettings, shared: dict[str, Any], argv: list[str]) -> None:
    from cachefreeze.probing.saved import Saved, images_in
    from cachefreeze.store.files import why_not_writable
    from cachefreeze.training.device import resolve_device

    problem = why_not_writable(settings.output_dir)
    if problem is not None:
        raise UserError(
            f"{settings.output_dir} cannot be written to ({problem}): choose another --output-dir"
        )
    if settings.head is not None:
        saved = Saved.read(settings.head)
        _predict(saved, settings, resolve_device(shared.get("device", "auto")))
        return
    if settings.predict is not None:
        images_in(settings.predict)  # or it is told after all the work
    saved, device = _probe(settings, shared, argv)
    if settings.predict is not None:
        _predict(saved, settings, device)


def _predict(saved: "Saved", settings: ProbeSettings, device: "torch.device") -> None:
    from cachefreeze.probing.saved import predict

    assert settings.predict is not None
    count = 0
    for path, name, share in predict(saved, settings.predict, settings.output_dir, device):
        count += 1
        if count <= _MOST_LINES:
            say(f"{path}  {name}  {share:.1%}", always=True)
    say(f"predicted {count:,} images: {settings.output_dir / 'predictions.csv'}", always=True)


def _probe(
    settings: ProbeSettings, shared: dict[str, Any], argv: list[str]
) -> tuple["Saved", "torch.device"]:
    """Computes rows, trains heads, and writes what came of it."""
    import torch

    from cachefreeze.cache import ActivationCache
    from cachefreeze.probing.backbone import Backbone, Joined, find_layout
    from cachefreeze.probing.grid import fitted, train_linear
    from cachefreeze.probing.probe import rows_of
    from cachefreeze.probing.rows import frozen
    from cachefreeze.probing.saved import Saved
    from cachefreeze.probing.turns import turn
    from cachefreeze.training.device import (
        autocast,
        keep_freed_memory,
        resolve_device,
        resolve_precision,
        set_numerics,
    )
    from cachefreeze.training.network import check_network, find_weights, make_network
    from cachefreeze.training.run_folder import make_cache_folder

    began = time.perf_counter()
    keep_freed_memory()
    run = network_settings(*_of_checkpoint(settings, shared))
    device = resolve_device(run.device)
    dtype = resolve_precision(run.precision, device)
    set_numerics(device, dtype, tf32=False, deterministic=False)
    check_network(run, (3, run.image_size, run.image_size))
    weights = find_weights(run)
    known = None if weights is None else weights.statistics
    train, val, classes, mean, std = _data(settings, run, known)
    torch.manual_seed(settings.seed)
    model, _ = make_network(run, classes, weights)
    model.eval().to(device)
    layout = find_layout(model, max(settings.blocks), run.image_size, device)
    if not layout.poolings(settings.pooling):
        raise UserError(
            "the network has no class token: give --pooling mean, or leave out --pooling"
        )
    backbone = Backbone(model, layout, pooled=settings.task == "classification")
    make_cache_folder(run.cache_dir)
    say(f"network   {run.network}: the last {len(layout.blocks)} of its blocks, on {device}")
    counts = f"{len(train):,} training and {len(val):,} validation images"
    say(f"data      {counts}, {len(classes)} classes")

    join = Joined()

    def call(x: torch.Tensor) -> torch.Tensor:
        with autocast(device, dtype):
            return join(backbone(x))

    views, transform = _augmented(settings)
    total = count_views(views) * len(train) + len(val)
    cache = ActivationCache(backbone, directory=run.cache_dir, max_bytes=run.cache_bytes)
    options: dict[str, Any] = {"workers": run.workers, "seed": settings.seed}
    work = {
        "network": run.network, "weights": str(run.weights), "blocks": layout.blocks,
        "images": str(run.data_dir.resolve()), "size": run.image_size, "share": run.val_fraction,
        "views": views, "seed": settings.seed, "task": settings.task, "type": str(dtype),
        "device": str(device),
    }  # fmt: skip
    with (
        turn(run.cache_dir, work) as goes_on,
        frozen(backbone),
        cache,
        progress_bar("network", total, "image") as bar,
    ):

        def tick(count: int) -> None:
            bar.update(count)
            goes_on()

        options["tick"] = tick
        rows = rows_of(call, cache, train, device, views, transform, **options)
        val_rows = rows_of(call, cache, val, device, **options)
    computed = time.perf_counter() - began
    served = cache.stats.rows_served
    say(f"rows      {total:,} in {computed:.1f} s, {served:,} of them from {run.cache_dir}")

    trials: list[Trial] = []
    if settings.task == "segmentation" or "linear" in settings.methods:
        with progress_bar("heads", settings.epochs * len(rows), "row") as bar:
            trials += train_linear(
                settings, layout, len(classes), rows, val_rows, device, bar.update
            )
    if settings.task == "classification" and set(settings.methods) - {"linear"}:
        with progress_bar("fits", len(layout.poolings(settings.pooling)), "fit") as bar:
            trials += fitted(settings, layout, len(classes), rows, val_rows, device, bar.update)
    heads = [one for one in trials if one.head is not None]
    best = max(heads, key=lambda one: one.score, default=None)
    _tell(trials, settings)
    seconds = time.perf_counter() - began
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    results = {
        "command": argv, "network": run.network, "images": [len(train), len(val)],
        "classes": list(classes), "seconds": seconds, "seconds_of_rows": computed,
        "rows": total, "rows_served": served, "cache_messages": list(cache.messages),
        "heads": [one.as_json() for one in trials],
    }  # fmt: skip
    (settings.output_dir / "heads.json").write_text(json.dumps(results, indent=1) + "\n")
    assert best is not None
    assert best.head is not None
    saved = Saved(
        {"arch": run.arch, **run.network_sizes()}, len(classes), layout, best.head.columns,
        settings.task, tuple(classes), run.image_size, mean, std, model.state_dict(),
        best.head.linear.state_dict(),
    )  # fmt: skip
    saved.write(settings.output_dir / "best.pt")
    say(
        f"best      {best.method}, last {best.blocks}, {best.pooling}, {best.setting}: "
        f"{best.score:.2%}, saved in {settings.output_dir / 'best.pt'}",
        always=True,
    )
    say(f"time      {seconds:.1f} s")
    if settings.report:
        say(f"report    {_report(settings, results)}", always=True)
    return saved, device


def _of_checkpoint(
    settings: ProbeSettings, shared: dict[str, Any]
) -> tuple[ProbeSettings, dict[str, Any]]:
    """Puts the network's name and weights in the place of a checkpoint that was given as model."""
    import dataclasses

    from cachefreeze.training.checkpoint import is_checkpoint, read_saved

    path = Path(settings.model or "")
    if not path.is_file():
        return settings, shared
    found = read_saved(path, f"--model {path}", "holds no weights")
    said = found.get("settings") if is_checkpoint(found) else None
    if not isinstance(said, dict) or "arch" not in said:
        raise UserError(
            f"--model {path} does not say which network its weights are for: give the network as "
            "--model, and the file as --weights"
        )
    changed = dataclasses.replace(settings, model=network_name(str(said["arch"]), said))
    return changed, {**shared, "weights": str(path)}


def _data(
    settings: ProbeSettings, run: Any, known: Any
) -> tuple[Any, Any, Sequence[str], Any, Any]:
    """Returns the training and validation images, the classes, and the mean and deviation."""
    import numpy as np

    from cachefreeze import data
    from cachefreeze.models import IMAGENET
    from cachefreeze.probing.pictures import IGNORED, Masked, Pictures, list_pairs, split_pairs

    if settings.task == "segmentation":
        mean, std = known or IMAGENET
        pairs = list_pairs(run.data_dir)
        parts = split_pairs(run.data_dir, *pairs, settings.val_fraction)
        train, val = (Masked(*part, run.image_size, mean, std) for part in parts)
        numbers: set[int] = set()
        with progress_bar("reading masks", len(pairs[0]), "mask") as bar:
            for part in (train, val):
                for row in range(len(part)):
                    numbers |= set(np.unique(part.mask(row).numpy()).tolist())
                    bar.update()
        count = max(numbers - {IGNORED}, default=0) + 1
        if count < 2:
            raise UserError(
                f"{run.data_dir / 'masks'} has one class only: give masks with at least two"
            )
        return train, val, [str(number) for number in range(count)], mean, std
    images = data.load(
        "imagefolder", run.data_dir, image_size=run.image_size, val_fraction=run.val_fraction,
        workers=run.workers, skip_broken=run.skip_broken, bar=track, normalization=known,
    )  # fmt: skip
    found = [
        Pictures(part.files.paths, part.labels.tolist(), run.image_size, images.mean, images.std)  # type: ignore[attr-defined]
        for part in (images.train, images.val)
    ]
    return found[0], found[1], images.classes, images.mean, images.std


def _augmented(settings: ProbeSettings) -> tuple[Any, Any]:
    """Returns the number of views, and the transform that makes them."""
    if settings.views in (None, FLIPS):
        return settings.views, None
    from torchvision.transforms import v2  # takes seconds

    size = settings.image_size
    crop = v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True)
    return settings.views, v2.Compose([crop, v2.RandomHorizontalFlip()])


def _name_of_score(settings: ProbeSettings) -> str:
    return "mean IoU" if settings.task == "segmentation" else "accuracy"


def _tell(trials: "list[Trial]", settings: ProbeSettings) -> None:
    from cachefreeze.report.summary_text import format_table

    header = ("head", "blocks", "pooling", "setting", _name_of_score(settings))
    order = sorted(trials, key=lambda one: -one.score)
    rows = [
        (one.method, str(one.blocks), one.pooling, one.setting, f"{one.score:.2%}")
        for one in order[:_MOST_LINES]
    ]
    say("")
    for line in format_table([header, *rows], right=(1, 4)):
        say(line, always=True)
    if len(order) > _MOST_LINES:
        where = settings.output_dir / "heads.json"
        say(f"and {len(order) - _MOST_LINES} more heads, in {where}", always=True)
    say("")


def _report(settings: ProbeSettings, results: dict[str, Any]) -> str:
    """Draws report.html; returns its path, or says why there is none."""
    path = settings.output_dir / "report.html"
    try:
        from cachefreeze.report.probe_page import probe_page  # an extra

        path.write_bytes(probe_page(results, this_python(), _name_of_score(settings)))
    except UserError as error:
        return f"none: {error}"
    return str(path)
