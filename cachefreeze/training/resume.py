"""The search for the run that `--resume` goes on with, and the check that it is the same run."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachefreeze.errors import UserError
from cachefreeze.training.command_line import parse, split
from cachefreeze.training.launch import ALONE, Launch
from cachefreeze.training.options import option_of
from cachefreeze.training.settings import Settings
from cachefreeze.training.terminal import EVERYTHING, NOTHING, Verbosity

RUNS = Path("runs")


@dataclass(frozen=True)
class Start:
    """A run that a command line asks for.

    Args:
        settings: Settings of the run.
        command: Words of the command line that are settings of the run. Its folder and the
            verbosity are left out.
        verbosity: Amount of lines and bars on the terminal.
        resuming: Whether the folder holds this run already.
        finished: Whether the run has nothing left to do.
    """

    settings: Settings
    command: list[str]
    verbosity: Verbosity = EVERYTHING
    resuming: bool = False
    finished: bool = False

    def as_json(self) -> dict[str, Any]:
        """Returns what other processes of the run have to know, as plain JSON."""
        folder = str(self.settings.output_dir.absolute())
        return {
            "words": [*self.command, "--output-dir", folder],
            "resuming": self.resuming,
            "finished": self.finished,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Start":
        """Returns the run that the first process has given by `as_json`."""
        words = found["words"]
        return cls(parse(words), words[:-2], NOTHING, found["resuming"], found["finished"])


def start_of(argv: Sequence[str], launch: Launch = ALONE) -> Start:
    """Returns the run that a command line asks for: a new run, or an old one to go on with.

    Args:
        argv: Words of the command line.
        launch: Place of this process. If torchrun has started it again, the run goes on.

    Raises:
        UserError: A setting makes no sense, there is no such run, its files cannot be used, or a
            setting was changed that would change its results.
    """
    process, output_dir, words = split(argv)
    target, verbosity = process.resume, process.verbosity
    named = [] if output_dir is None else ["--output-dir", str(output_dir)]
    if launch.restarts and target in (None, "auto"):
        for found in _folders() if output_dir is None else [output_dir]:
            if launch.launcher and _launcher_of(found) == launch.launcher:
                return _go_on(found, words, verbosity)
    if target is None:
        return Start(parse([*words, *named]), words, verbosity)
    if "--plan" in words:
        raise UserError("--plan is for a new run: leave out --resume")
    if target == "auto":
        settings = parse([*words, *named])
        folder = output_dir if output_dir is not None else newest_unfinished(settings)
        if folder is None or not (folder / "args.json").exists():
            return Start(settings, words, verbosity)
    else:
        folder = Path(target)
        if output_dir not in (None, folder):
            raise UserError(f"--resume {folder} writes to that folder: leave out --output-dir")
    return _go_on(folder, words, verbosity)


def newest_unfinished(settings: Settings) -> Path | None:
    """Returns the newest folder in `runs` of an unfinished run with the same results.

    A run that a process is working on does not count. None if there is no such run.
    """
    # A quarter of a second, which only `--resume auto` needs.
    from cachefreeze.store.files import is_locked

    for folder in _folders():
        if not (folder / "args.json").is_file() or (folder / "summary.json").exists():
            continue
        try:
            stored, _ = _read_args(folder)
        except UserError:
            continue
        if not differences(stored, settings.as_json()) and not is_locked(folder):
            return folder
    return None


def _folders() -> list[Path]:
    """Returns the folders in `runs`, the newest first: their names begin with the time."""
    return sorted(RUNS.iterdir(), reverse=True) if RUNS.is_dir() else []


def _launcher_of(folder: Path) -> str:
    """Returns the launcher of the run in a folder. Empty if there is none."""
    try:
        stored, _ = _read_args(folder)
    except UserError:
        return ""
    return str(stored.get("launcher", ""))


def _go_on(folder: Path, words: list[str], verbosity: Verbosity) -> Start:
    stored, command = _read_args(folder)
    place = ["--output-dir", str(folder)]
    before = parse([*command, *place])
    settings = parse([*command, *words, *place])
    changed = differences(before.as_json(), settings.as_json())
    if changed:
        was, asked = (getattr(each, changed[0]) for each in (before, settings))
        raise UserError(
            f"{option_of(changed[0])} {asked} would change the results of {folder}, which was "
            f"started with {was}: leave out this option, or start a new run"
        )
    moved = differences(stored, before.as_json())
    if moved:
        raise UserError(
            f"{folder} was started by a version of cachefreeze in which {option_of(moved[0])} was "
            f"{stored.get(moved[0])}: start a new run, or use that version"
        )
    if settings != before:
        command = [*command, *words]
    finished = (folder / "summary.json").exists()
    return Start(settings, command, verbosity, True, finished)


def _read_args(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Reads the settings and the command line from args.json of a run."""
    path = folder / "args.json"
    try:
        if not path.is_file():  # nor a pipe, which would never end
            raise FileNotFoundError
        stored = json.loads(path.read_bytes())
        command = [str(word) for word in stored["command"]]
        if {"-h", "--help"} & set(command):
            raise ValueError("no run was started so")
        return dict(stored), command
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no run to go on with: name the --output-dir of a run, or give "
            "--resume auto"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): make it readable, or start a new run"
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} does not describe a run: start a new one") from error


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Returns the names of settings that differ between two runs and change the results."""
    # A setting that a run before it does not know of is as it was then: off.
    names = [one.name for one in dataclasses.fields(Settings) if not one.metadata["free"]]
    return [name for name in names if _differs(name, one, other)]


def _differs(name: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    if name in one and name in other:
        return bool(_plain(one[name]) != _plain(other[name]))
    return bool(one.get(name) or other.get(name))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_same_run(
    state: Mapping[str, Any],
    settings: Settings,
    data: Mapping[str, Any],
    numerics: Mapping[str, str],
    processes: int,
    path: Path,
    warn: Callable[[str], None],
) -> None:
    """Checks that a checkpoint belongs to the run that goes on, and that its data are the same.

    Args:
        state: Contents of the checkpoint.
        settings: Settings of the run.
        data: Facts about the data set, from `DataSet.facts`.
        numerics: Values that decide the last bits of results, besides the settings. `device` and
            `precision` must be the same as before.
        processes: Number of processes that go on with the run.
        path: Path of the checkpoint, for error messages.
        warn: Function called with a sentence for each change that may alter the results.

    Raises:
        UserError: The checkpoint belongs to another run, or the data or the device are others.
    """
    changed = differences(state["settings"], settings.as_json())
    if changed:
        raise UserError(
            f"{path} was saved by a run with another {option_of(changed[0])} than the args.json "
            "beside it says: start a new run"
        )
    if state["data"]["same"] != data["same"]:
        raise UserError(
            "the images are not those that the run was started with: bring them back as they were, "
            "or start a new run"
        )
    if state["data"]["identity"] != data["identity"]:
        warn(
            "image files were copied or written since the run was started: if they do not hold the "
            "same images, the results will differ"
        )
    before = state["numerics"]
    for name, option in (("device", "--device"), ("precision", "--precision")):
        if before[name] != numerics[name]:
            raise UserError(
                f"the run was started with {option} {before[name]}, and {numerics[name]} would "
                f"change its results: give {option} {before[name]}, or start a new run"
            )
    was = state.get("processes", [1])[-1]
    if was != processes:
        warn(
            f"the run goes on in {processes} process{'es' * (processes > 1)} instead of {was}: "
            "batches stay the same, but batch norms see other parts of them, so the results differ "
            "a little"
        )
    changed = [name for name in numerics if before.get(name) != numerics[name]]
    if changed:
        was = ", ".join(f"{name} {before.get(name)}" for name in changed)
        warn(f"the last bits of the results may differ, because the run was started with {was}")
