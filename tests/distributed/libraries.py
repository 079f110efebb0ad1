"""Training loops of accelerate and Lightning in two processes, without a cache and with one.

Arguments: name of the library, and an empty folder. Each process leaves what it has seen in a file
there. The only line of a loop that is not of the library is the one that makes the cache.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze
from cachefreeze.cache import selection
from cachefreeze.plan import overhead

from .loops import BATCH, EPOCHS, ROWS, Classifier
from .ranks import digest, wait_for_segments

PROCESSES = 2


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(ROWS, 3, 8, 8, generator=generator)
    return TensorDataset(images, torch.randint(4, (ROWS,), generator=generator))


def accelerate(directory: Path | None) -> dict[str, Any]:
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    set_seed(0)
    accelerator = Accelerator(cpu=True)
    model = Classifier()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(data(), BATCH, shuffle=True)
    cache = None if directory is None else cachefreeze.ActivationCache(model, directory=directory)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(EPOCHS):
        if directory is not None and epoch >= 2:
            wait_for_segments(directory, PROCESSES)
        for x, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            accelerator.backward(loss)
            optimizer.step()
    return found(accelerator.unwrap_model(model), cache)


def lightning(directory: Path | None) -> dict[str, Any]:
    import lightning.pytorch as package

    from cachefreeze.integrations.lightning import CacheActivations

    class Module(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Classifier()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            x, labels = batch
            return F.cross_entropy(self.model(x), labels)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.head.parameters(), lr=0.05, momentum=0.9)

    class Waits(package.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if directory is not None and trainer.current_epoch >= 2:
                wait_for_segments(directory, PROCESSES)

    package.seed_everything(0, verbose=False)
    caching = CacheActivations(directory=directory) if directory is not None else None
    trainer = package.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        strategy="ddp",
        devices=PROCESSES,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Waits(), *([caching] if caching is not None else [])],
    )
    module = Module()
    trainer.fit(module, DataLoader(data(), BATCH, shuffle=True))
    return found(module.model, None if caching is None else caching.cache)


def found(model: torch.nn.Module, cache: cachefreeze.ActivationCache | None) -> dict[str, Any]:
    seen: dict[str, Any] = {"weights": digest(model)}
    if cache is not None:
        cache.close()
        seen |= {"served": cache.stats.rows_served, "messages": list(cache.messages)}
    return seen


LOOPS = {"accelerate": accelerate, "lightning": lightning}


def work(rank: int, name: str, folder: Path) -> None:
    """Trains twice in one of the processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES}
    os.environ.update({variable: str(value) for variable, value in place.items()})
    # So that these short calls are followed as long ones are.
    overhead._FREE_SECONDS, selection.LEAST_SHARE = float("inf"), 0.0
    loop = LOOPS[name]
    seen = {"plain": loop(None), "cached": loop(folder / "rows")}
    (folder / f"{rank}.json").write_text(json.dumps(seen))


def main(name: str, folder: Path) -> int:
    """Forks the processes; returns the largest exit code."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    children = []
    for rank in range(PROCESSES):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work(rank, name, folder)
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
