"""The training loop."""

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cachefreeze.cache import ActivationCache
from cachefreeze.data import ArrayImages, DataSet, InputRows, epoch_order, full_batches, labels_of
from cachefreeze.errors import Interrupted, UserError, first_line
from cachefreeze.freezeout import Unit
from cachefreeze.keys.environment import numerics
from cachefreeze.plan.forecast import Run
from cachefreeze.report.metrics import Metrics
from cachefreeze.report.summary_text import epoch_line, fill_line, reduced_line
from cachefreeze.training.checkpoint import LAST, save_checkpoint
from cachefreeze.training.compiling import compile_units, leave_frozen_uncompiled
from cachefreeze.training.device import synchronize
from cachefreeze.training.finite import FiniteChecks
from cachefreeze.training.interrupts import Interrupts
from cachefreeze.training.pixels import place_of_pixels
from cachefreeze.training.progress import Progress, RunBar
from cachefreeze.training.randomness import random_state, set_random_state
from cachefreeze.training.ranks import Ranks, gradient_bytes, wrapped
from cachefreeze.training.resume import check_same_run
from cachefreeze.training.run_folder import RunFolder
from cachefreeze.training.run_state import COUNTED, RunState, SaveTimes, in_metrics
from cachefreeze.training.settings import Settings
from cachefreeze.training.step import logits_of, prepare, take_step
from cachefreeze.training.summary import summary_of
from cachefreeze.training.terminal import SHOW_AFTER, progress_bar, say, warn
from cachefreeze.training.time_left import TimeLeft
from cachefreeze.training.validation import results_of_batches


