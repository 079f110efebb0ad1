"""`python -m cachefreeze.train`: parse, build, fit, report."""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cachefreeze import config, data
from cachefreeze.cache import PrefixCache
from cachefreeze.config import Settings
from cachefreeze.device import keep_freed_memory, resolve_device, resolve_precision
from cachefreeze.errors import UserError
from cachefreeze.files import nearest_folder, size_of_tree
from cachefreeze.models import build
from cachefreeze.preview import preview
from cachefreeze.report import RunFolder, closing_words, opening_words, say, track
from cachefreeze.store import check_cache_dir
from cachefreeze.trainer import Trainer

# Of the disk's free bytes: what the cache folder may take if nothing else is said.
FREE_DISK_SHARE = 0.8


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        settings = config.parse(argv)
        keep_freed_memory()
        if settings.plan:
            preview(settings, cache_budget(settings))
        else:
            run(settings, argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        last = settings.output_dir / "last.pt"
        kept = f"{last} is of the last whole epoch" if last.exists() else "nothing was saved yet"
        print(f"interrupted: {kept}", file=sys.stderr)
        return 130
    return 0


def run(
    settings: Settings,
    argv: Sequence[str] = (),
    make_cache: Callable[..., PrefixCache] = PrefixCache,
) -> dict[str, Any]:
    """Train as the settings say; returns what is in summary.json.

    Args:
        settings: of the run.
        argv: the words they were parsed from, to tell the user what to type next.
        make_cache: see `Trainer`.

    Raises:
        UserError: something is not there, does not fit, or cannot be written.
    """
    start = time.perf_counter()
    device = resolve_device(settings.device)
    dtype = resolve_precision(settings.precision, device)
    folder = RunFolder(settings.output_dir)
    if settings.cache:
        check_cache_dir(settings.cache_dir)
    sizes = settings.network_sizes()
    with torch.device("meta"):
        build(settings.arch, classes=2, **sizes)  # sizes that do not fit are told before the wait
    images = data.load(
        settings.dataset,
        settings.data_dir,
        image_size=settings.image_size,
        val_fraction=settings.val_fraction,
        workers=settings.workers,
        bar=track,
    )

    torch.manual_seed(settings.seed)
    model = build(settings.arch, len(images.classes), **sizes)
    budget = cache_budget(settings)
    trainer = Trainer(settings, images, model, device, dtype, folder, budget, make_cache)
    facts = {**settings.as_json(), "network": settings.network, "command": without_output_dir(argv)}
    folder.create(facts)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    where = f"{device}, {'bf16 autocast' if dtype else 'fp32'}"
    about = images.outline.description
    for line in opening_words(facts, len(model), parameters, about, where):
        say(line)
    summary = {"wall_seconds": 0.0, **trainer.fit()}
    summary["wall_seconds"] = time.perf_counter() - start
    folder.write_json("summary.json", summary)
    for line in closing_words(summary, facts, folder.path, this_python(), device.type == "cpu"):
        say(line)
    return summary


def cache_budget(settings: Settings) -> float:
    """Bytes that the cache folder may take."""
    if settings.cache_max_gb is not None:
        return settings.cache_max_gb * 1e9
    # What lies in the folder already is not free, but the cache's to use.
    free = shutil.disk_usage(nearest_folder(settings.cache_dir)).free
    return FREE_DISK_SHARE * (free + size_of_tree(settings.cache_dir))


def without_output_dir(argv: Sequence[str]) -> list[str]:
    """The words of a command line that may be given once more: a run's folder is its own."""
    words = [word for word in argv if not word.startswith("--output-dir=")]
    if "--output-dir" in words:
        place = words.index("--output-dir")
        del words[place : place + 2]
    return words


def this_python() -> str:
    """The running interpreter, as one would type it here."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else "python"


if __name__ == "__main__":
    sys.exit(main())
