"""Place of this process among the processes of a run, from the variables that torchrun sets."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """Place of this process among the processes that train one run together.

    Args:
        rank: Number of this process, from 0.
        count: Number of processes.
        local_rank: Number of this process among those of this machine.
        local_count: Number of processes on this machine.
        restarts: Number of times that all processes were started again after one had failed.
        launcher: Name of the program that has started the processes, the same at each restart.
            Empty if that is not torchrun.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    restarts: int = 0
    launcher: str = ""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0


ALONE = Launch()


def launch_of(environment: Mapping[str, str]) -> Launch:
    """Returns the place of this process.

    Args:
        environment: Environment variables.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(environment.get(name) for name in needed) or environment["WORLD_SIZE"] == "1":
        return ALONE
    elastic = environment.get("TORCHELASTIC_RUN_ID")
    # torchrun stays the same process when it starts the others again.
    launcher = f"{platform.node()} {os.getppid()} {elastic}" if elastic else ""
    return Launch(
        rank=int(environment["RANK"]),
        count=int(environment["WORLD_SIZE"]),
        local_rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
        local_count=int(environment.get("LOCAL_WORLD_SIZE", 1)),
        restarts=int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
        launcher=launcher,
    )
