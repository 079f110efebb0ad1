"""Processes that train one run together: what each of them does, and what they exchange."""

import contextlib
import gc
import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from cachefreeze.data import Indices
from cachefreeze.errors import UserError
from cachefreeze.keys.hashing import tensors_sha256
from cachefreeze.training.launch import Launch

_T = TypeVar("_T")
# Processes wait so long for one that downloads a data set, or keeps the rows of a large one. The
# limit of NCCL, 10 minutes, ends runs that only wait.
_PATIENCE = timedelta(hours=6)
PACKAGE = Path(__file__).parents[1]


class Ranks:
    """The processes of a run. A run in one process exchanges nothing.

    Every process has to call the methods in the same order, except those that say so.

    Args:
        launch: Place of this process.

    Attributes:
        launch: Place of this process.
        count: Number of processes.
        first: Whether this process writes files and prints.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.count = launch.count
        self.first = launch.is_first
        self._said = 0
        if self.count == 1:
            return
        store, rank, count = next(rendezvous("env://"))
        # torchrun may start processes again with the store of those that were killed.
        self._store = PrefixStore(f"cachefreeze {launch.restarts}", store)
        self._store.set_timeout(_PATIENCE)
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        dist.init_process_group(backend, store=self._store, rank=rank, world_size=count)
        self._waiting: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def close(self) -> None:
        """Ends the exchange, once all processes have come to their end."""
        if self.count > 1:
            self.any(False)
            gc.collect()  # a wrapped network that is left would abort the process
            dist.destroy_process_group()

    def tells_errors(self) -> bool:
        """Returns whether this process is the first one that has failed. Any process may call it.

        All processes fail alike in most cases, and one sentence is enough.
        """
        try:
            return self.count == 1 or self._store.add("errors", 1) == 1
        except RuntimeError:  # the first process has ended, and with it what all of them share
            return False

    def lost_another(self, error: RuntimeError) -> bool:
        """Returns whether an error says that another process cannot be reached any more."""
        return self.count > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))

    def take(self, device: torch.device) -> None:
        """Takes a device for this process.

        Args:
            device: Device of the run.

        Raises:
            UserError: There is no such device for each process.
        """
        if self.count == 1 or device.type == "cpu":
            return
        if device.type != "cuda":
            raise UserError(f"several processes cannot share {device}: give --device cpu")
        if self.launch.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{self.launch.local_count} processes need {self.launch.local_count} GPUs, and "
                f"this machine has {torch.cuda.device_count()}: start fewer, or give --device cpu"
            )
        torch.cuda.set_device(self.launch.local_rank)

    def check_batch(self, rows: int, cached: bool, warn: Callable[[str], None]) -> None:
        """Checks that a batch can be split over the processes.

        Args:
            rows: Number of rows of a batch.
            cached: Whether the run keeps rows.
            warn: Function called with a sentence if it can only be split into unequal parts.

        Raises:
            UserError: There are fewer rows than processes.
        """
        if rows < self.count:
            raise UserError(
                f"a batch of {rows} rows cannot be split over {self.count} processes: start fewer "
                "processes, or give a larger --batch-size"
            )
        if cached and rows % self.count:
            warn(
                f"batches of {rows} rows are split into parts of {rows // self.count} and "
                f"{rows // self.count + 1} rows, and kept rows are found in parts of the same size "
                f"only: a --batch-size that is a multiple of {self.count} lets the cache do more"
            )

    # What each process does.

    def part(self, rows: Indices) -> Indices:
        """Returns the rows of a batch that this process computes. Any process may call it.

        Args:
            rows: Numbers of the rows of a batch.
        """
        return np.array_split(rows, self.count)[self.launch.rank]

    def parts(self, batches: Sequence[Indices]) -> list[Indices]:
        """Returns the part of each batch that this process computes."""
        return [self.part(rows) for rows in batches]

    def in_turn(self, work: Callable[[], _T]) -> _T:
        """Calls a function in the first process, and then in all others at once.

        What the first one downloads or decodes is there for the others.
        """
        if self.count == 1 or self.first:
            result = work()
            self.any(False)
            return result
        self.any(False)
        return work()

    def seed(self, seed: int, step: int) -> None:
        """Seeds torch for a step, so that processes draw other numbers, and again after a restart.

        One process goes on with the random state that it has.

        Args:
            seed: Seed of the run.
            step: Number of the step.
        """
        if self.count > 1:
            state = np.random.SeedSequence([seed, step, self.launch.rank]).generate_state(1)
            torch.manual_seed(int(state[0]))

    # What they exchange.

    def any(self, flag: bool) -> bool:
        """Returns whether a flag is set in any process. All of them wait for the last one."""
        if self.count == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, group=self._waiting)
        return bool(flags[0])

    def total(self, values: Tensor) -> Tensor:
        """Returns the sum of a tensor of the CPU over all processes."""
        if self.count > 1:
            dist.all_reduce(values, group=self._waiting)
        return values

    def mean(self, loss: Tensor) -> Tensor:
        """Returns the mean of a tensor over all processes, on its device."""
        if self.count > 1:
            dist.all_reduce(loss)
            loss /= self.count
        return loss

    def gather(self, value: Any) -> list[Any]:
        """Returns the value of each process.

        Args:
            value: Plain JSON.
        """
        if self.count == 1:
            return [value]
        self._said += 1
        self._store.set(f"{self._said} {self.launch.rank}", json.dumps(value))
        return [json.loads(self._store.get(f"{self._said} {one}")) for one in range(self.count)]

    def from_first(self, value: Any) -> Any:
        """Returns the value of the first process.

        Args:
            value: Plain JSON. That of other processes is left out.
        """
        if self.count == 1:
            return value
        self._said += 1
        if self.first:
            self._store.set(f"{self._said}", json.dumps(value))
        return json.loads(self._store.get(f"{self._said}"))

    def send_buffers(self, model: nn.Module) -> None:
        """Copies the buffers of the first process to all others.

        Each batch norm has seen other rows. Those of the first process count.
        """
        if self.count == 1:
            return
        alike: dict[tuple[Any, ...], list[Tensor]] = {}
        for one in model.buffers():
            alike.setdefault((one.dtype, one.device), []).append(one)
        with torch.no_grad():
            for buffers in alike.values():
                flat = torch.cat([one.reshape(-1) for one in buffers])
                dist.broadcast(flat, 0)
                if not self.first:
                    pieces = flat.split([one.numel() for one in buffers])
                    for one, piece in zip(buffers, pieces, strict=True):
                        one.copy_(piece.view_as(one))


class _Network(nn.Module):
    """A network, or without input the sum of what trains in it.

    Args:
        model: Network.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor | None) -> Tensor:
        if x is not None:
            return self.model(x)
        trained = [one for one in self.model.parameters() if one.requires_grad]
        return torch.stack([one.sum() for one in trained]).sum()


