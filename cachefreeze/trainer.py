"""The training loop."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachefreeze.cache import PrefixCache
from cachefreeze.checkpoint import save_checkpoint
from cachefreeze.config import Settings
from cachefreeze.data import DataSet, InputRows
from cachefreeze.device import autocast
from cachefreeze.forecast import Filled, Forecast, pays_at_best
from cachefreeze.freezeout import FreezeOutLR, param_groups
from cachefreeze.hashing import weights_sha256
from cachefreeze.models.units import partition
from cachefreeze.planner import Keep, Move, Plan, Run, efficiency
from cachefreeze.profiler import profile
from cachefreeze.report import (
    RunFolder,
    epoch_line,
    materialize_line,
    plan_words,
    progress_bar,
    room_words,
    say,
)
from cachefreeze.rows import Indices, batches_of, epoch_order


class Trainer:
    """Trains a network by FreezeOut on a data set, and leaves the run's files in a folder.

    Args:
        settings: of the run.
        data: the data set.
        model: an `nn.Sequential` of units, initialised; trained in place.
        device: to train on.
        autocast_dtype: for the forward pass, or None.
        folder: of the run, created.
        max_cache_bytes: what the cache folder may take.
        make_cache: what serves the rows, made with the arguments of `PrefixCache`.
    """

    def __init__(
        self,
        settings: Settings,
        data: DataSet,
        model: nn.Sequential,
        device: torch.device,
        autocast_dtype: torch.dtype | None,
        folder: RunFolder,
        max_cache_bytes: float,
        make_cache: Callable[..., PrefixCache] = PrefixCache,
    ) -> None:
        self.settings = settings
        self.data = data
        self.device = device
        self.autocast_dtype = autocast_dtype
        self.folder = folder
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.units = partition(self.model)
        self.labels = {"train": data.train.labels.to(device), "val": data.val.labels.to(device)}
        augment_seed = settings.seed if settings.augment else None
        self.inputs = {
            "train": InputRows(data.train, data.mean, data.std, device, augment_seed),
            "val": InputRows(data.val, data.mean, data.std, device),
        }
        self.cache = make_cache(
            self.units,
            self.inputs,
            batch_size=settings.batch_size,
            device=device,
            autocast_dtype=autocast_dtype,
            directory=settings.cache_dir if settings.cache else None,
            max_bytes=max_cache_bytes,
            stored=settings.stored,
            network=settings.network,
            warn=lambda sentence: say(f"  {sentence}"),
        )
        self.steps_per_epoch = -(-len(data.train) // settings.batch_size)
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.optimizer = torch.optim.SGD(
            param_groups(self.units),
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
            weight_decay=settings.weight_decay,
        )
        self.scheduler = FreezeOutLR(
            self.optimizer,
            self.units,
            self.total_steps,
            t0=settings.t0 if settings.freeze else 1.0,
            shape=settings.schedule,
            scale_lr=settings.scale_lr,
        )
        self.step = 0
        self.best_val_accuracy = 0.0
        self.seconds = {"profile": 0.0, "train": 0.0, "materialize": 0.0, "validate": 0.0}
        self.forecast: Forecast | None = None
        # Of the whole batches since the frontier or the boundary moved.
        self.step_seconds: list[float] = []

    def fit(self) -> dict[str, Any]:
        """Train all epochs; returns what goes into summary.json, but for `wall_seconds`."""
        try:
            if self.settings.cache:
                self._plan()
            with progress_bar("epochs", self.settings.epochs, "epoch", leave=True) as bar:
                for epoch in range(self.settings.epochs):
                    metrics = self._epoch(epoch)
                    self.folder.add_metrics(metrics)
                    self._save(epoch + 1)
                    say(epoch_line(metrics, self.settings.epochs, self.units.names))
                    bar.update()
            return self._summary(metrics)
        finally:
            self.cache.close()

    def _epoch(self, epoch: int) -> dict[str, Any]:
        before = dict(self.seconds)
        train_loss = self._train(epoch)
        val_loss, val_accuracy = self._validate()
        self.best_val_accuracy = max(self.best_val_accuracy, val_accuracy)
        spent = {name: self.seconds[name] - before[name] for name in before}
        del spent["profile"]
        return {
            "epoch": epoch + 1,
            "step": self.step,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "lr": [float(rate) for rate in self.scheduler.get_last_lr()],
            "frozen_units": self.units.frontier,
            "boundary": self.cache.boundary,
            "source": "pixels" if self.cache.boundary == 0 else "cache",
            "seconds": sum(spent.values()),
            "train_seconds": spent["train"],
            "materialize_seconds": spent["materialize"],
            "validate_seconds": spent["validate"],
            "images_per_second": len(self.labels["train"]) / spent["train"],
        }

    def _train(self, epoch: int) -> float:
        """One pass over the training rows; returns the mean loss."""
        self.model.train()
        self.inputs["train"].epoch = epoch
        rows = len(self.labels["train"])
        order = batches_of(epoch_order(rows, self.settings.seed, epoch), self.settings.batch_size)
        batches = self.cache.batches("train", order)
        # Kept on the device and read once: `.item()` in every step would wait for it.
        losses = []
        with progress_bar(f"epoch {epoch + 1}", rows, "img") as bar:
            for indices in order:
                mark = time.perf_counter()
                with self._timed("train"):
                    losses.append(self._step(next(batches), indices))
                    frontier = self.units.frontier
                    self.scheduler.step()
                    self.step += 1
                if len(indices) == self.settings.batch_size:
                    self.step_seconds.append(time.perf_counter() - mark)
                if self.units.frontier > frontier:
                    self._freeze(frontier)
                bar.update(len(indices))
        with self._timed("train"):
            weights = torch.tensor([len(indices) for indices in order])
            return float(torch.stack(losses).cpu().double() @ weights.double()) / rows

    def _step(self, x: Tensor, indices: Indices) -> Tensor:
        """One optimiser step on a batch at the frontier; returns its mean loss."""
        loss = F.cross_entropy(self._suffix(x), self._labels("train", indices))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def _validate(self) -> tuple[float, float]:
        """Mean loss and accuracy over the validation rows."""
        self.model.eval()
        rows = len(self.labels["val"])
        losses, correct = [], []
        order = batches_of(np.arange(rows), self.settings.batch_size)
        with self._timed("validate"):
            for indices, x in zip(order, self.cache.batches("val", order), strict=True):
                logits, labels = self._suffix(x), self._labels("val", indices)
                losses.append(F.cross_entropy(logits, labels, reduction="sum"))
                correct.append((logits.argmax(1) == labels).sum())
            loss = float(torch.stack(losses).cpu().double().sum()) / rows
            return loss, int(torch.stack(correct).sum()) / rows

    def _suffix(self, x: Tensor) -> Tensor:
        """Logits in float32 from a batch at the frontier."""
        with autocast(self.device, self.autocast_dtype):
            return self.units.run(x, self.units.frontier).float()

    def _labels(self, split: str, indices: Indices) -> Tensor:
        return self.labels[split][torch.from_numpy(indices).to(self.device)]

    def _plan(self) -> None:
        """Measure, and plan the run; what is to be kept from the start is made now."""
        run = Run(
            self.scheduler.schedule.freeze_steps,
            self.total_steps,
            len(self.labels["train"]),
            len(self.labels["val"]),
            self.settings.batch_size,
        )
        decoding = self.data.decode_seconds > 0
        if self.settings.cache_policy == "planned" and not pays_at_best(run, decoding):
            say("plan      nothing is kept: units freeze too late in the run for a store to pay")
            return
        assert self.cache.directory is not None
        pixels = self.data.train.sample(self.settings.batch_size).permute(0, 3, 1, 2)
        with self._timed("profile"):
            measured = profile(
                self.model,
                self.inputs["train"],
                pixels,
                batch_size=self.settings.batch_size,
                row_passes=self.settings.epochs * run.train_rows,
                device=self.device,
                autocast_dtype=self.autocast_dtype,
                decode_seconds=self.data.decode_seconds,
                directory=self.cache.directory,
                max_bytes=self.cache.max_bytes,
                stored=self.settings.stored,
                codec=self.settings.codec,
            )
            self.forecast = Forecast(
                measured,
                run,
                self.cache.rows,
                self.cache.max_bytes,
                codec=self.settings.codec,
                policy=self.settings.cache_policy,
                found={0} if decoding and self.cache.has(0) else frozenset(),
            )
        self.folder.write_json("profile.json", measured.as_json())
        plan, why = self.forecast.first, self.forecast.why_nothing
        for line in plan_words(plan, run, self.units.names, measured.seconds, why):
            say(line)
        if (roomy := self.forecast.with_more_room) is not None:
            say(room_words(roomy, self.cache.max_bytes))
        self._carry_out(plan)

    def _freeze(self, frontier: int) -> None:
        """After the frontier has moved on from `frontier`: plan the rest anew, and begin it."""
        if self.forecast is None:
            return
        with self._timed("materialize"):
            self.forecast.observe_steps(self.step_seconds, frontier, self._source())
            reading = self.cache.seconds_per_byte_read
            if reading is not None and self.cache.boundary:  # pixels take more than reading
                self.forecast.observe_reading(reading)
            now = self.units.frontier
            found = {now} if self.cache.has(now) else frozenset()
            plan = self.forecast.revise(self.step, self._source(), found)
        self._carry_out(plan)
        self.step_seconds = []

    def _source(self) -> Keep | None:
        """Where rows come from now, as the planner names it; None is the network's input."""
        if self.cache.store is None or self.forecast is None:
            return None
        return self.forecast.keep(self.cache.boundary, self.cache.store.description.codec)

    def _carry_out(self, plan: Plan) -> None:
        """What the plan asks for at this step."""
        assert self.forecast is not None
        for event in plan.events:
            if event.step > self.step:
                break
            self._settle(dropped=not isinstance(event, Move))
            if not isinstance(event, Move):
                self.cache.leave()
            elif not self._materialize(event):
                break  # what comes after it was to be made of it

    def _materialize(self, move: Move) -> bool:
        assert self.forecast is not None
        source, before = self._source(), self.cache.prefix_seconds_per_row
        with self._timed("materialize"):
            done = self.cache.materialize(move.keep.boundary, move.keep.codec)
        if done is None:
            return False
        self.forecast.observe_filling(source, move.keep, done)
        spared = self.cache.prefix_seconds_per_row - before
        unit = self.units.names[done.boundary - 1] if done.boundary else "pixels"
        filled = Filled(self.step, unit, move, done, spared)
        self.forecast.add(filled)
        say(materialize_line(filled.as_json()))
        return True

    def _settle(self, *, dropped: bool) -> None:
        assert self.forecast is not None
        gone = dropped or self.cache.store is None
        self.forecast.settle(self.cache.rows_served, self.cache.read_seconds, dropped=gone)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start

    def _save(self, epoch: int) -> None:
        state = {
            "epoch": epoch,
            "step": self.step,
            "settings": self.settings.as_json(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        with self.folder.writing():
            save_checkpoint(self.folder.path / "last.pt", state)

    def _summary(self, last: dict[str, Any]) -> dict[str, Any]:
        forecast = self.forecast
        if forecast is not None:
            self._settle(dropped=True)
        return {
            **{f"{part}_seconds": seconds for part, seconds in self.seconds.items()},
            "epochs": self.settings.epochs,
            "steps": self.step,
            "val_accuracy": last["val_accuracy"],
            "best_val_accuracy": self.best_val_accuracy,
            "train_loss": last["train_loss"],
            "weights_sha256": weights_sha256(self.model.state_dict()),
            "frozen_units": self.units.frontier,
            "units": list(self.units.names),
            "cache": {
                "enabled": self.settings.cache,
                "boundaries": [filled.as_json() for filled in forecast.filled] if forecast else [],
                "rows_served": self.cache.rows_served,
                "prefix_unit_rows_computed": self.cache.prefix_unit_rows_computed,
                "saved_seconds": self.cache.saved_seconds,
                "read_seconds": self.cache.read_seconds,
                "compute_seconds": self.cache.compute_seconds,
                "store": None if self.cache.store is None else str(self.cache.store.folder),
            },
            "plan": None if forecast is None else self._predicted_and_actual(forecast),
        }

    def _predicted_and_actual(self, forecast: Forecast) -> dict[str, Any]:
        """The plan made at the start beside what happened: seconds of training, validation and
        materialising."""
        plan, spent = forecast.first, self.seconds
        seconds = spent["train"] + spent["validate"] + spent["materialize"]
        freezing_only = seconds + self.cache.saved_seconds
        # A free cache would spare all of this, but for normalising what nothing is frozen before.
        wasted = spent["materialize"] + self.cache.read_seconds + self.cache.compute_seconds
        limit = seconds - wasted + self.cache.unfrozen_rows * forecast.profile.normalize
        return {
            "profile_seconds": spent["profile"],
            "predicted": {
                "seconds": plan.seconds,
                "freezing_only": plan.freezing_only,
                "no_freezing": plan.no_freezing,
                "limit": plan.limit,
                "efficiency": plan.efficiency,
                "materializations": len(plan.moves),
            },
            "actual": {
                "seconds": seconds,
                "freezing_only": freezing_only,
                "limit": limit,
                "efficiency": efficiency(freezing_only, seconds + spent["profile"], limit),
                "materializations": len(forecast.filled),
            },
        }
