"""Measure loops on a GPU with the cache and without it, in one command and a given time.

    python scripts/measure_gpu.py --minutes 8 --out DIR [--images FOLDER] [--only CASE]
    python scripts/measure_gpu.py --tiny --minutes 1.5 --out DIR

First the tests marked `gpu` run, then every case of `gpu_cases/cases.py` in a process of its own.
The command ends in time. `DIR/results.json` is written anew after each case, and `DIR/table.txt` at
the end, also after SIGTERM and Ctrl-C. docs/gpu.md explains what is measured. `--tiny` runs small
networks on a CPU, to see that the command works.

Exit code 0: every case was measured. 1: one was not, or a test failed. 2: nothing could begin.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import logging
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # so that it runs in a checkout that is not installed
# Packages that are needed, by the names of their modules; and those of the tests.
NEEDED = {
    "torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "scipy": "scipy",
    "xxhash": "xxhash", "zarr": "zarr", "numcodecs": "numcodecs", "google_crc32c": "google-crc32c",
    "tqdm": "tqdm",
}  # fmt: skip
OF_TESTS = {"pytest": "pytest", "PIL": "pillow"}
# Largest share of the time that the tests may take, and seconds that are kept for the end.
TESTS_SHARE, RESERVE = 0.3, 3.0
# A case is ended if it takes so many times its time, which it plans for itself.
PATIENCE = 1.5
# cuBLAS reads it once, when CUDA is first used. Without it, its results may differ from run to run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class Stopped(BaseException):
    """A signal has asked for the end."""


class Results:
    """Everything that was found so far, in a folder.

    Args:
        folder: Folder of the results, which exists.
        about: Arguments of the command.

    Attributes:
        found: Results as JSON: facts of the machine, tests, and cases by name.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder = folder
        self.found: dict[str, Any] = {"arguments": about, "machine": {}, "tests": {}, "cases": {}}

    def save(self) -> None:
        """Writes the results. The file is whole at any time."""
        try:
            write(self.folder / "results.json", self.found)
        except OSError as error:  # the table is printed all the same
            print(f"could not write {self.folder / 'results.json'}: {error}", file=sys.stderr)


