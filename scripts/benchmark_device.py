"""Time FreezeOut on a GPU: without freezing, with freezing only, and cached in each tier.

    python scripts/benchmark.py --device cuda --data images --minutes 9

All runs are made in this one process, on images that are decoded once, and in turn; what does not
fit into the minutes is left out, and said. Nothing is downloaded. First, whether weights are the
same with and without the cache (exit code 1 if not); then per network, batch size and t0:

plain loop      images a second of a loop as people write it: DataLoader with workers, contiguous,
                `.item()` in every step, and torch as it comes: float32, with TF32 in convolutions
no freezing     this trainer, with all units trained to the end
freezing only   FreezeOut as published (--no-cache)
device          the cache's rows in device memory
host            in host memory, staged by threads
disk            from the store's files, staged by threads
limit           the device run, but for filling its stores and measuring

Seconds and images a second of a run are of all of it: validation, filling, measuring. The plain
loop is timed in its steps alone.
"""

import argparse
import gc
import io
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from cachefreeze import config, data
from cachefreeze.data import ArrayImages, DataSet, Images
from cachefreeze.data.sets import statistics as statistics_of
from cachefreeze.device import numerics, resolve_precision, set_numerics, synchronize
from cachefreeze.errors import UserError
from cachefreeze.files import human_bytes
from cachefreeze.models import build
from cachefreeze.moments import Moments
from cachefreeze.network import make_network
from cachefreeze.planner import efficiency
from cachefreeze.report.summary_text import markdown_table
from cachefreeze.rows import batches_of
from cachefreeze.run_folder import RunFolder
from cachefreeze.terminal import track
from cachefreeze.trainer import Trainer

MODES = {
    "no freezing": ["--no-freeze", "--no-cache"],
    "freezing only": ["--no-cache"],
    "device": ["--cache-tier", "device"],
    "host": ["--cache-tier", "host"],
    "disk": ["--cache-tier", "disk"],
}
# Steps of the plain loop before those that are timed.
WARM_STEPS = 10
# Steps that the profiler watches.
PROFILED_STEPS = 20
# Rows, validation rows and epochs of the runs whose weights are compared.
COMPARED_ROWS, COMPARED_VAL_ROWS, COMPARED_EPOCHS = 5000, 1000, 3
# File systems without a disk.
IN_MEMORY = ("tmpfs", "ramfs")
ARRAYS = ("train_pixels", "train_labels", "val_pixels", "val_labels")

Summary = dict[str, Any]

# Without it cuBLAS has no deterministic algorithms. It reads it once, when it is first used, and
# that is in a run that does not ask for them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass(frozen=True)
class Setting:
    """What one table is about."""

    network: str
    batch_size: int
    t0: float

    def __str__(self) -> str:
        return f"{self.network}, batches of {self.batch_size}, cubic, t0 = {self.t0:g}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        prog="benchmark.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", required=True, help="cuda (cpu tries the program out)")
    parser.add_argument(
        "--data",
        type=Path,
        help="a folder of images, as for --dataset imagefolder, or a file that --pack wrote; "
        "without it: scikit-learn's digits",
    )
    parser.add_argument("--image-size", type=int, default=32, help="of a folder's (default: 32)")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="only decode --data to this .npz")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: 9)")
    parser.add_argument("--networks", default="wrn16_4,wrn40_4", help="with commas")
    parser.add_argument("--batches", default="512,128", help="batch sizes, with commas")
    parser.add_argument("--t0", default="0.5,0.8", help="with commas")
    parser.add_argument("--epochs", type=int, default=10, help="of every run (default: 10)")
    parser.add_argument("--modes", default=",".join(MODES), help="with commas")
    parser.add_argument("--repeats", type=int, default=1, help="of all modes (default: 1)")
    parser.add_argument("--precision", default="auto", help="as for cachefreeze.train")
    parser.add_argument("--plain-steps", type=int, default=60, help="of the plain loop, timed")
    parser.add_argument("--workers", type=int, default=8, help="of the plain loop's DataLoader")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args(argv)
    try:
        images = load(args.data, args.image_size, args.workers)
        if args.pack is not None:
            pack(images, args.pack)
            return 0
        bench = Bench(args, images)
        same = bench.compare_weights()
        for setting in settings_of(args):
            bench.measure(setting)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json is not None:
        args.json.write_text(json.dumps(bench.figures, indent=2))
    return 0 if same else 1


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """In the order in which they matter, as time may run out: what was named first, then what
    differs from that in one thing, then in two."""
    words = (args.t0.split(","), args.networks.split(","), args.batches.split(","))
    chosen = itertools.product(*(list(enumerate(each)) for each in words))
    by_distance = sorted(chosen, key=lambda choice: sum(number for number, _ in choice))
    return [
        Setting(network, int(size), float(t0)) for (_, t0), (_, network), (_, size) in by_distance
    ]


