"""Writes the page about all options: `python scripts/options_table.py > docs/options.md`."""

import argparse
import re
import sys
from collections.abc import Iterator

from cachefreeze.report.summary_text import markdown_table
from cachefreeze.training.command_line import FREEZEOUT, command_line

INTRODUCTION = """\
# Options

`python scripts/options_table.py > docs/options.md` made this page from
`python -m cachefreeze.train --help`. An option that does not apply to
the chosen network or data set is an error.
"""
TERMINAL = """
Progress bars go to the standard error, and only if that is a terminal. A log file always gets plain
lines. `--quiet` is for jobs whose output is sent by mail (cron): it prints warnings, and the
results at the end of the run. Errors go to the standard error, with exit code 2 (130 or 143 after a
signal). Neither option is saved with the run: give it again when you use `--resume`.
"""
FREEZEOUTS = """
## FreezeOut's own options

The options of `train.py` in the code of FreezeOut's authors, and the options to use here.
"""


def main() -> int:
    """Prints the page; returns the exit code."""
    argparse.ArgumentParser(description="Write the page about all options.").parse_args()
    print("\n".join(page()))
    return 0


def page() -> Iterator[str]:
    """Yields the lines of the page in Markdown."""
    yield INTRODUCTION.rstrip()
    for group in command_line()._action_groups:
        shown = [
            action
            for action in group._group_actions
            if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)
        ]
        if shown:
            title = str(group.title)
            yield from ("", f"## {title[0].upper()}{title[1:]}", "")
            meanings = [str(action.help).replace("%%", "%") for action in shown]
            rows = [[spelled(one), _cell(text)] for one, text in zip(shown, meanings, strict=True)]
            yield from markdown_table([["option", "meaning"], *rows])
    yield TERMINAL.rstrip()
    yield FREEZEOUTS
    rows = [[_cell(theirs), _cell(ours)] for theirs, ours in FREEZEOUT]
    yield from markdown_table([["there", "here"], *rows])


def spelled(action: argparse.Action) -> str:
    """Returns an option in all its spellings, with the form of its value."""
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    if action.nargs == 0:
        return names
    value = action.metavar
    if value is None:
        value = "|".join(map(str, action.choices or [action.dest.upper()]))
    if isinstance(value, tuple):
        value = " ".join(value)
    return f"{names} `{_cell(value)}`"


def _cell(text: str) -> str:
    """Returns a text with options as code. Two hyphens of plain text may become a dash."""
    coded = re.sub(r"(?<![\w-])--?[A-Za-z][\w-]*", r"`\g<0>`", text)
    return coded.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
