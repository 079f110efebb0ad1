"""The training loop."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachefreeze.cache import ActivationCache
from cachefreeze.cache.memory import free_device_memory, free_memory
from cachefreeze.data import ArrayImages, DataSet, Indices, InputRows, epoch_order, full_batches
from cachefreeze.data.order import all_rows
from cachefreeze.errors import Interrupted, UserError, first_line
from cachefreeze.freezeout import Unit
from cachefreeze.keys.environment import numerics
from cachefreeze.keys.hashing import weights_sha256
from cachefreeze.plan.costs import Costs
from cachefreeze.plan.forecast import Run
from cachefreeze.report.metrics import Metrics
from cachefreeze.report.run_results import SCHEMA
from cachefreeze.report.summary_text import epoch_line, fill_line, forecast_line
from cachefreeze.training.checkpoint import LAST, is_due, save_checkpoint
from cachefreeze.training.device import synchronize
from cachefreeze.training.interrupts import Interrupts
from cachefreeze.training.measuring import TIMED, WARM_UP, forward_seconds
from cachefreeze.training.progress import Eta, Progress, RunBar
from cachefreeze.training.randomness import random_state, set_random_state
from cachefreeze.training.resume import check_same_run
from cachefreeze.training.run_folder import RunFolder
from cachefreeze.training.settings import Settings
from cachefreeze.training.step import logits_of, prepare, take_step
from cachefreeze.training.terminal import progress_bar, say, warn

# Shares of free memory that the decoded pixels of a data set may take.
DEVICE_SHARE, MEMORY_SHARE = 0.2, 0.25
# A validation or a fill that takes so many seconds has a bar of its own: that of the run stands
# still.
SHOW_AFTER = 2.0
# Measuring for the forecast costs about a step: too much for a run of fewer.
LEAST_STEPS = 100
# Bytes of weights that become part of a checkpoint in a second, before one was timed.
SAVE_RATE = 2e8
# Number of times that the code of a module is compiled: for each of its blocks, modes and freezes.
MOST_COMPILED = 256
PARTS = ("train", "fill", "validate", "checkpoint")
COUNTED = ("rows_served", "rows_computed", "seconds_saved")


class Trainer:
    """Trains a network with FreezeOut on a data set, and leaves the run's files in a folder.

    Args:
        settings: Settings of the run.
        data: Data set to train on.
        model: Initialised network. It is trained in place.
        device: Device to train on.
        autocast_dtype: Type for autocast, or None.
        folder: Folder of the run.
        command: Words of the command line that are settings of the run. They are saved for
            `--resume`.

    Attributes:
        epoch: Number of whole epochs so far.
        position: Number of batches so far in the present epoch.
        step: Number of steps so far.
        metrics: Line of each whole epoch.
        written: Files of these lines in the run's folder.
        started: Clock when this process began with the run.
    """

    def __init__(
        self,
        settings: Settings,
        data: DataSet,
        model: nn.Module,
        device: torch.device,
        autocast_dtype: torch.dtype | None,
        folder: RunFolder,
        command: Sequence[str] = (),
    ) -> None:
        self.settings = settings
        self.command = list(command)
        self.interrupts = Interrupts()
        self.device = device
        self.autocast_dtype = autocast_dtype
        self.folder = folder
        self.data = data.facts
        self.model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        example = torch.zeros(2, *data.image_shape, device=device)
        self.labels = {"train": data.train.labels.to(device), "val": data.val.labels.to(device)}
        kept_on = _place_of_pixels(settings, data, device)
        self.inputs = {
            split: InputRows(
                images,
                data.mean,
                data.std,
                device,
                augment_seed,
                views=settings.views,
                kept_on=kept_on,
            )
            for split, images, augment_seed in (
                ("train", data.train, settings.seed if settings.augment else None),
                ("val", data.val, None),
            )
        }
        self.steps_per_epoch = len(full_batches(np.arange(len(data.train)), settings.batch_size))
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.optimizer, self.scheduler = prepare(settings, self.model, example, self.total_steps)
        self.names = list(self.scheduler.names)
        groups = self.optimizer.param_groups
        self._units = [Unit(group["name"], tuple(group["params"])) for group in groups]
        self._compiled = _compile(self.model, self._units) if settings.compile else []
        self.run = Run(
            self.scheduler.schedule.freeze_steps,
            self.total_steps,
            self.steps_per_epoch,
            len(data.train),
            len(data.val),
            settings.batch_size,
            views=settings.views_of_a_row,
            keeps_pixels=kept_on is not None or isinstance(data.train, ArrayImages),
        )
        self.cache: ActivationCache | None = None
        self._kept = 0  # units whose rows are kept
        self.epoch = self.position = self.step = 0
        self.metrics: list[dict[str, Any]] = []
        self.written = Metrics(folder, self.names, tensorboard=settings.tensorboard)
        self.costs: Costs | None = None
        self.fills: list[dict[str, Any]] = []
        self.resumed_at: list[int] = []
        # Of the steps of this epoch. Kept on the device: `.item()` in every step would wait for it.
        self._losses: list[Tensor] = []
        # Of all processes of the run: what an earlier one counted is added when it is resumed.
        self.seconds = dict.fromkeys((*PARTS, "load", "wall"), 0.0)
        self._counts: dict[str, float] = dict.fromkeys(COUNTED, 0)
        self._best: dict[str, Any] | None = None
        self.started = self._saved = time.perf_counter()
        self._save_seconds = 0.0
        self._measured, self._mark = 0, (0.0, 0.0)
        self._epoch_start = self._so_far()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on with a run that was cut off.

        Args:
            state: Contents of its checkpoint.

        Raises:
            UserError: The data or the device are others than before, or the state does not fit.
        """
        last = self.folder.path / LAST
        try:
            check_same_run(state, self.settings, self.data, self._numerics(), last, warn)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])  # freezes what was frozen
            self.epoch, self.position = int(state["epoch"]), int(state["position"])
            self.step = self.epoch * self.steps_per_epoch + self.position
            if (self.step, len(state["metrics"])) != (self.scheduler.last_epoch, self.epoch):
                raise ValueError("its parts are of different moments")
            self.metrics = [dict(line) for line in state["metrics"]]
            for line in self.metrics:
                float(line["val_accuracy"])
            self._losses = list(state["losses"].to(self.device).reshape(self.position))
            if state["costs"] is not None:
                self.costs = Costs.from_json(state["costs"], len(self.names))
            self.fills = [dict(fill) for fill in state["fills"]]
            self.resumed_at = [*(int(step) for step in state["resumed_at"]), self.step]
            self._counts = {name: float(state["totals"][name]) for name in COUNTED}
            self.seconds = {part: float(state["totals"][part]) for part in self.seconds}
            start = state["epoch_start"]
            self._epoch_start = {name: float(start[name]) for name in self._epoch_start}
            set_random_state(state["random"], self.device)
            self.written.rewrite(self.metrics)
        except UserError:
            raise
        except Exception as error:  # whatever content of a file may lead to
            reason = first_line(error)
            raise UserError(f"{last} does not fit this run ({reason}): start a new one") from error

    def _numerics(self) -> dict[str, str]:
        """Returns what decides the last bits of results, besides the settings."""
        own = {"precision": "bf16" if self.autocast_dtype else "fp32"}
        return own | {name: str(value) for name, value in numerics(self.device).items()}

    @property
    def place(self) -> str:
        """Progress of the run in words."""
        epoch = min(self.epoch + 1, self.settings.epochs)
        return f"step {self.step:,} of {self.total_steps:,} (epoch {epoch})"

    @property
    def best_val_accuracy(self) -> float:
        """Best accuracy of the epochs so far."""
        return max(line["val_accuracy"] for line in self.metrics)

    def fit(self) -> dict[str, Any]:
        """Trains all epochs that are left.

        Returns:
            Contents of summary.json.

        Raises:
            Interrupted: The user or the system asked to stop. The state was saved.
            UserError: The loss is infinite or not a number, or the run's folder cannot be written.
        """
        with self.interrupts, ExitStack() as self._open:
            self._open.callback(self.written.close)
            try:
                self._look_ahead()
                if self.scheduler.frontier and self.step < self.total_steps:
                    self._after_freeze()
                with RunBar(self.total_steps, self._progress) as bar:
                    while self.epoch < self.settings.epochs:
                        self._epoch(bar)
                        say(epoch_line(self.metrics[-1], self.settings.epochs, self.names))
                summary = self._summary()
            except Interrupted:
                self._save()
                received = self.interrupts.received
                assert received is not None
                where = self.folder.path / LAST
                raise Interrupted(
                    f"interrupted at {self.place}: saved in {where}", 128 + received
                ) from None
        if self.cache is not None:  # closed by now: it may have said more
            summary["cache"]["messages"] = list(self.cache.messages)
        summary["wall_seconds"] = self._so_far()["wall"]
        return summary

    def _epoch(self, bar: RunBar) -> None:
        """Runs what is left of an epoch: steps, validation, a line of metrics, a checkpoint."""
        self._train(bar)
        with self._timing("train"):
            train_loss = float(torch.stack(self._losses).cpu().double().mean())
        self._refuse_losses(self._losses)
        val_loss, val_accuracy = self._validate()
        if not np.isfinite(val_loss):
            raise self._not_finite("validation loss", val_loss, self.step)
        now = self._so_far()
        spent = {name: now[name] - self._epoch_start[name] for name in now}
        best = not self.metrics or val_accuracy > self.best_val_accuracy
        rows = self.steps_per_epoch * min(self.settings.batch_size, len(self.labels["train"]))
        self.metrics.append(
            {
                "epoch": self.epoch + 1,
                "step": self.step,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "lr": [float(rate) for rate in self.scheduler.get_last_lr()],
                "frozen_units": self.scheduler.frontier,
                "rows_served": int(spent["rows_served"]),
                "rows_computed": int(spent["rows_computed"]),
                "seconds": spent["train"] + spent["fill"] + spent["validate"],
                "train_seconds": spent["train"],
                "fill_seconds": spent["fill"],
                "validate_seconds": spent["validate"],
                "saved_seconds": spent["seconds_saved"],
                "cache_bytes": 0 if self.cache is None else self.cache.stats.bytes,
                "images_per_second": rows / spent["train"],
            }
        )
        self.epoch, self.position, self._losses = self.epoch + 1, 0, []
        self._epoch_start = now
        self.written.add(self.metrics)
        if best:
            self._best = self._state_of_weights()
        if self.epoch == self.settings.epochs or self._checkpoint_is_due(spent["wall"]):
            self._save()

    def _train(self, bar: RunBar) -> None:
        """Takes the steps that are left of an epoch."""
        self.model.train()
        self.inputs["train"].epoch = self.epoch
        rows, every = len(self.labels["train"]), self.settings.checkpoint_every
        order = full_batches(
            epoch_order(rows, self.settings.seed, self.epoch), self.settings.batch_size
        )[self.position :]
        batches, labels = self.inputs["train"].batches(order), self._labels("train", order)
        for _ in order:
            bar.update(self.step)
            frozen = self.scheduler.frontier
            with self._timing("train"):
                with self._timing("load"):
                    x = next(batches)
                self._losses.append(self._step(x, next(labels)))
                self.scheduler.step()
            self.step += 1
            self.position += 1
            if self.device.type == "cpu":  # elsewhere it would wait for the device
                self._refuse_losses(self._losses[-1:])
            if self.costs is None:
                self._measure(x)
            if frozen != self.scheduler.frontier and self.step < self.total_steps:
                self._after_freeze()
            self._stop_if_asked()
            if every is not None and self.step % every == 0:
                self._save()

    def _step(self, x: Tensor, labels: Tensor) -> Tensor:
        """Takes one optimizer step on a batch; returns its mean loss."""
        return take_step(self.model, self.optimizer, x, labels, self.autocast_dtype)

    def _logits(self, x: Tensor) -> Tensor:
        return logits_of(self.model, x, self.autocast_dtype)

    @torch.no_grad()
    def _validate(self) -> tuple[float, float]:
        """Returns the mean loss and the accuracy on the validation rows."""
        self.model.eval()
        left = rows = len(self.labels["val"])
        losses, correct = [], []
        order = full_batches(np.arange(rows), self.settings.batch_size)
        bar = progress_bar("validating", len(order), "batch", delay=SHOW_AFTER)
        with self._timing("validate"), bar:
            batches = self.inputs["val"].batches(order)
            for x, labels in zip(batches, self._labels("val", order), strict=True):
                self._stop_if_asked()
                # What the last batch was filled up with counts once.
                logits, labels = self._logits(x)[:left], labels[:left]
                losses.append(F.cross_entropy(logits, labels, reduction="sum"))
                correct.append((logits.argmax(1) == labels).sum())
                left -= len(x)
                bar.update()
            loss = float(torch.stack(losses).cpu().double().sum()) / rows
            return loss, int(torch.stack(correct).sum()) / rows

    def _labels(self, split: str, order: Sequence[Indices]) -> Iterator[Tensor]:
        """Returns an iterator over the labels of each batch."""
        # The order travels to the device as a whole: each copy would wait for it.
        rows = torch.from_numpy(all_rows(order)).to(self.device)
        return iter(self.labels[split][rows].split([len(indices) for indices in order]))

    # When units have frozen.

    def _after_freeze(self) -> None:
        """Runs frozen modules uncompiled, opens the cache, and keeps all rows, if that pays."""
        self._measured = 0  # steps before and after are not alike
        for module in list(self._compiled):
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module._compiled_call_impl = None
                self._compiled.remove(module)
        if not self.settings.cache or not self.run.fills_at(
            self.step, self._kept, self._likely_costs
        ):
            return
        self._kept = self.scheduler.frontier
        if self.cache is None:
            cache = ActivationCache(
                self.model,
                directory=self.settings.cache_dir,
                max_bytes=self.settings.cache_bytes,
                codec=self.settings.cache_codec,
            )
            self.cache = self._open.enter_context(cache)
        if not self.step:  # rows are kept as the first epochs pass
            return
        with self._timing("train"):
            synchronize(self.device)
        before, began = self._stats(), time.perf_counter()
        with self._timing("fill"):
            self._fill(self.cache)
            synchronize(self.device)
        # What a fill does is told as such, and is no row of training.
        for name, count in self._stats().items():
            self._counts[name] -= count - before[name]
        rows = len(self.labels["train"])
        unit = self.names[self.scheduler.frontier - 1]
        seconds = time.perf_counter() - began
        self.fills.append({"step": self.step, "unit": unit, "rows": rows, "seconds": seconds})
        say(fill_line(self.fills[-1]))

    def _fill(self, cache: ActivationCache) -> None:
        """Keeps the rows of the training set, in all views that are still to be shown.

        A validation keeps its own rows as they pass.
        """
        self.model.train()
        inputs, passes = self.inputs["train"], self.run.passes(self.step)
        order = full_batches(np.arange(len(self.labels["train"])), self.settings.batch_size)
        bar = progress_bar("keeping rows", passes * len(order), "batch", delay=SHOW_AFTER)

        def batches() -> Iterator[Tensor]:
            for further in range(passes):
                inputs.epoch = self.step // self.steps_per_epoch + further
                for x in inputs.batches(order):
                    self._stop_if_asked()
                    yield x
                    bar.update()

        try:
            with bar:
                cache.fill(batches(), self._logits)
        finally:
            inputs.epoch = self.epoch

    def _stats(self) -> dict[str, float]:
        """Returns what the cache has counted in this process."""
        if self.cache is None:
            return dict.fromkeys(COUNTED, 0)
        stats = self.cache.stats
        return {name: getattr(stats, name) for name in COUNTED}

    # What is left of the time.

    def _measure(self, x: Tensor) -> None:
        """Times the first steps, and then the forward pass, for the forecast."""
        if self.total_steps < LEAST_STEPS or self.run.freeze_steps[0] >= self.total_steps:
            return
        self._measured += 1
        if self._measured not in (WARM_UP, WARM_UP + TIMED):
            return
        with self._timing("train"):
            synchronize(self.device)
        before, self._mark = self._mark, (self.seconds["train"], self.seconds["load"])
        if self._measured > WARM_UP:
            step, load = (
                (now - then) / TIMED for now, then in zip(self._mark, before, strict=True)
            )
            forward, sizes = forward_seconds(self.model, self._units, x, self.autocast_dtype)
            self.costs = Costs.measured(step, load, forward, sizes, self.scheduler.frontier)
            if self.settings.cache:
                say(forecast_line(self.run.forecast(self.costs)))
            self._look_ahead()

    def _look_ahead(self) -> None:
        """Begins to predict the time that is left, from measured costs if there are any."""
        way = "cached" if self.settings.cache else "freezing_only"
        trust = {} if self.costs else {"trust": 0.0}
        spans = self.run.spans(self._likely_costs, way)
        self._eta = Eta(spans, self.step, time.perf_counter(), **trust)

    @property
    def _likely_costs(self) -> Costs:
        return self.costs or Costs.unknown(len(self.names))

    def _progress(self) -> Progress:
        """Returns the progress that the bar shows."""
        last = self.metrics[-1] if self.metrics else {}
        loss, speed = last.get("train_loss"), last.get("images_per_second")
        if self._losses and self.device.type == "cpu":  # elsewhere it would wait for the device
            loss = float(self._losses[-1])
        now, start = self._so_far(), self._epoch_start
        seconds = now["train"] - start["train"]
        if self.position and seconds:
            speed = self.position * self.settings.batch_size / seconds
        served, computed = (now[name] - start[name] for name in COUNTED[:2])
        return Progress(
            epoch=min(self.epoch + 1, self.settings.epochs),
            epochs=self.settings.epochs,
            loss=loss,
            accuracy=last.get("val_accuracy"),
            frozen=self.scheduler.frontier,
            units=len(self.names),
            served=served / (served + computed) if served else None,
            images_per_second=speed,
            seconds_left=self._eta.seconds_left(self.step, time.perf_counter()),
        )

    @contextmanager
    def _timing(self, part: str) -> Iterator[None]:
        """Adds the time inside to a part of the run's time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began

    def _so_far(self) -> dict[str, float]:
        """Returns the seconds of each part and the cache's counts, of all processes of the run."""
        wall = self.seconds["wall"] + time.perf_counter() - self.started
        counts = {name: self._counts[name] + count for name, count in self._stats().items()}
        return {**self.seconds, "wall": wall, **counts}

    # What goes wrong.

    def _stop_if_asked(self) -> None:
        if self.interrupts:
            raise Interrupted

    def _refuse_losses(self, losses: Sequence[Tensor]) -> None:
        """Raises UserError if one of the last losses is not a number, or infinite."""
        if losses and not (finite := torch.stack(list(losses)).isfinite()).all():
            index = int((~finite).nonzero()[0])
            step = self.step - len(losses) + index + 1
            raise self._not_finite("loss", float(losses[index]), step)

    def _refuse_weights(self) -> None:
        """Raises UserError if a weight or a running statistic is not a number, or infinite."""
        for name, tensor in self.model.state_dict().items():
            if not (finite := tensor.isfinite()).all():
                raise self._not_finite(f"weight {name}", float(tensor[~finite][0]), self.step)

    def _not_finite(self, what: str, value: float, step: int) -> UserError:
        schedule, names = self.scheduler.schedule, self.names
        rates = self._rates(step - 1)
        last = self.folder.path / LAST
        kept = f"; {last} was saved before that" if last.exists() else ""
        return UserError(
            f"the {what} is {value} at step {step:,} (epoch {self.epoch + 1}), with "
            f"{schedule.frontier(step - 1)} of {len(names)} units frozen and rates from "
            f"{rates[0]:.3g} ({names[0]}) to {rates[-1]:.3g} ({names[-1]}): try a smaller "
            f"--lr{kept}"
        )

    def _rates(self, step: int) -> list[float]:
        """Returns the rate of every unit at a step, from 0."""
        factor, bases = self.scheduler.schedule.factor, self.scheduler.base_lrs
        return [float(base) * factor(unit, step) for unit, base in enumerate(bases)]

    # What is saved.

    def _checkpoint_is_due(self, epoch_seconds: float) -> bool:
        cost = self._save_seconds
        if not cost:  # weights, momentum, and the best weights
            cost = 3 * sum(one.nbytes for one in self.model.parameters()) / SAVE_RATE
        return is_due(
            since=time.perf_counter() - self._saved,
            epoch=epoch_seconds,
            cost=cost,
            spent=self.seconds["checkpoint"],
            wall=self._so_far()["wall"],
        )

    def _save(self) -> None:
        """Saves a checkpoint. Raises UserError if a loss or weight is infinite or not a number."""
        began = time.perf_counter()
        with self._timing("checkpoint"):
            self._refuse_losses(self._losses)
            self._refuse_weights()
            with self.folder.writing():
                save_checkpoint(self.folder.path, self._state_dict(), self._best)
        self._best = None
        self._saved = time.perf_counter()
        self._save_seconds = self._saved - began

    def _state_of_weights(self) -> dict[str, Any]:
        """Returns a copy of the weights, with what another run needs to start from them."""
        model = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        return {**self._about(), "model": model, "metrics": list(self.metrics)}

    def _about(self) -> dict[str, Any]:
        return {
            "settings": self.settings.as_json(),
            "command": self.command,
            "data": self.data,
            "numerics": self._numerics(),
            "epoch": self.epoch,
            "step": self.step,
        }

    def _state_dict(self) -> dict[str, Any]:
        return {
            **self._about(),
            "position": self.position,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": random_state(self.device),
            "losses": torch.stack(self._losses).cpu() if self._losses else torch.zeros(0),
            "metrics": self.metrics,
            "costs": None if self.costs is None else asdict(self.costs),
            "fills": self.fills,
            "totals": self._so_far(),
            "epoch_start": self._epoch_start,
            "resumed_at": self.resumed_at,
        }

    def _summary(self) -> dict[str, Any]:
        last, now = self.metrics[-1], self._so_far()
        stats = None if self.cache is None else self.cache.stats
        return {
            "schema": SCHEMA,
            "epochs": self.settings.epochs,
            "steps": self.step,
            "val_accuracy": last["val_accuracy"],
            "best_val_accuracy": self.best_val_accuracy,
            "train_loss": last["train_loss"],
            "weights_sha256": weights_sha256(self.model.state_dict()),
            "frozen_units": self.scheduler.frontier,
            "units": self.names,
            "initial_rates": self._rates(0),
            "freeze_steps": list(self.run.freeze_steps),
            "numerics": self._numerics(),
            **{f"{part}_seconds": now[part] for part in (*PARTS, "wall")},
            "cache": {
                "enabled": self.settings.cache,
                "directory": str(self.settings.cache_dir) if self.settings.cache else None,
                "rows_served": int(now["rows_served"]),
                "rows_computed": int(now["rows_computed"]),
                "rows_kept": 0 if stats is None else stats.rows_kept,
                "bytes": 0 if stats is None else stats.bytes,
                "seconds_saved": now["seconds_saved"],
                "messages": [],
                "fills": self.fills,
            },
            "forecast": None if self.costs is None else self.run.forecast(self.costs),
            "resumed_at": self.resumed_at,
        }


