"""The command line of `python -m cachefreeze.train`: its options, and what it refuses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cachefreeze.errors import UserError
from cachefreeze.training.options import Help, Parser, add_options, filled, option
from cachefreeze.training.settings import Settings, settings_of
from cachefreeze.training.terminal import Verbosity

# Options of earlier versions, and what to do in their place.
GONE = {
    "--cache-policy": "rows are kept whenever units freeze and enough steps are left",
    "--cache-dtype": "rows are kept in their own type; --precision bf16 halves them",
    "--cache-tier": "rows are read through the system's page cache, which is memory while there "
    "is some free",
    "--device-cache-gb": "rows lie in --cache-dir, and --cache-max-gb limits its size",
    "--keep-cache": "rows stay in --cache-dir until their space is needed",
    "--verify-cache": "rows are compared with computed ones in every run: the first batches before "
    "any is served, and samples after",
}
# The options of FreezeOut's authors (train.py of their repository), and ours.
FREEZEOUT = (
    ("-L, --depth, --dropout", "the same"),
    ("-k, --growth-rate", "the same"),
    ("--epochs, --seed", "the same"),
    ("--t_0", "the same, or --t0"),
    ("--how_scale", "the same, or --schedule"),
    ("--scale_lr, --no_scale", "the same (no value); or --scale-lr, --no-scale-lr"),
    ("--batch_size", "the same, or -b, --batch-size"),
    ("--model", "the same, or --arch: densenet, wrn or vgg"),
    ("--augment, --no-augment", "the same, but off unless asked for"),
    ("--which_dataset 10, 100", "--dataset cifar10, cifar100"),
    ("--save-weights FILE", "--output-dir FOLDER"),
    ("--resume True", "--resume RUN_DIR"),
    ("--validate, --no-validate", "not there: every epoch ends with a validation"),
    ("--validate-test", "not there: CIFAR is validated on its test set"),
    ("--const_time", "not there: give --epochs"),
)


@dataclass(frozen=True, kw_only=True)
class Process:
    """Options of one process of a run. They are not saved with the run."""

    resume: str | None = option(group="files of a run, and resuming it", metavar="RUN_DIR|auto")
    """go on with the run in the folder RUN_DIR, with its settings; auto goes on with the newest
    unfinished run of the given settings (or with the run in --output-dir), and starts a new one
    if there is none"""
    progress: bool = option(group="output on the terminal", default=True)
    """draw progress bars if the output is a terminal; --no-progress prints lines but no bars"""
    quiet: bool = option("-q", default=False)
    """print warnings, errors and the result only; with --plan, the plan"""

    @property
    def verbosity(self) -> Verbosity:
        """Amount of output on the terminal."""
        return Verbosity(not self.quiet, self.progress and not self.quiet)


def command_line() -> Parser:
    """Returns a parser of all options of the program, in groups by topic."""
    width = max(len(theirs) for theirs, _ in FREEZEOUT)
    names = "\n".join(f"  {theirs:<{width}}  {ours}" for theirs, ours in FREEZEOUT)
    parser = Parser(
        prog="python -m cachefreeze.train",
        usage="%(prog)s [options]",
        description="Train a network with FreezeOut, and cache the outputs of frozen units.",
        epilog=f"options of FreezeOut's own code, and what to give here:\n{names}",
        formatter_class=Help,
        allow_abbrev=False,
    )
    add_options(parser, Settings)
    add_options(parser, Process)
    return parser


def split(argv: Sequence[str]) -> tuple[Process, Path | None, list[str]]:
    """Splits a command line into options of this process and settings of the run.

    Args:
        argv: Words of the command line.

    Returns:
        Options of this process, the value of `--output-dir`, and the words that are settings of
        the run.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    add_options(parser, Process)
    add_options(parser, Settings, ["output_dir"])
    known, words = parser.parse_known_args(list(argv))
    given = {name: value for name, value in vars(known).items() if value is not None}
    folder = given.pop("output_dir", None)
    return Process(**filled(Process, given)), folder, words


def parse(argv: Sequence[str]) -> Settings:
    """Reads the settings of a run from a command line.

    Args:
        argv: Words of the command line.

    Raises:
        UserError: An option does not exist, or a value makes no sense.
    """
    for word in argv:
        name = word.partition("=")[0]
        if name in GONE:
            raise UserError(f"{name} is gone: {GONE[name]}; leave it out")
    found = vars(command_line().parse_args(argv))
    for name in Process.__dataclass_fields__:
        del found[name]
    return settings_of({name: value for name, value in found.items() if value is not None})
