"""A Lightning callback: the cache for the time of `Trainer.fit`."""

from typing import Any

from cachefreeze.cache import ActivationCache
from cachefreeze.errors import UserError

# Whichever is missing has no types either, and its Callback is Any.
try:
    from lightning.pytorch import Callback  # type: ignore[import-not-found]
except ImportError:
    try:
        from pytorch_lightning import Callback  # type: ignore[import-not-found, assignment]
    except ImportError as error:
        raise UserError(
            "cachefreeze.integrations.lightning needs Lightning: pip install "
            "'cachefreeze[lightning]'"
        ) from error


class CacheActivations(Callback):  # type: ignore[misc]
    """Opens an `ActivationCache` of the module when `fit` begins, and closes it when `fit` ends.

    Steps, loaders and checkpoints stay as they are. No part of the cache is in a checkpoint: what a
    directory holds is found by its content.

    Args:
        **options: Options of `ActivationCache`, such as `directory`.

    Attributes:
        cache: Cache of the last `fit`, or None.

    Examples:
        >>> trainer = Trainer(callbacks=[CacheActivations(directory="cache")])
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.cache: ActivationCache | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Opens the cache. By now the module is on its device."""
        self.cache = ActivationCache(pl_module, **self._options)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Closes the cache."""
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Closes the cache."""
        self._end()

    def _end(self) -> None:
        if self.cache is not None:
            self.cache.close()