def wrapped(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Returns a network whose backward pass takes the mean of gradients over all processes.

    `DistributedDataParallel` holds on to the parameters that take gradient when it is made. After a
    freeze it raises, or has to walk the graph in every step to find those that are left. So it is
    made anew, and then sends less. The old one must be gone. Making it sends the parameters and
    buffers of the first process to all others.

    Args:
        model: Network, which is trained in place.
        ranks: Processes of the run. If there is only one, the network itself is returned.
    """
    if ranks.count == 1:
        return model
    gc.collect()  # the old one is part of a cycle, and its hooks are still at work
    found = DistributedDataParallel(_Network(model))
    # After its first pass it puts gradients that come at the same time next to each other. Where a
    # gradient lies decides in which order three or more processes are summed. So that a resumed run
    # sums as the first one, the first pass is this one in both.
    found(None).backward()
    for one in model.parameters():
        one.grad = None
    return found


def gradient_bytes(model: nn.Module) -> int:
    """Returns the number of bytes of gradients that each process sends in a step."""
    return sum(one.nbytes for one in model.parameters() if one.requires_grad)


def code_of(command: Sequence[str]) -> dict[str, str]:
    """Returns hashes of what a process runs, by name.

    Args:
        command: Words of the command line.
    """
    found = {
        f"cachefreeze/{path.relative_to(PACKAGE)}": _digest(path.read_bytes())
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    for name in ("torch", "torchvision", "timm", "transformers", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[f"the version of {name}"] = version(name)
    found["the version of Python"] = platform.python_version()
    found["the command line"] = _digest(json.dumps(list(command)).encode())
    return found


def weights_of(model: nn.Module) -> dict[str, str]:
    """Returns a hash of each parameter and buffer of a model, by name."""
    return {name: tensors_sha256([(name, one)]) for name, one in model.state_dict().items()}


def refuse_others(ranks: Ranks, found: Callable[[], Mapping[str, str]], what: str) -> None:
    """Checks that all processes have the same code, images or weights.

    Args:
        ranks: Processes of the run.
        found: Function that returns hashes of what this process has, by name. It is not called if
            there is only one process.
        what: Words for what it has, with "other".

    Raises:
        UserError: A process has something else than the first one.
    """
    if ranks.count == 1:
        return
    ours, *others = ranks.gather(dict(found()))
    for rank, theirs in enumerate(others, 1):
        for name in sorted({*ours, *theirs}):
            if ours.get(name) != theirs.get(name):
                raise UserError(
                    f"process {rank} has {what} than process 0 ({name} differs): start all "
                    "processes with the same command, the same installation and the same files"
                )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
