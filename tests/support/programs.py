"""Runs programs in processes of their own, forked from one that has imported the large packages.

Importing PyTorch, transformers or Lightning takes longer than most programs of the tests run.
`cachefreeze` is not imported before the fork, so that each program imports it as users do.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Imported before the fork, where they are installed.
PACKAGES = ("torch", "torchvision", "torch._dynamo", "zarr")


@dataclass
class Done:
    """A program that has ended: its exit code, and what it has printed."""

    code: int
    stdout: str
    stderr: str


class Programs:
    """Processes that have the large packages imported already.

    Args:
        packages: Names of modules that are imported before the fork, where they are installed.
    """

    def __init__(self, packages: tuple[str, ...] = PACKAGES) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.programs", *packages],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        )

    def close(self) -> None:
        """Ends the process that forks the others."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def run(
        self, program: Path | str, *arguments: str, cwd: Path = ROOT, timeout: int = 300
    ) -> Done:
        """Runs a program to its end.

        Args:
            program: Path of a file, or name of a module as after `python -m`.
            *arguments: Arguments of the program.
            cwd: Working directory of the program.
            timeout: Number of seconds after which it is killed.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            request = {
                "program": str(program), "is_file": isinstance(program, Path),
                "arguments": list(arguments), "cwd": str(cwd), "out": str(out), "err": str(err),
                "timeout": timeout,
            }  # fmt: skip
            self._server.stdin.write(json.dumps(request) + "\n")
            code = os.waitstatus_to_exitcode(int(self._server.stdout.readline()))
            return Done(code, out.read_text(), err.read_text())


@contextlib.contextmanager
def warm(*packages: str) -> Iterator[Programs]:
    """Yields processes that have PyTorch and some more packages imported already."""
    server = Programs((*PACKAGES, *packages))
    try:
        yield server
    finally:
        server.close()


def _live(request: dict[str, Any]) -> int:
    for stream, path in ((1, request["out"]), (2, request["err"])):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), stream)
    os.chdir(request["cwd"])
    sys.argv = [request["program"], *request["arguments"]]
    try:
        if request["is_file"]:
            sys.path[0] = str(Path(request["program"]).parent)
            runpy.run_path(request["program"], run_name="__main__")
        else:
            sys.path[0] = request["cwd"]
            runpy.run_module(request["program"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


def _serve(packages: list[str]) -> None:
    for name in packages:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    sys.path.insert(0, "")  # replaced by the folder of each program
    sys.path.insert(1, str(ROOT))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.alarm(request["timeout"])
            code = 1
            try:
                code = _live(request)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                atexit._run_exitfuncs()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitpid(child, 0)[1], flush=True)
    os._exit(0)  # taking PyTorch apart takes seconds


if __name__ == "__main__":
    _serve(sys.argv[1:])
