"""The program `python -m cachefreeze.train`: parse, build, fit, report."""

import os
import shlex
import sys
from collections.abc import Sequence

from cachefreeze.errors import Interrupted, UserError
from cachefreeze.training.launch import Launch, launch_of
from cachefreeze.training.resume import Start, start_of
from cachefreeze.training.terminal import printable, speaking, this_python


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    launch, start = launch_of(os.environ), None
    if not launch.is_first and {"-h", "--help"} & set(argv):
        return 0
    try:
        # The other processes get it from the first one.
        start = start_of(argv, launch) if launch.is_first else None
        # Seconds of imports: a mistake in the command line is told, and help given, before.
        from cachefreeze.training.run import carry_out, joined

        with joined(launch, argv, start) as (start, ranks), speaking(start.verbosity):
            carry_out(start, ranks)
    except UserError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    except Interrupted as stop:
        assert start is not None
        if launch.is_first:
            print(printable(f"{stop}; to go on: {how_to_resume(start, launch)}"), file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        if not launch.is_first:
            return 130
        kept = "nothing was saved yet"
        if start is not None and (start.settings.output_dir / "summary.json").exists():
            folder = shlex.quote(str(start.settings.output_dir))
            kept = "the run is finished, and only its report may be missing; to draw it: "
            kept += f"{this_python()} scripts/write_report.py {folder}"
        elif start is not None and (start.settings.output_dir / "last.pt").exists():
            last = start.settings.output_dir / "last.pt"
            kept = f"the last checkpoint is {last}; to go on: {how_to_resume(start, launch)}"
        print(printable(f"stopped at once: {kept}"), file=sys.stderr)
        return 130
    return 0


def how_to_resume(start: Start, launch: Launch) -> str:
    """Returns the command that goes on with a run."""
    folder = shlex.quote(str(start.settings.output_dir))
    python = (
        this_python() if launch.count == 1 else f"torchrun --nproc-per-node {launch.local_count}"
    )
    return f"{python} -m cachefreeze.train --resume {folder}"


if __name__ == "__main__":
    sys.exit(main())
