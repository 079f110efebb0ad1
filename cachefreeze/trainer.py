"""The training loop."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cachefreeze.checkpoint import LAST, save_checkpoint
from cachefreeze.config import Settings
from cachefreeze.data import DataSet, InputRows
from cachefreeze.device import autocast, free_device_memory, numerics
from cachefreeze.errors import Interrupted, UserError
from cachefreeze.freezeout import FreezeOutLR, param_groups
from cachefreeze.hashing import weights_sha256
from cachefreeze.interrupts import Interrupts
from cachefreeze.metrics import Metrics
from cachefreeze.models import Units
from cachefreeze.outlook import Outlook, stretches_by_units
from cachefreeze.planner import Run
from cachefreeze.planning import NO_PLANNING, Planning
from cachefreeze.prefix_cache import PrefixCache
from cachefreeze.progress import RunBar, Standing
from cachefreeze.randomness import random_state, set_random_state
from cachefreeze.report import epoch_line
from cachefreeze.resume import check_same_run
from cachefreeze.rows import Indices, all_rows, batches_of, epoch_order
from cachefreeze.run_folder import RunFolder
from cachefreeze.store import is_committed
from cachefreeze.terminal import progress_bar, say, warn
from cachefreeze.timing import timed
from cachefreeze.totals import added, numbers_of, totals_of

# Of the device's free memory: what the decoded pixels of a data set may take.
PIXELS_SHARE = 0.2
# A validation that takes so many seconds has a bar of its own: that of the run stands still.
SHOW_VALIDATION_AFTER = 2.0
# What the cache counts: added up over the processes of a run that was cut off.
COUNTED = (
    "rows_served",
    "rows_verified",
    "prefix_unit_rows_computed",
    "saved_seconds",
    "read_seconds",
    "compute_seconds",
)


class Trainer:
    """Trains a network by FreezeOut on a data set, and leaves the run's files in a folder.

    Args:
        settings: of the run.
        data: the data set.
        units: of the network, initialised; trained in place.
        device: to train on.
        autocast_dtype: for the forward pass, or None.
        folder: of the run, created.
        max_cache_bytes: what the cache folder may take.
        make_cache: what serves the rows, made with the arguments of `PrefixCache`.
        command: the words that the settings were given by, for whoever resumes the run.

    Attributes:
        epoch, position, step: whole epochs, batches of the present one, and steps in all, so far.
        metrics: a line for each whole epoch.
        written: the same in the run's folder.
        started: when the clock of this process began; whoever did something for the run before may
            set it back.
    """

    def __init__(
        self,
        settings: Settings,
        data: DataSet,
        units: Units,
        device: torch.device,
        autocast_dtype: torch.dtype | None,
        folder: RunFolder,
        max_cache_bytes: float,
        make_cache: Callable[..., PrefixCache] = PrefixCache,
        command: Sequence[str] = (),
    ) -> None:
        self.settings = settings
        self.command = list(command)
        self.interrupts = Interrupts()
        self.device = device
        self.autocast_dtype = autocast_dtype
        self.folder = folder
        self.units = units
        self.model = units.model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if settings.freeze_first is not None:
            self.units.freeze(settings.freeze_first)
        self.labels = {"train": data.train.labels.to(device), "val": data.val.labels.to(device)}
        augment_seed = settings.seed if settings.augment else None
        resident = device.type == "cuda" and (len(data.train) + len(data.val)) * prod(
            data.image_shape
        ) <= PIXELS_SHARE * free_device_memory(device)
        self.inputs = {
            "train": InputRows(
                data.train, data.mean, data.std, device, augment_seed, resident=resident
            ),
            "val": InputRows(data.val, data.mean, data.std, device, resident=resident),
        }
        if settings.compile:
            self.units.compile()
        self.cache = make_cache(
            self.units,
            self.inputs,
            batch_size=settings.batch_size,
            device=device,
            autocast_dtype=autocast_dtype,
            directory=settings.cache_dir if settings.cache else None,
            max_bytes=max_cache_bytes,
            stored=settings.stored,
            keep=settings.keep_cache or None,
            tier=settings.cache_tier,
            device_bytes=settings.device_cache_bytes,
            network=settings.network,
            details={"input": "x".join(map(str, data.image_shape))},
            warn=warn,
            stopping=lambda: bool(self.interrupts),
        )
        self.steps_per_epoch = -(-len(data.train) // settings.batch_size)
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.optimizer = torch.optim.SGD(
            param_groups(self.units),
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
            weight_decay=settings.weight_decay,
            # One pass over the parameters instead of four, in half the time. (It rounds in other
            # places: last bits are not those of a step that is not fused.)
            fused=device.type in ("cpu", "cuda"),
        )
        self.scheduler = FreezeOutLR(
            self.optimizer,
            self.units,
            self.total_steps,
            t0=settings.t0 if settings.freeze else 1.0,
            shape=settings.schedule,
            scale_lr=settings.scale_lr,
        )
        self.data = data.facts
        self.epoch = self.position = self.step = 0
        self.metrics: list[dict[str, Any]] = []
        self.written = Metrics(folder, units.names, tensorboard=settings.tensorboard)
        # Of the steps of this epoch. Kept on the device: `.item()` in every step would wait for it.
        self._losses: list[Tensor] = []
        self.seconds = {"train": 0.0, "validate": 0.0}
        # What this run had come to when it was cut off, in this and in earlier processes.
        self._earlier: dict[str, Any] = {"seconds": {}, "cache": {}, "events": [], "resumed": []}
        self.started = time.perf_counter()
        self.run = Run(
            self.scheduler.schedule.freeze_steps,
            self.total_steps,
            len(data.train),
            len(data.val),
            settings.batch_size,
        )
        self.planning = None
        if settings.cache:
            self.planning = Planning(
                self.cache,
                self.optimizer,
                self.inputs["train"],
                self.run,
                # Pixels that stay on the device are decoded once, kept or not.
                decode_seconds=0.0 if resident else data.decode_seconds,
                policy=settings.cache_policy,
                codec=settings.codec,
                tell=say,
                record=lambda profile: self.folder.write_json("profile.json", profile),
                checkpoint=self._save,
            )
        self._epoch_start = self._so_far()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take the place of a run that was cut off where `state` was saved.

        Raises:
            UserError: the data or the device are not what they were, or the state does not fit.
        """
        try:
            check_same_run(
                state, self.settings, self.data, self._numerics(), self.folder.path / LAST, warn
            )
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
            self._earlier = totals_of(state["totals"], self._totals())
            self._earlier["resumed"].append(self.step)
            # An older checkpoint does not say what was counted: that begins here.
            start = {**self._counted(), **state["epoch_start"]}
            self._epoch_start = numbers_of(start, self._so_far())
            if self.planning is not None:
                self.planning.load_state_dict(self.step, state["planning"])
            set_random_state(state["random"], self.device)
            self.written.rewrite(self.metrics)
        except UserError:
            raise
        except Exception as error:  # whatever content of a file may lead to
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(
                f"{self.folder.path / LAST} does not fit this run ({reason}): start a new one"
            ) from error

    def _numerics(self) -> dict[str, str]:
        """What decides the last bits besides the settings."""
        own = {"precision": "bf16" if self.autocast_dtype else "fp32"}
        return own | {name: str(value) for name, value in numerics(self.device).items()}

    @property
    def place(self) -> str:
        """How far it has come, for people."""
        epoch = min(self.epoch + 1, self.settings.epochs)
        return f"step {self.step:,} of {self.total_steps:,} (epoch {epoch})"

    def fit(self) -> dict[str, Any]:
        """Train all epochs that are left; returns what goes into summary.json.

        Raises:
            Interrupted: the user or the system asked to stop; the state was saved.
            UserError: the loss is no number any more, or the run's folder cannot be written.
        """
        with self.interrupts:
            try:
                if self.planning is not None and self.step < self.total_steps:
                    self.planning.start()
                self._outlook = self._outlook_by_units()
                epochs = self.settings.epochs
                with RunBar(self.total_steps, self._standing) as bar:
                    while self.epoch < epochs:
                        self._epoch(bar)
                        say(epoch_line(self.metrics[-1], epochs, self.units.names))
                self._finish()
                return self._summary()
            except Interrupted:
                self._save()
                received = self.interrupts.received
                assert received is not None
                where = self.folder.path / LAST
                raise Interrupted(
                    f"interrupted at {self.place}: saved in {where}", 128 + received
                ) from None
            finally:
                if self.planning is not None:
                    self.planning.stop()
                self.cache.close(wait=not isinstance(sys.exception(), KeyboardInterrupt))
                self.written.close()

    def _finish(self) -> None:
        """See to it that all times are known, and all that is kept for later runs is on disk."""
        if self.planning is None:
            self.cache.finish()
        else:
            with timed(self.planning.seconds, "materialize"):
                self.cache.finish()

    def _epoch(self, bar: RunBar) -> None:
        """What is left of an epoch: steps, validation, a line of metrics, a checkpoint."""
        self._train(bar)
        rows = len(self.labels["train"])
        with timed(self.seconds, "train"):
            weights = torch.full((len(self._losses),), float(self.settings.batch_size)).double()
            weights[-1] = rows - weights[:-1].sum()
            train_loss = float(torch.stack(self._losses).cpu().double() @ weights) / rows
        # Before validation, whose seconds are not told apart.
        self.cache.settle()
        counted = {n: c - self._epoch_start[n] for n, c in self._counted().items()}
        self._refuse_losses(self._losses)
        val_loss, val_accuracy = self._validate()
        if not np.isfinite(val_loss):
            raise self._not_finite("validation loss", val_loss, self.step)
        if self.settings.verify_cache:
            self._verify_cache()
        spent = {name: s - self._epoch_start[name] for name, s in self._spent().items()}
        best = not self.metrics or val_accuracy > self.best_val_accuracy
        self.metrics.append(
            {
                "epoch": self.epoch + 1,
                "step": self.step,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "lr": [float(rate) for rate in self.scheduler.get_last_lr()],
                "frozen_units": self.units.frontier,
                "boundary": self.cache.boundary,
                "source": "pixels" if self.cache.boundary == 0 else "cache",
                "seconds": spent["train"] + spent["materialize"] + spent["validate"],
                "train_seconds": spent["train"],
                "materialize_seconds": spent["materialize"],
                "validate_seconds": spent["validate"],
                "prefix_seconds": counted["compute_seconds"],
                "read_seconds": counted["read_seconds"],
                "store_bytes": 0 if self.cache.store is None else self.cache.store.bytes,
                "images_per_second": rows / spent["train"],
            }
        )
        self.epoch, self.position, self._losses = self.epoch + 1, 0, []
        self.cache.settle()
        self._epoch_start = self._so_far()
        self.written.add(self.metrics)
        self._save(best=best)

    @property
    def best_val_accuracy(self) -> float:
        """Of the epochs so far."""
        return max(line["val_accuracy"] for line in self.metrics)

    def _train(self, bar: RunBar) -> None:
        """The steps that are left of an epoch."""
        self.model.train()
        self.inputs["train"].epoch = self.epoch
        rows, batch_size = len(self.labels["train"]), self.settings.batch_size
        order = batches_of(epoch_order(rows, self.settings.seed, self.epoch), batch_size)
        order = order[self.position :]
        batches = self.cache.batches("train", order)
        labels = self._labels("train", order)
        every = self.settings.checkpoint_every
        for indices in order:
            bar.update(self.step)
            mark = time.perf_counter()
            if self.planning is not None:
                self.planning.before_step()
            self._losses.append(self._step(next(batches), next(labels)))
            self.scheduler.step()
            self.step += 1
            self.position += 1
            if self.planning is not None:
                self.planning.after_step(len(indices))
            self.seconds["train"] += time.perf_counter() - mark
            if self.device.type == "cpu":  # elsewhere it would wait for the device
                self._refuse_losses(self._losses[-1:])
            if self.planning is not None:
                self.planning.decide()
            self._stop_if_asked()
            if every is not None and self.step % every == 0:
                self._save()

    def _standing(self) -> Standing:
        """For the bar."""
        last = self.metrics[-1] if self.metrics else {}
        loss, speed = last.get("train_loss"), last.get("images_per_second")
        if self._losses and self.device.type == "cpu":  # elsewhere it would wait for the device
            loss = float(self._losses[-1])
        rows = min(self.position * self.settings.batch_size, len(self.labels["train"]))
        seconds = self._spent()["train"] - self._epoch_start["train"]
        if rows and seconds:
            speed = rows / seconds
        return Standing(
            epoch=min(self.epoch + 1, self.settings.epochs),
            epochs=self.settings.epochs,
            loss=loss,
            accuracy=last.get("val_accuracy"),
            frozen=self.units.frontier,
            units=len(self.units),
            source="" if self.cache.store is None else self.cache.unit,
            images_per_second=speed,
            seconds_left=self._seconds_left(),
        )

    def _seconds_left(self) -> float | None:
        """By the plan; where there is none, by how many units are left to train."""
        planned = None if self.planning is None else self.planning.outlook
        outlook = planned or self._outlook
        return outlook.seconds_left(self.step, time.perf_counter())

    def _outlook_by_units(self) -> Outlook:
        units, boundary = len(self.units), self.cache.boundary
        left = stretches_by_units(self.run, units, self.step, boundary)
        return Outlook(self.step, time.perf_counter(), left, trust=0)

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
        """Likewise for weights and running statistics."""
        for name, tensor in self.model.state_dict().items():
            if not (finite := tensor.isfinite()).all():
                raise self._not_finite(f"weight {name}", float(tensor[~finite][0]), self.step)

    def _not_finite(self, what: str, value: float, step: int) -> UserError:
        schedule, names = self.scheduler.schedule, self.units.names
        rates = self._rates(step - 1)
        last = self.folder.path / LAST
        kept = f"; {last} is from before" if last.exists() else ""
        return UserError(
            f"the {what} is {value} at step {step:,} (epoch {self.epoch + 1}), with "
            f"{schedule.frontier(step - 1)} of {len(names)} units frozen and rates from "
            f"{rates[0]:.3g} ({names[0]}) to {rates[-1]:.3g} ({names[-1]}): try a smaller "
            f"--lr{kept}"
        )

    def _rates(self, step: int) -> list[float]:
        """Of every unit at a step (from 0)."""
        factor = self.scheduler.schedule.factor
        bases = self.scheduler.base_lrs
        return [float(base) * factor(unit, step) for unit, base in enumerate(bases)]

    def _verify_cache(self) -> None:
        for number, (split, rows) in enumerate(self.cache.rows.items()):
            random = np.random.default_rng([self.settings.seed, self.epoch, 2, number])
            count = min(self.settings.batch_size, rows)
            self.cache.verify(split, random.choice(rows, count, replace=False))

    def _step(self, x: Tensor, labels: Tensor) -> Tensor:
        """One optimiser step on a batch at the frontier; returns its mean loss."""
        loss = F.cross_entropy(self._suffix(x), labels)
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
        bar = progress_bar("validating", rows, "image", delay=SHOW_VALIDATION_AFTER)
        with timed(self.seconds, "validate"), bar:
            batches = zip(self.cache.batches("val", order), self._labels("val", order), strict=True)
            for x, labels in batches:
                self._stop_if_asked()
                logits = self._suffix(x)
                losses.append(F.cross_entropy(logits, labels, reduction="sum"))
                correct.append((logits.argmax(1) == labels).sum())
                bar.update(len(x))
            loss = float(torch.stack(losses).cpu().double().sum()) / rows
            return loss, int(torch.stack(correct).sum()) / rows

    def _suffix(self, x: Tensor) -> Tensor:
        """Logits in float32 from a batch at the frontier."""
        with autocast(self.device, self.autocast_dtype):
            return self.units.run(x, self.units.frontier).float()

    def _labels(self, split: str, order: Sequence[Indices]) -> Iterator[Tensor]:
        """One tensor for each batch. The order travels to the device as a whole: each copy from
        there would wait for it."""
        rows = torch.from_numpy(all_rows(order)).to(self.device)
        return iter(self.labels[split][rows].split([len(indices) for indices in order]))

    def _save(self, *, best: bool = False) -> None:
        """A checkpoint of this very moment, unless it holds what is no number."""
        self._refuse_losses(self._losses)
        self._refuse_weights()
        with self.folder.writing():
            save_checkpoint(self.folder.path, self._state_dict(), best=best)
        self.cache.release()

    def _state_dict(self) -> dict[str, Any]:
        losses = torch.stack(self._losses).cpu() if self._losses else torch.zeros(0)
        return {
            "settings": self.settings.as_json(),
            "command": self.command,
            "data": self.data,
            "numerics": self._numerics(),
            "epoch": self.epoch,
            "position": self.position,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": random_state(self.device),
            "losses": losses,
            "metrics": self.metrics,
            "planning": self._planning_state(),
            "totals": self._totals(),
            "epoch_start": self._epoch_start,
        }

    def _planning_state(self) -> dict[str, Any]:
        if self.planning is None:
            return {"profile": None, "on": None, "cache": self.cache.state_dict()}
        return self.planning.state_dict()

    def _spent(self) -> dict[str, float]:
        """Seconds so far, by what they were spent on, in all processes."""
        planned = self.planning.seconds if self.planning is not None else NO_PLANNING
        wall = time.perf_counter() - self.started
        return added({**planned, **self.seconds, "wall": wall}, self._earlier["seconds"])

    def _counted(self) -> dict[str, float]:
        """What the cache counted so far, in all processes."""
        counted = {name: getattr(self.cache, name) for name in COUNTED}
        return added(counted, self._earlier["cache"])

    def _so_far(self) -> dict[str, float]:
        """What an epoch's line tells the growth of."""
        return {**self._spent(), **self._counted()}

    def _totals(self) -> dict[str, Any]:
        """What has come together so far, in all processes."""
        events = self.planning.events if self.planning is not None else []
        return {
            "seconds": self._spent(),
            "cache": self._counted(),
            "events": [*self._earlier["events"], *events],
            "resumed": self._earlier["resumed"],
        }

    def _summary(self) -> dict[str, Any]:
        planning, last = self.planning, self.metrics[-1]
        plan = planning.comparison(sum(self.seconds.values())) if planning else None
        totals, store = self._totals(), self.cache.store
        if store is not None and not is_committed(store.folder):
            store = None  # it could not be written
        return {
            **{f"{part}_seconds": seconds for part, seconds in totals["seconds"].items()},
            "epochs": self.settings.epochs,
            "steps": self.step,
            "val_accuracy": last["val_accuracy"],
            "best_val_accuracy": self.best_val_accuracy,
            "train_loss": last["train_loss"],
            "weights_sha256": weights_sha256(self.model.state_dict()),
            "frozen_units": self.units.frontier,
            "units": list(self.units.names),
            "initial_rates": self._rates(0),
            "freeze_steps": list(self.scheduler.schedule.freeze_steps),
            "numerics": self._numerics(),
            "cache": {
                "enabled": self.settings.cache,
                "max_bytes": self.cache.max_bytes,
                "boundaries": totals["events"],
                **totals["cache"],
                "store": None if store is None else str(store.folder),
                "kept": store is not None and store.kept,
            },
            "plan": plan,
            "resumed_at": totals["resumed"],
        }
