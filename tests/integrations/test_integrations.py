"""The cache in the loops of other packages: the same weights, and rows from the cache."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cachefreeze import FreezeOutLR, UserError, param_groups
from cachefreeze.keys.hashing import weights_sha256

pytest.importorskip("lightning.pytorch")
import lightning.pytorch as lightning

from cachefreeze.integrations.lightning import CacheActivations

ROWS, VAL, BATCH, EPOCHS = 48, 16, 8, 6

pytestmark = [
    # Of loaders without workers, of a training set that is small, and of frozen units.
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode:UserWarning"),
]


def images(rows: int) -> TensorDataset:
    x = torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(rows))
    return TensorDataset(x, torch.arange(rows) % 5)


class Steps:
    """What a LightningModule has of its own, whichever package that is from."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        blocks = [
            nn.Sequential(nn.Conv2d(i, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            for i in (3, 8, 8)
        ]
        head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 5))
        self.model = nn.Sequential(*blocks, head)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.losses.append(float(F.cross_entropy(self.model(x), y)))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(param_groups(self.model), lr=0.05, momentum=0.9)
        steps = EPOCHS * ROWS // BATCH
        scheduler = FreezeOutLR(optimizer, self.model, steps, t0=0.3, shape="linear")
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Module(Steps, lightning.LightningModule):
    pass


def fit(module: Steps, *callbacks: Any, package: Any = lightning, **options: Any) -> None:
    checkpoint = options.pop("checkpoint", None)
    shuffle = options.pop("shuffle", True)
    torch.manual_seed(5)
    loaders = DataLoader(images(ROWS), BATCH, shuffle=shuffle), DataLoader(images(VAL), BATCH)
    trainer = package.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, *loaders, ckpt_path=checkpoint)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_ends_with_the_weights_that_it_has_without_a_cache(
    precision: str, tmp_path: Path
) -> None:
    plain, module = Module(), Module()
    fit(plain, precision=precision)
    caching = CacheActivations(directory=tmp_path)
    fit(module, caching, precision=precision)
    assert weights_sha256(module.state_dict()) == weights_sha256(plain.state_dict())
    assert module.losses == plain.losses
    assert caching.cache is not None
    assert caching.cache.stats.rows_served > ROWS
    assert any(tmp_path.glob("*/*/zarr.json")), "rows are on the disk when it is closed"


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


def test_a_resumed_fit_finds_the_rows_that_the_first_one_kept(tmp_path: Path) -> None:
    # Without dropout and shuffling, whose random state Lightning does not save.
    def module() -> Module:
        made = Module()
        made.model[-1][1].p = 0.0
        return made

    whole = module()
    fit(whole, shuffle=False)
    path, killed = tmp_path / "last.ckpt", CacheActivations(directory=tmp_path / "cache")
    with pytest.raises(KilledError):
        fit(module(), killed, KilledAfter(4, path), shuffle=False)
    resumed = module()
    caching = CacheActivations(directory=tmp_path / "cache")
    fit(resumed, caching, shuffle=False, checkpoint=path)
    assert weights_sha256(resumed.state_dict()) == weights_sha256(whole.state_dict())
    assert resumed.losses[-2:] == whole.losses[-2:]
    assert caching.cache is not None
    assert caching.cache.stats.rows_served > 0


def test_another_module_may_be_fitted_after_an_error(tmp_path: Path) -> None:
    module = Module()
    with pytest.raises(KilledError):
        fit(module, CacheActivations(), KilledAfter(1, tmp_path / "last.ckpt"))
    fit(module, CacheActivations())  # or it would have a cache already


def test_the_package_under_its_older_name_does_as_well(tmp_path: Path) -> None:
    older = pytest.importorskip("pytorch_lightning")
    module = type("Older", (Steps, older.LightningModule), {})()
    caching = CacheActivations(directory=tmp_path)
    fit(module, caching, package=older)
    assert caching.cache is not None
    assert caching.cache.stats.rows_served > ROWS


def test_a_module_without_parameters_is_refused() -> None:
    with pytest.raises(UserError, match="has no parameters"):
        CacheActivations().on_fit_start(None, lightning.LightningModule())


def test_without_lightning_one_sentence_says_what_to_install() -> None:
    code = (
        "import importlib.util, sys\n"
        "older = importlib.util.find_spec('pytorch_lightning')\n"
        "sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "from cachefreeze import UserError\n"
        "try:\n"
        "    import cachefreeze.integrations.lightning\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "if older:\n"  # the older name alone will do
        "    del sys.modules['pytorch_lightning']\n"
        "    from cachefreeze.integrations.lightning import CacheActivations\n"
        "    assert CacheActivations.__base__.__module__.startswith('pytorch_lightning.')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == (
        "cachefreeze.integrations.lightning needs Lightning: pip install 'cachefreeze[lightning]'\n"
    )