def _place_of_pixels(
    settings: Settings, data: DataSet, device: torch.device
) -> torch.device | None:
    """Returns the device whose memory holds decoded pixels, or None if they are decoded again."""
    in_memory = isinstance(data.train, ArrayImages)
    if not settings.cache and not in_memory:
        return None
    size = (len(data.train) + len(data.val)) * prod(data.image_shape)
    if device.type == "cuda" and size <= DEVICE_SHARE * free_device_memory(device):
        return device
    if not in_memory and size <= MEMORY_SHARE * free_memory():
        return torch.device("cpu")
    return None


def _compile(model: nn.Module, units: Sequence[Unit]) -> list[nn.Module]:
    """Compiles, in place, the largest modules within each unit that trains; returns them."""
    # Blocks of one class share it. Beyond it, whichever came last would run uncompiled: others with
    # the cache than without.
    torch._dynamo.config.cache_size_limit = MOST_COMPILED
    unit_of = {id(p): number for number, unit in enumerate(units) for p in unit.parameters}
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        parameters = list(module.parameters())
        trains = any(parameter.requires_grad for parameter in parameters)
        if trains and len({unit_of[id(parameter)] for parameter in parameters}) == 1:
            module.compile()
            found.append(module)
            return
        for child in module.children():
            look(child)

    look(model)
    return found
