"""The cache in the loops of other packages: the same weights, and rows from the store."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cachefreeze import (
    FreezeOutLR,
    IndexedDataset,
    PrefixCache,
    UserError,
    param_groups,
    partition,
)
from cachefreeze.hashing import weights_sha256
from cachefreeze.store import store_folders

pytest.importorskip("lightning.pytorch")
import lightning.pytorch as lightning

from cachefreeze.adapters.lightning import ServeRows

ROWS, VAL, BATCH, EPOCHS = 44, 12, 8, 4

pytestmark = [
    # Of loaders without workers, of a training set that is small, and of frozen units.
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode:UserWarning"),
]


def images(rows: int) -> IndexedDataset:
    x = torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(rows))
    return IndexedDataset(TensorDataset(x, torch.arange(rows) % 5))


class Steps:
    """Of a LightningModule, whichever package that is from."""

    def __init__(self, epochs: int = EPOCHS) -> None:
        super().__init__()
        torch.manual_seed(3)
        blocks = [
            nn.Sequential(nn.Conv2d(i, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            for i in (3, 8, 8)
        ]
        head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 5))
        self.model = nn.Sequential(*blocks, head)
        self.units = partition(self.model)
        self.epochs = epochs
        self.losses: list[float] = []
        self.inputs: list[torch.Size] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _, x, y = batch
        self.inputs.append(x.shape[1:])
        return F.cross_entropy(self.units.suffix(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        _, x, y = batch
        self.losses.append(float(F.cross_entropy(self.units.suffix(x), y)))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(param_groups(self.units), lr=0.05, momentum=0.9)
        steps = self.epochs * -(-ROWS // BATCH)
        scheduler = FreezeOutLR(optimizer, self.units, steps, t0=0.4, shape="linear")
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Module(Steps, lightning.LightningModule):
    pass


def cache_of(module: Steps, directory: Path | None, **options: Any) -> PrefixCache:
    splits = {"train": images(ROWS), "val": images(VAL)}
    return PrefixCache(module.units, splits, batch_size=BATCH, directory=directory, **options)


def trainer(*callbacks: Any, epochs: int = EPOCHS, package: Any = lightning, **options: Any) -> Any:
    return package.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


def fit(
    module: Steps,
    cache: PrefixCache,
    *callbacks: Any,
    shuffle: bool = True,
    checkpoint: Path | None = None,
    **options: Any,
) -> None:
    torch.manual_seed(5)
    # What the cache was given, so that it can tell them that inputs need not be loaded.
    train, val = (cache.inputs[split].dataset for split in ("train", "val"))
    loaders = DataLoader(train, BATCH, shuffle=shuffle), DataLoader(val, BATCH)
    trainer(ServeRows(cache), *callbacks, **options).fit(module, *loaders, ckpt_path=checkpoint)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_ends_with_the_weights_that_it_has_without_a_cache(
    precision: str, tmp_path: Path
) -> None:
    dtype = torch.bfloat16 if precision == "bf16-mixed" else None
    ends = []
    for directory in (None, tmp_path):
        module = Module()
        cache = cache_of(module, directory, autocast_dtype=dtype)
        fit(module, cache, precision=precision)
        ends.append((weights_sha256(module.model.state_dict()), module.losses))
        assert module.units.frontier == 3
        # Steps after a freeze are given what the first unit that trains takes.
        assert module.inputs[0] == (3, 8, 8)
        assert module.inputs[-1] == (8, 8, 8)
        # The first unit freezes in the second epoch: the store serves the last two.
        assert cache.rows_served == (0 if directory is None else 2 * (ROWS + VAL))
        assert cache.store is None  # it was closed
    assert ends[0] == ends[1]


def test_the_last_epoch_fills_no_store(tmp_path: Path) -> None:
    module = Module()
    cache = cache_of(module, tmp_path)
    module.units.freeze(1)
    fit(module, cache, epochs=1)
    assert cache.rows_served == 0
    assert cache.prefix_unit_rows_computed >= ROWS


class KilledError(Exception):
    pass


class KilledAfter(lightning.Callback):
    """A checkpoint at the end of an epoch, and the end of everything within the next."""

    def __init__(self, epochs: int, path: Path) -> None:
        self.epochs, self.path = epochs, path

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == self.epochs:
            raise KilledError

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch + 1 == self.epochs:
            trainer.save_checkpoint(self.path)


def test_a_resumed_fit_goes_on_with_the_store_of_its_checkpoint(tmp_path: Path) -> None:
    # Without dropout and shuffling, whose random state Lightning does not save.
    def module() -> Module:
        made = Module()
        made.model[-1][1].p = 0.0
        return made

    whole = module()
    fit(whole, cache_of(whole, None), shuffle=False)

    path, killed = tmp_path / "last.ckpt", module()
    cache = cache_of(killed, tmp_path / "cache")
    with pytest.raises(KilledError):
        fit(killed, cache, KilledAfter(3, path), shuffle=False)
    assert cache.store is None  # or nobody else could use it now
    kept = torch.load(path, weights_only=True)["callbacks"]["ServeRows"]
    assert kept["cache"]["boundary"] >= 1
    assert kept["frontier"] >= kept["cache"]["boundary"]

    resumed = module()
    cache = cache_of(resumed, tmp_path / "cache")
    fit(resumed, cache, shuffle=False, checkpoint=path)
    assert weights_sha256(resumed.model.state_dict()) == weights_sha256(whole.model.state_dict())
    assert cache.rows_served >= ROWS  # of the one epoch that was left, which fills no store
    assert resumed.losses[-2:] == whole.losses[-2:]


def test_a_resumed_fit_knows_what_was_frozen_by_hand(tmp_path: Path) -> None:
    class ByHand(Module):
        def on_train_epoch_end(self) -> None:
            self.units.freeze(1)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    path, killed = tmp_path / "last.ckpt", ByHand()
    with pytest.raises(KilledError):
        fit(killed, cache_of(killed, tmp_path / "cache"), KilledAfter(2, path))
    resumed = ByHand()
    cache = cache_of(resumed, tmp_path / "cache")
    fit(resumed, cache, epochs=3, checkpoint=path)
    assert cache.rows_served == ROWS + VAL


def test_stores_that_only_older_checkpoints_name_are_removed(tmp_path: Path) -> None:
    held: list[int] = []

    class Saves(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            held.append(len(store_folders(tmp_path / "cache")))

    module = Module(epochs=6)
    cache = cache_of(module, tmp_path / "cache")
    fit(module, cache, Saves(), epochs=6)
    assert module.units.frontier == 3
    # The one in use, and the one that the last checkpoint names.
    assert max(held) == 2


def test_batches_that_do_not_say_which_rows_they_are_are_refused(tmp_path: Path) -> None:
    module = Module()
    cache = cache_of(module, tmp_path)
    plain = DataLoader(images(ROWS).dataset, BATCH)
    with pytest.raises(UserError, match=r"a batch of train is no list \[rows, x, y\]"):
        trainer(ServeRows(cache), num_sanity_val_steps=0).fit(module, plain, plain)


def test_a_cache_on_another_device_is_refused(tmp_path: Path) -> None:
    module = Module()
    cache = cache_of(module, tmp_path)
    cache.device = torch.device("cuda")
    with pytest.raises(UserError, match="the cache is on cuda: give PrefixCache device='cpu'"):
        fit(module, cache)


def test_validation_of_what_the_cache_has_not_got_is_left_alone(tmp_path: Path) -> None:
    class Plain(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.losses.append(float(F.cross_entropy(self.model(x), y)))

    module, data = Plain(), images(ROWS)
    cache = PrefixCache(module.units, data, batch_size=BATCH, directory=tmp_path)
    loaders = DataLoader(data, BATCH), DataLoader(images(VAL).dataset, BATCH)
    trainer(ServeRows(cache)).fit(module, *loaders)
    assert cache.rows_served == 2 * ROWS
    assert len(module.losses) == 2 * (EPOCHS + 1)  # once before training: Lightning tries it


def test_the_package_under_its_older_name_does_as_well(tmp_path: Path) -> None:
    older = pytest.importorskip("pytorch_lightning")
    module = type("Older", (Steps, older.LightningModule), {})()
    cache = cache_of(module, tmp_path)
    fit(module, cache, package=older)
    assert cache.rows_served == 2 * (ROWS + VAL)


def test_without_lightning_one_sentence_says_what_to_install() -> None:
    code = (
        "import importlib.util, sys\n"
        "older = importlib.util.find_spec('pytorch_lightning')\n"
        "sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "from cachefreeze import UserError\n"
        "try:\n"
        "    import cachefreeze.adapters.lightning\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "if older:\n"  # the older name alone will do
        "    del sys.modules['pytorch_lightning']\n"
        "    from cachefreeze.adapters.lightning import ServeRows\n"
        "    assert ServeRows.__base__.__module__.startswith('pytorch_lightning.')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == (
        "cachefreeze.adapters.lightning needs Lightning: pip install 'cachefreeze[lightning]'\n"
    )
