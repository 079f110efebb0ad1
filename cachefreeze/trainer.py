"""The training loop."""

import time
from collections.abc import Callable
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
from cachefreeze.freezeout import FreezeOutLR, param_groups
from cachefreeze.hashing import weights_sha256
from cachefreeze.models.units import partition
from cachefreeze.planner import Run
from cachefreeze.planning import NO_PLANNING, Planning
from cachefreeze.report import RunFolder, epoch_line, progress_bar, say
from cachefreeze.rows import Indices, batches_of, epoch_order
from cachefreeze.timing import timed


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
        self.seconds = {"train": 0.0, "validate": 0.0}
        self.planning = None
        if settings.cache:
            self.planning = Planning(
                self.cache,
                self.model,
                self.optimizer,
                self.inputs["train"],
                Run(
                    self.scheduler.schedule.freeze_steps,
                    self.total_steps,
                    len(data.train),
                    len(data.val),
                    settings.batch_size,
                ),
                decode_seconds=data.decode_seconds,
                policy=settings.cache_policy,
                codec=settings.codec,
                tell=say,
                record=lambda profile: self.folder.write_json("profile.json", profile),
            )

    def fit(self) -> dict[str, Any]:
        """Train all epochs; returns what goes into summary.json, but for `wall_seconds`."""
        try:
            if self.planning is not None:
                self.planning.start()
            with progress_bar("epochs", self.settings.epochs, "epoch", leave=True) as bar:
                for epoch in range(self.settings.epochs):
                    metrics = self._epoch(epoch)
                    self.folder.add_metrics(metrics)
                    self._save(epoch + 1)
                    say(epoch_line(metrics, self.settings.epochs, self.units.names))
                    bar.update()
            return self._summary(metrics)
        finally:
            if self.planning is not None:
                self.planning.stop()
            self.cache.close()

    def _epoch(self, epoch: int) -> dict[str, Any]:
        before = self._spent()
        train_loss = self._train(epoch)
        val_loss, val_accuracy = self._validate()
        self.best_val_accuracy = max(self.best_val_accuracy, val_accuracy)
        spent = {name: seconds - before[name] for name, seconds in self._spent().items()}
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
            "seconds": spent["train"] + spent["materialize"] + spent["validate"],
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
                losses.append(self._step(next(batches), indices))
                self.scheduler.step()
                self.step += 1
                seconds = time.perf_counter() - mark
                self.seconds["train"] += seconds
                if self.planning is not None:
                    self.planning.after_step(seconds, len(indices))
                bar.update(len(indices))
        with timed(self.seconds, "train"):
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
        with timed(self.seconds, "validate"):
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

    def _spent(self) -> dict[str, float]:
        """Seconds so far, by what they were spent on."""
        return {**(self.planning.seconds if self.planning else NO_PLANNING), **self.seconds}

    def _summary(self, last: dict[str, Any]) -> dict[str, Any]:
        planning = self.planning
        plan = planning.comparison(sum(self.seconds.values())) if planning else None
        return {
            **{f"{part}_seconds": seconds for part, seconds in self._spent().items()},
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
                "boundaries": planning.events if planning else [],
                "rows_served": self.cache.rows_served,
                "prefix_unit_rows_computed": self.cache.prefix_unit_rows_computed,
                "saved_seconds": self.cache.saved_seconds,
                "read_seconds": self.cache.read_seconds,
                "compute_seconds": self.cache.compute_seconds,
                "store": None if self.cache.store is None else str(self.cache.store.folder),
            },
            "plan": plan,
        }