def load(path: Path | None, size: int, workers: int) -> DataSet:
    """The images, decoded, in memory.

    Raises:
        UserError: they are not there.
    """
    if path is None:
        return data.load("digits", Path(), image_size=32, val_fraction=None, workers=0, bar=track)
    if path.is_file():
        return unpacked(path)
    if not path.is_dir():
        raise UserError(f"{path} is not there: give --data a folder of images, or a packed file")
    found = data.load(
        "imagefolder", path, image_size=size, val_fraction=None, workers=workers, bar=track
    )
    return replace(found, train=decoded(found.train), val=decoded(found.val), decode_seconds=0.0)


def decoded(images: Images) -> ArrayImages:
    batches = images.decode(batches_of(np.arange(len(images)), 256))
    return ArrayImages(torch.cat(list(batches)).numpy(), images.labels.numpy())


def pack(images: DataSet, path: Path) -> None:
    arrays = (images.train, images.val)
    parts = [part for each in arrays for part in (decoded(each).pixels, each.labels.numpy())]
    np.savez(path, **dict(zip(ARRAYS, parts, strict=True)))  # type: ignore[arg-type]
    print(f"{path}: {images.outline.description}, {human_bytes(path.stat().st_size)}")


def unpacked(path: Path) -> DataSet:
    try:
        with np.load(path, allow_pickle=False) as file:
            train_pixels, train_labels, val_pixels, val_labels = (file[name] for name in ARRAYS)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path} holds no packed images ({error}): make it with --pack") from error
    train, val = ArrayImages(train_pixels, train_labels), ArrayImages(val_pixels, val_labels)
    classes = tuple(map(str, range(int(train_labels.max()) + 1)))
    _, height, width, channels = train_pixels.shape
    shape = (channels, height, width)
    return DataSet(path.stem, classes, train, val, shape, *statistics_of(train))


class TimedTrainer(Trainer):
    """Remembers when each step ended, and may have the profiler watch a few of them."""

    def __init__(self, *args: Any, profiled: bool = False) -> None:
        super().__init__(*args)
        self.moments = Moments(self.device)
        # Epoch, units frozen, boundary, and when.
        self.ends: list[tuple[int, int, int, Any]] = []
        self.kernels: list[Kernel] = []
        # In the middle of the last epoch; the first of them is to warm up.
        half = self.steps_per_epoch // 2
        first, steps = self.total_steps - half, min(1 + PROFILED_STEPS, half)
        self.watched = range(first, first + steps) if profiled and steps > 1 else range(0)
        self._profiler: torch.profiler.profile | None = None

    def _step(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.watched and self.step == self.watched.start:
            self._profiler = kernel_profiler(len(self.watched) - 1)
            self._profiler.start()
        loss = super()._step(x, labels)
        if self._profiler is not None:
            if self.step in (self.watched.start, self.watched.stop - 1):
                synchronize(self.device)  # so that nothing is cut in two
            self._profiler.step()
            if self.step == self.watched.stop - 1:
                self._profiler.stop()
                self.kernels = kernels_of(self._profiler.events() or ())
                self._profiler = None
        state = self.epoch, self.units.frontier, self.cache.boundary
        self.ends.append((*state, self.moments.now()))
        return loss

    def rates(self) -> list[dict[str, float]]:
        """Steps a second for each number of frozen units and source of rows: the median."""
        gaps: dict[tuple[int, int], list[float]] = {}
        for (*state, before), (*next_state, after) in pairwise(self.ends):
            if state == next_state:  # nothing was filled or validated between
                _, frozen, boundary = state
                gaps.setdefault((frozen, boundary), []).append(self.moments.seconds(before, after))
        return [
            {"frozen": frozen, "boundary": boundary, "steps": 1 / statistics.median(seconds)}
            for (frozen, boundary), seconds in gaps.items()
        ]


@dataclass(frozen=True)
class Kernel:
    """What a GPU did at a time, in microseconds."""

    name: str
    start: float
    end: float


def kernel_profiler(steps: int) -> torch.profiler.profile:
    """Watches what a GPU does, after one step to warm up, for so many steps. What the host does is
    not watched: that would slow it, and the GPU would seem to wait for it."""
    return torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA],
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1),
        acc_events=True,
    )


