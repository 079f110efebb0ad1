"""Runs the trainer in several processes, without torchrun, which takes seconds to start.

Arguments: number of processes, a victim, and the command line. The victim is a rank, a step and a
signal that this rank gets before this step ("" for none). If the working directory has a folder
`rank1`, the second process works there, with the package that lies in it. The exit code is the
largest one. Under torchrun the number of processes is left out.
"""

import os
import signal
import sys
from pathlib import Path

from torch.distributed import TCPStore


def work(rank: int, count: int, victim: str, argv: list[str]) -> int:
    """Trains in one of the processes; returns the exit code."""
    place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in place.items()})
    own = Path(f"rank{rank}").absolute()
    if own.is_dir():
        os.chdir(own)
        if (own / "cachefreeze").is_dir():
            sys.path.insert(0, str(own))
    return train(victim, argv)


def train(victim: str, argv: list[str]) -> int:
    """Runs a command line, with checkpoints and rows as in a run of an hour."""
    from cachefreeze.cache import selection
    from cachefreeze.plan import costs, forecast, overhead
    from cachefreeze.train import main
    from cachefreeze.training import checkpoint
    from cachefreeze.training.trainer import Trainer

    overhead._FREE_SECONDS = checkpoint.TIME_SHARE = float("inf")
    costs.READ_RATE = costs.WRITE_RATE = float("inf")
    forecast.COMPARED = forecast.TRACED = selection.LEAST_SHARE = 0
    rank, step, number = map(int, (victim or "-1 0 0").split())
    begun_again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if rank == int(os.environ["RANK"]) and not begun_again:
        real = Trainer._step

        def hit(trainer, *args):
            if trainer.state.step == step:
                os.kill(os.getpid(), number)
            return real(trainer, *args)

        Trainer._step = hit
    return main(argv)


def run(count: int, victim: str, argv: list[str]) -> int:
    """Forks the processes; returns the largest exit code."""
    # As torchrun does, so that the store outlives the first process.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(store.port)
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            code = 70  # a traceback
            signal.alarm(120)
            try:
                code = work(rank, count, victim, argv)
            except SystemExit as end:
                code = end.code
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun started it
        sys.exit(train(sys.argv[1], sys.argv[2:]))
    sys.exit(run(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
