"""`--resume`: which run to go on with, where it stood, and with what settings."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachefreeze.errors import UserError
from cachefreeze.files import is_locked
from cachefreeze.training.settings import Settings, option_of, parse, split
from cachefreeze.training.terminal import EVERYTHING, Verbosity

RUNS = Path("runs")
# Settings that may be changed in the middle of a run: they change its time, or what it leaves, but
# not one bit of its weights. (Where the data lie may change; what they are is compared.)
FREE = {
    "data_dir",
    "cache",
    "cache_dir",
    "cache_max_gb",
    "cache_codec",
    "checkpoint_every",
    "tensorboard",
    "workers",
    "report",
    "output_dir",
}


@dataclass(frozen=True)
class Start:
    """What a command line asks to be done.

    Args:
        settings: of the run.
        command: the words that say so, without those that name its folder, and `verbosity`.
        verbosity: how much to tell of it.
        resuming: the folder holds it already.
        finished: there is nothing left to do.
    """

    settings: Settings
    command: list[str]
    verbosity: Verbosity = EVERYTHING
    resuming: bool = False
    finished: bool = False


def start_of(argv: Sequence[str]) -> Start:
    """What a command line asks for: a new run, or an old one to go on with.

    Raises:
        UserError: a setting makes no sense, there is no such run, its files cannot be used, or a
            setting was changed that would change its results.
    """
    known, verbosity, words = split(argv)
    target, output_dir = known.resume, known.output_dir
    named = [] if output_dir is None else ["--output-dir", str(output_dir)]
    if target is None:
        return Start(parse([*words, *named]), words, verbosity)
    if "--plan" in words:
        raise UserError("--plan shows what a new run would keep: leave out --resume")
    if target == "auto":
        settings = parse([*words, *named])
        folder = output_dir if output_dir is not None else newest_unfinished(settings)
        if folder is None or not (folder / "args.json").exists():
            return Start(settings, words, verbosity)
    else:
        folder = Path(target)
        if output_dir not in (None, folder):
            raise UserError(f"--resume {folder} goes on in that folder: leave out --output-dir")
    return _go_on(folder, words, verbosity)


def newest_unfinished(settings: Settings) -> Path | None:
    """The newest folder in `runs` of a run with the same results that was cut off, and that no
    process is at work on."""
    if not RUNS.is_dir():
        return None
    for folder in sorted(RUNS.iterdir(), reverse=True):  # their names begin with the time
        if not (folder / "args.json").is_file() or (folder / "summary.json").exists():
            continue
        try:
            stored, _ = _read_args(folder)
        except UserError:
            continue
        if not differences(stored, settings.as_json()) and not is_locked(folder):
            return folder
    return None


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
            f"started with {was}: leave it out, or start a new run"
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
    """Settings and command line from a run's args.json."""
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
            f"{folder} holds no run to go on with: name the folder that a run was given, or "
            "--resume auto"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} does not describe a run: start a new one") from error


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Settings in which two runs differ so that their results do."""
    # A setting that a run before it does not know of is as it was then: off.
    names = [field.name for field in dataclasses.fields(Settings) if field.name not in FREE]
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
    path: Path,
    warn: Callable[[str], None],
) -> None:
    """See that a checkpoint is of the run that is to go on, with what it was trained on.

    Args:
        state: of the checkpoint, which lies at `path`.
        settings: of the run.
        data: see `DataSet.facts`.
        numerics: what decides the last bits besides the settings; `device` and `precision` must be
            the same.
        warn: is told what may change the results, but need not.

    Raises:
        UserError: it is not.
    """
    changed = differences(state["settings"], settings.as_json())
    if changed:
        raise UserError(
            f"{path} is of a run with another {option_of(changed[0])} than its args.json says: "
            "start a new run"
        )
    if state["data"]["same"] != data["same"]:
        raise UserError(
            "the images are not those that the run was started with: bring them back as they were, "
            "or start a new run"
        )
    if state["data"]["identity"] != data["identity"]:
        warn(
            "image files were copied or written since: if they do not hold the same images, the "
            "results will differ"
        )
    before = state["numerics"]
    for name, option in (("device", "--device"), ("precision", "--precision")):
        if before[name] != numerics[name]:
            raise UserError(
                f"the run was started with {option} {before[name]}, and {numerics[name]} would "
                "change its results: go on with it there, or start a new run"
            )
    changed = [name for name in numerics if before.get(name) != numerics[name]]
    if changed:
        was = ", ".join(f"{name} {before.get(name)}" for name in changed)
        warn(f"not as it was before ({was}): the last bits of the results may differ")