def kernels_of(events: Iterable[Any]) -> list[Kernel]:
    """What the GPU did, of all that was seen. Regions of the program that have a name (an
    optimiser's step) are shown on its timeline, too, and would hide that it is idle in them."""
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if str(event.device_type).endswith("CUDA")
        and not getattr(event, "is_user_annotation", False)
    ]


def idle_share(kernels: Sequence[Kernel]) -> float:
    """The share of the time from the first to the last in which there was none."""
    busy, reached = 0.0, min(kernel.start for kernel in kernels)
    start = reached
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        busy += max(kernel.end - max(kernel.start, reached), 0.0)
        reached = max(reached, kernel.end)
    return 1 - busy / (reached - start)


def longest(kernels: Sequence[Kernel], count: int) -> list[str]:
    """What the GPU spent most of its time on, in Markdown."""
    times: dict[str, float] = {}
    for kernel in kernels:
        times[kernel.name] = times.get(kernel.name, 0.0) + kernel.end - kernel.start
    most = sorted(times.items(), key=lambda item: -item[1])[:count]
    rows = [[name[:70], f"{time / sum(times.values()):.0%}"] for name, time in most]
    return markdown_table([["kernel", "of the GPU's work"], *rows])


class Bench:
    """Measures settings until the time is over."""

    def __init__(self, args: argparse.Namespace, images: DataSet) -> None:
        self.args = args
        self.images = images
        self.deadline = time.perf_counter() + 60 * args.minutes
        self.device = torch.device(args.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("there is no CUDA device here: --device cpu only tries the program out")
        set_numerics(self.device)
        facts = {name: str(value) for name, value in numerics(self.device).items()}
        self.files = file_system(Path(tempfile.gettempdir()))
        self.figures: dict[str, Any] = {"numerics": facts, "disk": self.files, "settings": []}
        where = torch.cuda.get_device_name() if self.device.type == "cuda" else "a CPU"
        memory = ", which is memory: `disk` tells nothing of a disk here"
        print(
            f"{images.outline.description}; {where}, torch {torch.__version__}, "
            f"{args.epochs} epochs a run, {args.repeats} of each; the disk is {self.files}"
            + (memory if self.files in IN_MEMORY else ""),
            flush=True,
        )

    def has_time(self, seconds: float = 0.0) -> bool:
        return time.perf_counter() + seconds < self.deadline

    def measure(self, setting: Setting) -> None:
        """All modes of one setting, and the table."""
        print(f"\n## {setting}\n", flush=True)
        if not self.has_time():
            print("Not run: no time left.")
            return
        plain = self.plain_rate(setting)
        runs: dict[str, list[Summary]] = {mode: [] for mode in self.args.modes.split(",")}
        words = self.words(setting)
        expected = self.args.epochs * self.epoch_seconds(words)
        for repeat in range(self.args.repeats):
            for mode in runs:
                if self.has_time(expected):
                    start = time.perf_counter()
                    runs[mode].append(self.run([*words, *MODES[mode]])[0])
                    expected = max(expected, time.perf_counter() - start)
                else:
                    print(f"({mode}, repeat {repeat + 1}: not run, no time left)")
        figures = {**vars(setting), "plain_images_per_second": plain, "runs": runs}
        self.figures["settings"].append(figures)
        print("\n".join(self.table(runs, plain)), flush=True)
        if self.device.type == "cuda":
            for mode in ("no freezing", "device"):
                if not self.has_time(expected):
                    print(f"(kernels, {mode}: not watched, no time left)")
                    continue
                options = [*words, *MODES[mode], "--epochs", "2"]
                kernels = self.run(options, profiled=True)[1].kernels
                if kernels:
                    idle = figures[f"idle, {mode}"] = idle_share(kernels)
                    print(f"\n{mode}, last epoch of two: the GPU is idle {idle:.1%} of the time\n")
                    print("\n".join(longest(kernels, 6)), flush=True)

    def epoch_seconds(self, words: Sequence[str]) -> float:
        """Of training without freezing. In the epoch before the one that counts, algorithms are
        chosen and loaded, which the runs that are timed need not do again."""
        trainer = self.run([*words, *MODES["no freezing"], "--epochs", "2"])[1]
        return float(trainer.metrics[-1]["seconds"])

    def words(self, setting: Setting) -> list[str]:
        words = f"--arch {setting.network} -b {setting.batch_size} --t0 {setting.t0} -j 0 "
        words += f"--epochs {self.args.epochs} --device {self.device.type} "
        return [*words.split(), "--precision", self.args.precision]

    def run(
        self, words: Sequence[str], *, profiled: bool = False, images: DataSet | None = None
    ) -> tuple[Summary, TimedTrainer]:
        """One run, of all images or those given: its summary, with the rates of its steps and the
        most device memory that it had, and what made it."""
        images = images or self.images
        # What an earlier run leaves in the allocator would count as taken, and rows not fit.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory(prefix="cachefreeze-benchmark-") as name:
            folder = Path(name) / "run"
            places = ["--cache-dir", f"{name}/cache", "--output-dir", str(folder)]
            settings = config.parse([*words, *places])
            dtype = resolve_precision(settings.precision, self.device)
            torch.manual_seed(settings.seed)
            units, _ = make_network(settings, images.classes)
            with closing(RunFolder(folder)) as output, quiet():
                trainer = TimedTrainer(
                    settings,
                    images,
                    units,
                    self.device,
                    dtype,
                    output,
                    0.8 * shutil.disk_usage(name).free,
                    profiled=profiled,
                )
                output.create(settings.as_json())
                summary = trainer.fit()
            summary["rates"] = trainer.rates()
            if self.device.type == "cuda":
                summary["peak_device_bytes"] = torch.cuda.max_memory_allocated()
            return summary, trainer

    def plain_rate(self, setting: Setting) -> float:
        """Images a second of a loop as people write it, with torch as it comes."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            return self._plain_rate(setting)

    def _plain_rate(self, setting: Setting) -> float:
        settings = config.parse(self.words(setting))
        sizes = settings.network_sizes()
        model = build(settings.arch, len(self.images.classes), **sizes).to(self.device)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
        )
        batch = min(setting.batch_size, len(self.images.train))
        loader = DataLoader(
            AsPeopleDo(self.images),
            batch_size=batch,
            shuffle=True,
            num_workers=self.args.workers,
            drop_last=True,
            persistent_workers=self.args.workers > 0,
        )
        model.train()
        seconds, running_loss = [], 0.0
        mark = time.perf_counter()
        for x, y in islice(forever(loader), WARM_STEPS + self.args.plain_steps):
            loss = F.cross_entropy(model(x.to(self.device)), y.to(self.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            seconds.append(time.perf_counter() - mark)
            mark = time.perf_counter()
        # The mean: workers deliver in bursts.
        return batch / statistics.mean(seconds[WARM_STEPS:])

    def table(self, runs: dict[str, list[Summary]], plain: float) -> list[str]:
        """Medians of the repeats, in Markdown, and what they come to."""
        head = ["mode", "n", "seconds", "images a second", "this / plain loop", "val accuracy"]
        rows = [[*head, "filling", "rows were in", "device memory"]]
        for mode, summaries in runs.items():
            if not summaries:
                continue
            last = summaries[-1]
            rate = self.rate(summaries)
            rows.append(
                [
                    mode,
                    str(len(summaries)),
                    f"{middle([each['wall_seconds'] for each in summaries]):.2f}",
                    f"{rate:,.0f}",
                    f"{rate / plain:.2f}",
                    f"{last['val_accuracy']:.2%}",
                    f"{last['materialize_seconds']:.2f}",
                    tiers_of(last),
                    human_bytes(last["peak_device_bytes"]) if "peak_device_bytes" in last else "",
                ]
            )
        if cached := runs.get("device"):
            seconds = middle([limit_of(each) for each in cached])
            rate = len(self.images.train) * cached[0]["epochs"] / seconds
            speed = [f"{seconds:.2f}", f"{rate:,.0f}", f"{rate / plain:.2f}"]
            rows.append(["limit", str(len(cached)), *speed, "", "", "", ""])
        tf32 = " (TF32 allowed in convolutions)" if self.device.type == "cuda" else ""
        lines = [
            f"Plain loop: {plain:,.0f} images a second, in float32{tf32}, images prepared one by "
            f"one by {self.args.workers} workers.",
            "",
            *markdown_table(rows),
            "",
            "Steps a second by the number of frozen units, of the last repeat (@2: with rows from "
            "a store of boundary 2):",
            "",
            *markdown_table(rates_table(runs)),
            "",
        ]
        return [*lines, *self.speedup(runs, plain), *efficiencies(runs)]

    def rate(self, summaries: Sequence[Summary]) -> float:
        """Images a second of runs in one mode, whatever they did: the median."""
        images = len(self.images.train) * summaries[0]["epochs"]
        return images / middle([summary["wall_seconds"] for summary in summaries])

    def speedup(self, runs: dict[str, list[Summary]], plain: float) -> list[str]:
        """Against the plain loop, and how much of that is not the cache's."""
        if not (runs.get("no freezing") and runs.get("device")):
            return []
        first, cached = self.rate(runs["no freezing"]), self.rate(runs["device"])
        bf16 = resolve_precision(self.args.precision, self.device) is not None
        precision = "bf16" if bf16 else "float32 without TF32"
        return [
            f"From the plain loop to device: {cached / plain:.2f}x. Of that {first / plain:.2f}x "
            f"is this trainer ({precision}, images that lie decoded in memory), and "
            f"{cached / first:.2f}x is freezing with the cache."
        ]

    def compare_weights(self) -> bool:
        """Whether weights are the same with and without the cache, with --deterministic, on some
        of the images; True if there is no time to see."""
        print("\n## Weights\n")
        setting = replace(settings_of(self.args)[0], t0=0.5)
        words = [*self.words(setting), "--epochs", str(COMPARED_EPOCHS), "--deterministic"]
        images = some_of(self.images)
        hashes: dict[str, str] = {}
        set_numerics(self.device, deterministic=True)
        try:
            for mode in ("freezing only", "device", "host", "disk"):
                if not self.has_time():
                    print("Not compared: no time left.")
                    return True
                options = [*words, *MODES[mode]]
                if mode != "freezing only":
                    options += ["--cache-policy", "eager"]
                summary, _ = self.run(options, images=images)
                hashes[mode] = summary["weights_sha256"]
                served = summary["cache"]["rows_served"]
                where = f", {served:,} rows from {tiers_of(summary)}" if served else ""
                print(f"{mode}: {hashes[mode][:16]}{where}", flush=True)
        finally:
            set_numerics(self.device)
        self.figures["weights"] = hashes
        same = len(set(hashes.values())) == 1
        print(
            f"With --deterministic, {setting}, {len(images.train):,} images, {COMPARED_EPOCHS} "
            f"epochs: {'the same' if same else 'DIFFERENT'}."
        )
        return same


def rates_table(runs: dict[str, list[Summary]]) -> list[list[str]]:
    """Steps a second of every mode (a column) at every frontier (a row)."""
    modes = [mode for mode, summaries in runs.items() if summaries]
    cells: dict[int, dict[str, list[str]]] = {}
    for mode in modes:
        for each in runs[mode][-1]["rates"]:
            where = f" @{each['boundary']}" if each["boundary"] else ""
            of_mode = cells.setdefault(each["frozen"], {}).setdefault(mode, [])
            of_mode.append(f"{each['steps']:.1f}{where}")
    lines = [
        [str(frozen), *(", ".join(rates.get(mode, [])) for mode in modes)]
        for frozen, rates in sorted(cells.items())
    ]
    return [["frozen", *modes], *lines]


def efficiencies(runs: dict[str, list[Summary]]) -> list[str]:
    """Of each tier: the share of what a free cache would save; the medians, in words."""
    lines = []
    for tier in ("device", "host", "disk"):
        reached = [
            efficiency(freezing["wall_seconds"], cached["wall_seconds"], limit_of(limit))
            for freezing, cached, limit in zip(
                runs.get("freezing only", []),
                runs.get(tier, []),
                runs.get("device", []),
                strict=False,
            )
        ]
        shares = [share for share in reached if share is not None]
        if shares:
            plans = [summary["plan"] for summary in runs[tier] if summary["plan"]]
            hoped = [plan["predicted"]["efficiency"] or 0.0 for plan in plans]
            within = [plan["actual"]["efficiency"] or 0.0 for plan in plans]
            lines.append(
                f"Efficiency from {tier}: {middle(shares):.2f} (predicted {middle(hoped):.2f}, "
                f"by what the run measured of itself {middle(within):.2f})."
            )
    return lines


def some_of(images: DataSet) -> DataSet:
    """At most `COMPARED_ROWS` of them, taken at random: in a folder they lie by class."""

    def some(split: Images, most: int) -> ArrayImages:
        assert isinstance(split, ArrayImages)
        rows = np.random.default_rng(0).permutation(len(split))[:most]
        return ArrayImages(split.pixels[rows], split.labels.numpy()[rows])

    return replace(
        images,
        train=some(images.train, COMPARED_ROWS),
        val=some(images.val, COMPARED_VAL_ROWS),
    )


def tiers_of(summary: Summary) -> str:
    """Where a run's stored rows really were: there may have been no room where they should be."""
    return ", ".join(sorted({event["tier"] for event in summary["cache"]["boundaries"]}))


def file_system(folder: Path) -> str:
    """The kind of file system that a folder is on, by Linux's name for it."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "of an unknown kind"
    above = [mount for mount in mounts if folder.resolve().is_relative_to(mount[1])]
    # Of several at the same place the last one is seen.
    return sorted(above, key=lambda mount: len(mount[1]))[-1][2]


def limit_of(summary: Summary) -> float:
    """Seconds of a run with rows in device memory, but for filling and measuring."""
    spent: float = summary["materialize_seconds"] + summary["profile_seconds"]
    return summary["wall_seconds"] - spent


def middle(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


@contextmanager
def quiet() -> Iterator[None]:
    """What a run says goes nowhere."""
    with redirect_stdout(io.StringIO()):
        yield


class AsPeopleDo(Dataset[tuple[Tensor, int]]):
    """Images one by one, with torchvision's transforms."""

    def __init__(self, images: DataSet) -> None:
        assert isinstance(images.train, ArrayImages)
        self.pixels, self.labels = images.train.pixels, images.train.labels.tolist()
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(images.mean, images.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(self.pixels[row]), self.labels[row]


def forever(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
