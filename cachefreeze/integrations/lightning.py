"""A Lightning callback: the cache beside `Trainer.fit`."""

from typing import Any

from cachefreeze.errors import UserError
from cachefreeze.prefix_cache import PrefixCache

# Whichever is missing has no types either, and its Callback is Any.
try:
    from lightning.pytorch import Callback  # type: ignore[import-not-found]
except ImportError:
    try:
        from pytorch_lightning import Callback  # type: ignore[import-not-found, assignment]
    except ImportError as error:
        raise UserError(
            "cachefreeze.adapters.lightning needs Lightning: pip install 'cachefreeze[lightning]'"
        ) from error


class ServeRows(Callback):  # type: ignore[misc]
    """Gives `training_step` and `validation_step` rows at the frontier instead of network input.

    Loaders are of an `IndexedDataset`, so that a batch is a list `[rows, x, y]`: its x becomes
    `cache.batch(rows, x)`, and the steps run `units.suffix(x)`. A store is filled when an epoch
    starts, unless it is the last. Checkpoints say where rows come from, and `fit` closes the cache
    in the end. Tests and predictions are not served: run the model there.

    Args:
        cache: on the device that is trained on; `autocast_dtype` is bfloat16 for `bf16-mixed`.
        validation: the split of each validation loader, in order. Loaders of splits that the cache
            has not got are left alone.

    Raises:
        UserError: by `fit`: several processes, another device, or other batches.
    """

    def __init__(self, cache: PrefixCache, validation: tuple[str, ...] = ("val",)) -> None:
        self.cache = cache
        self.validation = validation
        self._resumed: dict[str, Any] | None = None
        self._saved = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.world_size > 1:
            raise UserError(f"a cache serves one process, and there are {trainer.world_size}")
        ours, theirs = self.cache.device.type, pl_module.device.type
        if ours != theirs:
            raise UserError(f"the cache is on {ours}: give PrefixCache device={theirs!r}")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # By now the weights and the scheduler of a checkpoint are loaded.
        state, self._resumed = self._resumed, None
        if state is not None:
            self.cache.units.freeze(state["frontier"])
            self.cache.load_state_dict(state["cache"])

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._saved:  # in the epoch before: it is on disk by now
            self.cache.release()
            self._saved = False
        epochs = trainer.max_epochs
        if epochs is None or epochs < 0 or epochs - trainer.current_epoch > 1:
            self.cache.materialize()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        self._serve(batch, "train")

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        split = dict(enumerate(self.validation)).get(dataloader_idx)
        if split in self.cache.rows:
            self._serve(batch, split)

    def _serve(self, batch: Any, split: str) -> None:
        if not isinstance(batch, list) or len(batch) != 3:
            raise UserError(f"a batch of {split} is no list [rows, x, y], as of an IndexedDataset")
        # The step is given this very list.
        batch[1] = self.cache.batch(batch[0], batch[1], split)

    def state_dict(self) -> dict[str, Any]:
        return {"frontier": self.cache.units.frontier, "cache": self.cache.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._saved = True

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.cache.close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.cache.close()