class Trainer:
    """Trains a network with FreezeOut on a data set, and leaves the run's files in a folder.

    Args:
        settings: Settings of the run.
        data: Data set to train on.
        model: Initialised network. It is trained in place.
        device: Device to train on.
        autocast_dtype: Type for autocast, or None.
        folder: Folder of the run.
        ranks: Processes that train the run together.
        command: Words of the command line that are settings of the run. They are saved for
            `--resume`.

    Attributes:
        state: Progress of the run.
        written: Files of its metrics in the run's folder.
    """

    def __init__(
        self,
        settings: Settings,
        data: DataSet,
        model: nn.Module,
        device: torch.device,
        autocast_dtype: torch.dtype | None,
        folder: RunFolder,
        ranks: Ranks,
        command: Sequence[str] = (),
    ) -> None:
        self.settings = settings
        self.ranks = ranks
        self.command = list(command)
        self.interrupts = Interrupts()
        self.device = device
        self.autocast_dtype = autocast_dtype
        self.folder = folder
        self.data = data.facts
        self.model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        example = torch.zeros(2, *data.image_shape, device=device)
        self.labels = {"train": data.train.labels.to(device), "val": data.val.labels.to(device)}
        kept_on = place_of_pixels(data, device, cached=settings.cache)
        views = settings.views
        self.inputs = {
            split: InputRows(
                images, data.mean, data.std, device, seed, views=views, kept_on=kept_on
            )
            for split, images, seed in (
                ("train", data.train, settings.seed if settings.augment else None),
                ("val", data.val, None),
            )
        }
        self.steps_per_epoch = len(full_batches(np.arange(len(data.train)), settings.batch_size))
        self.total_steps = settings.epochs * self.steps_per_epoch
        self._batch_rows = min(settings.batch_size, len(data.train))
        self.optimizer, self.scheduler = prepare(settings, self.model, example, self.total_steps)
        self.names = list(self.scheduler.names)
        groups = self.optimizer.param_groups
        self._units = [Unit(group["name"], tuple(group["params"])) for group in groups]
        self._compiled = compile_units(self.model, self._units) if settings.compile else []
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
        self.state = RunState(ranks.count)
        self.written = Metrics(folder, self.names, tensorboard=settings.tensorboard)
        self._best: dict[str, Any] | None = None
        self._saves = SaveTimes()
        self._wrapped: nn.Module | None = None
        counts = partial(self._stats, here=True)
        self._time_left = TimeLeft(
            self.run, self.state, self._units, ranks, counts, cached=settings.cache
        )
        self._finite = FiniteChecks(self.state, self.scheduler, folder.path / LAST)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on with a run that was cut off.

        Args:
            state: Contents of its checkpoint.

        Raises:
            UserError: The data or the device are others than before, or the state does not fit.
        """
        last = self.folder.path / LAST
        try:
            now = (self.settings, self.data, self._numerics(), self.ranks.count)
            check_same_run(state, *now, last, warn)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])  # freezes what was frozen
            self.state.restore(state, self.steps_per_epoch, len(self.names), self.device)
            if self.state.step != self.scheduler.last_epoch:
                raise ValueError("its parts are of different moments")
            set_random_state(state["random"], self.device)
            if self.ranks.first:
                self.written.rewrite(self.state.metrics)
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
        epoch = min(self.state.epoch + 1, self.settings.epochs)
        return f"step {self.state.step:,} of {self.total_steps:,} (epoch {epoch})"

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
                self._time_left.look_ahead()
                if self.scheduler.frontier and self.state.step < self.total_steps:
                    self._after_freeze()
                else:
                    self._wrap()
                with RunBar(self.total_steps, self._progress) as bar:
                    while self.state.epoch < self.settings.epochs:
                        self._epoch(bar)
                        say(epoch_line(self.state.metrics[-1], self.settings.epochs, self.names))
                summary = self._summary()
            except Interrupted:
                self._save()
                # Another process may have been asked.
                received = self.interrupts.received or signal.SIGTERM
                where = self.folder.path / LAST
                raise Interrupted(
                    f"interrupted at {self.place}: saved in {where}", 128 + received
                ) from None
        if self.cache is not None:  # closed by now: it may have said more
            told = self.ranks.gather(list(self.cache.messages))
            summary["cache"]["messages"] = list(dict.fromkeys(chain(*told)))
        summary["wall_seconds"] = self._so_far()["wall"]
        return summary

    def _epoch(self, bar: RunBar) -> None:
        """Runs what is left of an epoch: steps, validation, a line of metrics, a checkpoint."""
        self._train(bar)
        with self.state.timing("train"):
            train_loss = float(torch.stack(self.state.losses).cpu().double().mean())
        self._finite.losses(self.state.losses)
        val_loss, val_accuracy = self._validate()
        self._finite.validation(val_loss)
        now = self._so_far()
        spent = {name: now[name] - self.state.epoch_start[name] for name in now}
        best = not self.state.metrics or val_accuracy > self.state.best_val_accuracy
        rows = self.steps_per_epoch * self._batch_rows
        self.state.metrics.append(
            {
                "epoch": self.state.epoch + 1,
                "step": self.state.step,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "lr": [float(rate) for rate in self.scheduler.get_last_lr()],
                "frozen_units": self.scheduler.frontier,
                **in_metrics(spent),
                "cache_bytes": 0 if self.cache is None else self.cache.stats.bytes,
                "images_per_second": rows / spent["train"],
            }
        )
        self.state.epoch, self.state.position, self.state.losses = self.state.epoch + 1, 0, []
        self.state.epoch_start = now
        if self.ranks.first:
            self.written.add(self.state.metrics)
        if best:
            self._best = self._state_of_weights()
        due = self._saves.is_due(spent["wall"], self.state, self.model) and self.ranks.first
        if self.ranks.any(due) or self.state.epoch == self.settings.epochs:
            self._save()

    def _train(self, bar: RunBar) -> None:
        """Takes the steps that are left of an epoch."""
        self.model.train()
        self.inputs["train"].epoch = self.state.epoch
        rows, every = len(self.labels["train"]), self.settings.checkpoint_every
        whole = epoch_order(rows, self.settings.seed, self.state.epoch)
        order = self.ranks.parts(full_batches(whole, self.settings.batch_size))
        order = order[self.state.position :]
        batches = self.inputs["train"].batches(order)
        labels = labels_of(self.labels["train"], order)
        for _ in order:
            bar.update(self.state.step)
            frozen = self.scheduler.frontier
            with self.state.timing("train"):
                with self.state.timing("load"):
                    x = next(batches)
                self.state.losses.append(self._step(x, next(labels)))
                self.scheduler.step()
            self.state.step += 1
            self.state.position += 1
            if self.device.type == "cpu":  # elsewhere it would wait for the device
                self._finite.losses(self.state.losses[-1:])
            self._time_left.note_step(self.model, x, self.autocast_dtype, self.scheduler.frontier)
            if frozen != self.scheduler.frontier and self.state.step < self.total_steps:
                self._after_freeze()
            self._stop_if_asked()
            if every is not None and self.state.step % every == 0:
                self._save()

    def _step(self, x: Tensor, labels: Tensor) -> Tensor:
        """Takes a step on this process's part of a batch; returns the mean loss of the batch."""
        assert self._wrapped is not None
        self.ranks.seed(self.settings.seed, self.state.step)
        # Means over parts of unequal size are not the mean over the batch.
        weight = len(x) * self.ranks.count / self._batch_rows
        loss = take_step(self._wrapped, self.optimizer, x, labels, self.autocast_dtype, weight)
        return self.ranks.mean(loss)

    def _logits(self, x: Tensor) -> Tensor:
        return logits_of(self.model, x, self.autocast_dtype)

    @torch.no_grad()
    def _validate(self) -> tuple[float, float]:
        """Returns the mean loss and the accuracy on the validation rows."""
        self.model.eval()
        with self.state.timing("validate"):
            self.ranks.send_buffers(self.model)
            rows, size = self.labels["val"], self.settings.batch_size
            how = (size, self.ranks, self.interrupts)
            found = results_of_batches(self._logits, self.inputs["val"], rows, *how)
            self._stop_if_asked()
            loss, correct = self.ranks.total(found).sum(0).tolist()
            return loss / len(rows), int(correct) / len(rows)

    # When units have frozen.

    def _wrap(self) -> None:
        """Wraps the network anew, so that processes exchange gradients of what still trains."""
        self._wrapped = None  # the old one goes first
        self._wrapped = wrapped(self.model, self.ranks)
        if self.ranks.count > 1:
            say(reduced_line(self.state.step, gradient_bytes(self.model)))

    def _after_freeze(self) -> None:
        """Runs frozen modules uncompiled, opens the cache, and keeps all rows, if that pays."""
        self._time_left.begin_again()
        leave_frozen_uncompiled(self._compiled)
        self._wrap()
        if not self.settings.cache or not self.run.fills_at(
            self.state.step, self._kept, self._time_left.costs
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
            self.cache.waits_for_fill = True
        if not self.state.step:  # rows are kept as the first epochs pass
            return
        with self.state.timing("train"):
            synchronize(self.device)
        before, began = self._stats(), time.perf_counter()
        with self.state.timing("fill"):
            self._fill(self.cache)
            synchronize(self.device)
            self._stop_if_asked()
        # What a fill does is told as such, and is no row of training.
        for name, count in self._stats().items():
            self.state.counts[name] -= count - before[name]
        rows = len(self.labels["train"])
        unit = self.names[self.scheduler.frontier - 1]
        seconds = time.perf_counter() - began
        self.state.fills.append(
            {"step": self.state.step, "unit": unit, "rows": rows, "seconds": seconds}
        )
        say(fill_line(self.state.fills[-1]))

    def _fill(self, cache: ActivationCache) -> None:
        """Keeps the training rows in all views to come. A validation keeps its own as they pass."""
        self.model.train()
        inputs, passes = self.inputs["train"], self.run.passes(self.state.step)
        whole = full_batches(np.arange(len(self.labels["train"])), self.settings.batch_size)
        order = self.ranks.parts(whole)
        bar = progress_bar("keeping rows", passes * len(order), "batch", delay=SHOW_AFTER)

        def batches() -> Iterator[Tensor]:
            for further in range(passes):
                inputs.epoch = self.state.step // self.steps_per_epoch + further
                for x in inputs.batches(order):
                    if self.interrupts:
                        return
                    yield x
                    bar.update()

        with bar:
            cache.fill(batches(), self._logits)
        inputs.epoch = self.state.epoch

    def _stats(self, here: bool = False) -> dict[str, float]:
        """Returns what all caches have counted, or an estimate from the cache of this process."""
        if self.cache is None:
            return dict.fromkeys(COUNTED, 0)
        stats, count = self.cache.stats, self.ranks.count
        served, computed, seconds = (getattr(stats, name) for name in COUNTED)
        counted = torch.tensor([served, computed, seconds / count], dtype=torch.float64)
        found = counted * count if here else self.ranks.total(counted)
        return dict(zip(COUNTED, found.tolist(), strict=True))

    # What is shown.

    def _progress(self) -> Progress:
        """Returns the progress that the bar shows."""
        last = self.state.metrics[-1] if self.state.metrics else {}
        loss, speed = last.get("train_loss"), last.get("images_per_second")
        if (
            self.state.losses and self.device.type == "cpu"
        ):  # elsewhere it would wait for the device
            loss = float(self.state.losses[-1])
        now, start = self.state.so_far(self._stats(here=True)), self.state.epoch_start
        seconds = now["train"] - start["train"]
        if self.state.position and seconds:
            speed = self.state.position * self.settings.batch_size / seconds
        served, computed = (now[name] - start[name] for name in COUNTED[:2])
        return Progress(
            epoch=min(self.state.epoch + 1, self.settings.epochs),
            epochs=self.settings.epochs,
            loss=loss,
            accuracy=last.get("val_accuracy"),
            frozen=self.scheduler.frontier,
            units=len(self.names),
            served=min(served / (served + computed), 1.0) if served > 0 else None,
            images_per_second=speed,
            seconds_left=self._time_left.seconds_left(),
        )

    def _so_far(self) -> dict[str, float]:
        """Returns the seconds of each part and the cache's counts, of all processes of the run."""
        return self.state.so_far(self._stats())

    def _stop_if_asked(self) -> None:
        """Stops if any process was asked to. All of them stop at the same place."""
        if self.ranks.any(bool(self.interrupts)):
            raise Interrupted

    # What is saved.

    def _save(self) -> None:
        """Saves a checkpoint. Raises UserError if a loss or weight is infinite or not a number."""
        began = time.perf_counter()
        with self.state.timing("checkpoint"):
            self._finite.losses(self.state.losses)
            self._finite.weights(self.model)
            state = self._state_dict()
            if self.ranks.first:
                with self.folder.writing():
                    save_checkpoint(self.folder.path, state, self._best)
        self._best = None
        self._saves.note(time.perf_counter() - began)

    def _state_of_weights(self) -> dict[str, Any]:
        """Returns a copy of the weights, with what another run needs to start from them."""
        model = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        return {**self._about(), "model": model, "metrics": list(self.state.metrics)}

    def _about(self) -> dict[str, Any]:
        return {
            "settings": self.settings.as_json(),
            "command": self.command,
            "data": self.data,
            "numerics": self._numerics(),
            "epoch": self.state.epoch,
            "step": self.state.step,
        }

    def _state_dict(self) -> dict[str, Any]:
        return {
            **self._about(),
            **self.state.as_dict(self._so_far()),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": random_state(self.device),
        }

    def _summary(self) -> dict[str, Any]:
        how = (self.settings, self.run, self.state, self._so_far())
        summary = summary_of(*how, self.scheduler, self.model, self.cache)
        return {**summary, "numerics": self._numerics()}