def write(path: Path, value: Any) -> None:
    """Writes JSON to a file, which is either the old one or the new one at any time."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


def run_apart(work: Callable[[], None], seconds: float) -> str:
    """Runs a function in a process of its own: a fault on a GPU ends no more than that.

    Args:
        work: Function to run.
        seconds: Seconds after which the process is ended.

    Returns:
        Reason why the function did not come to its end. Empty if it did.
    """
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(work,))
    process.start()
    try:
        process.join(max(seconds, 0))
        if process.is_alive():
            return f"ended after {seconds:.0f} s, which is longer than planned"
    finally:
        # With its own workers, if there are any left.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid or 0, number)
            process.join(3)
        process.kill()  # if it was too young for a group of its own
    code = process.exitcode or 0
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}" if code else ""


def _alone(work: Callable[[], None]) -> None:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    work()


def facts(path: Path) -> None:
    """Writes what this machine is. In a process of its own, for CUDA does not survive a fork."""
    import torch
    import torchvision

    found: dict[str, Any] = {
        "torch": torch.__version__, "torchvision": torchvision.__version__,
        "python": platform.python_version(), "cores": len(os.sched_getaffinity(0)),
        "cuda": torch.cuda.is_available(),
    }  # fmt: skip
    if found["cuda"]:
        found |= {
            "gpu": torch.cuda.get_device_name(), "cuda_version": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "gpu_bytes": torch.cuda.get_device_properties(0).total_memory,
        }  # fmt: skip
    write(path, found)


def run_tests(seconds: float) -> dict[str, Any]:
    """Runs the tests marked `gpu`, and returns how they ended."""
    if lacks := missing(OF_TESTS):
        return {"status": "left out", "why": f"not installed: {', '.join(lacks)}"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    process = subprocess.Popen(
        [*command, "-v", "--tb=short", "--no-header"], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=seconds)
        status = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        status = "ended for lack of time"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if status == "ended for lack of time":
        said, _ = process.communicate()
    lines = said.splitlines()
    return {
        "status": status, "summary": lines[-1].strip("= ") if lines else "",
        "seconds": round(time.monotonic() - began, 1), "output": lines[-150:],
    }  # fmt: skip


def run_case(name: str, path: Path, args: argparse.Namespace, seconds: float) -> None:
    """Measures one case, and writes its results to a file after each repeat."""
    import torch
    from gpu_cases.cases import CASES
    from gpu_cases.machine import Machine

    found: dict[str, Any] = {"status": "begun"}

    def save(more: dict[str, Any]) -> None:
        found.update(more)
        write(path, found)

    began = time.monotonic()
    logging.getLogger("cachefreeze").setLevel(logging.ERROR)  # its sentences are in the results
    try:
        save({})
        device = torch.device("cpu" if args.tiny else "cuda")
        until = began + seconds
        CASES[name].measured.measure(
            Machine(device, args.tiny, until, args.repeats, args.workers, args.images), save
        )
        save({"status": "measured", "seconds": round(time.monotonic() - began, 1)})
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        save({"status": "failed", "why": reason, "traceback": traceback.format_exc().splitlines()})


def run_cases(names: list[str], results: Results, args: argparse.Namespace, end: float) -> None:
    """Measures cases one after another, each in its share of the time that is left."""
    from gpu_cases.cases import CASES
    from gpu_cases.table import line_of

    for place, name in enumerate(names):
        case, left = CASES[name], end - time.monotonic()
        seconds = left * case.share / sum(CASES[one].share for one in names[place:])
        path = results.folder / "cases" / f"{name}.json"
        path.unlink(missing_ok=True)
        why = "ended by a signal"
        try:
            most = min(PATIENCE * seconds, left)
            work = functools.partial(run_case, name, path, args, seconds)
            why = run_apart(work, most) if seconds >= 1 else "no time was left"
        finally:  # also if a signal has come
            found = {"status": "left out"}
            if path.exists():
                found = json.loads(path.read_text())
            if why:
                found |= {"status": "cut" if path.exists() else "left out", "why": why}
            results.found["cases"][name] = {"title": case.title, "asked": case.asked, **found}
            results.save()
        print(line_of(name, results.found["cases"][name]), flush=True)


def missing(packages: dict[str, str]) -> list[str]:
    """Returns the names of packages that are not installed."""
    return [name for module, name in packages.items() if importlib.util.find_spec(module) is None]


def fail(sentence: str) -> int:
    """Prints a sentence about what is wrong; returns the exit code."""
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def begin(args: argparse.Namespace) -> str:
    """Makes the folder and looks for what is needed. Returns what is wrong, if anything is."""
    if lacks := missing(NEEDED):
        return (
            f"these packages are missing, install them (from a folder of wheels: `pip install "
            f"--no-index --find-links FOLDER {' '.join(lacks)}`): {', '.join(lacks)}."
        )
    if args.minutes <= 0 or args.repeats < 1 or args.workers < 0:
        return "--minutes must be above 0, --repeats 1 or more, and --workers 0 or more."
    if args.images is not None and not args.images.is_dir():
        return f"there is no folder {args.images}: give --images a folder of images."
    try:
        (args.out / "cases").mkdir(parents=True, exist_ok=True)
        write(args.out / "results.json", {})
    except OSError as error:
        return f"cannot write to {args.out} ({error.strerror}): give --out another folder."
    try:
        from gpu_cases.cases import CASES
    except ImportError as error:
        return f"a package cannot be imported ({error}): install it, or what it needs."
    if unknown := [name for name in args.only or [] if name not in CASES]:
        return f"there is no case {unknown[0]}: choose among {', '.join(CASES)}."
    return ""


def measure(args: argparse.Namespace, results: Results, end: float) -> str:
    """Runs tests and cases. Returns what is wrong, if nothing can begin."""
    from gpu_cases.cases import CASES

    path = args.out / "machine.json"
    if why := run_apart(functools.partial(facts, path), 60):
        return f"torch cannot tell what this machine is: {why}."
    results.found["machine"] = json.loads(path.read_text())
    path.unlink()
    if not (args.tiny or results.found["machine"]["cuda"]):
        return "torch finds no GPU here: give --tiny to run small networks on the CPU."
    if not args.no_tests:
        results.found["tests"] = {"status": "ended by a signal"}
        results.found["tests"] = run_tests(TESTS_SHARE * (end - time.monotonic()))
        results.save()
        print(f"tests: {results.found['tests']['status']}", flush=True)
    run_cases(args.only or list(CASES), results, args, end)
    return ""


def main() -> int:
    """Measures and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8, help="minutes that all of it may take")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="small networks, on the CPU")
    parser.add_argument("--images", type=Path, help="folder of images, in place of random ones")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="cases to measure")
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="most repeats of a case"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load images")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes - RESERVE
    if args.workers is None:
        args.workers = 0 if args.tiny else max(min(12, len(os.sched_getaffinity(0)) - 2), 0)
    if why := begin(args):
        return fail(why)

    from gpu_cases.table import table_of

    def stop(number: int, frame: object) -> None:
        raise Stopped(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    about = {name: str(value) for name, value in vars(args).items()}
    results = Results(args.out, about)
    code = 0
    try:
        if why := measure(args, results, end):
            return fail(why)
    except Stopped as stopped:
        results.found["stopped"] = str(stopped)
        code = 128 + signal.Signals[str(stopped)]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the rest takes no time
    results.save()
    table = table_of(results.found)
    with contextlib.suppress(OSError):
        (args.out / "table.txt").write_text(table)
    print(table, end="")
    whole = all(one["status"] == "measured" for one in results.found["cases"].values())
    tests = results.found["tests"].get("status", "passed") in ("passed", "left out")
    return code or int(not (whole and tests))


if __name__ == "__main__":
    sys.exit(main())
