"""Makes a command line of a dataclass, in which each setting is described once.

`option` describes a field, and argparse reads the command line. Of the libraries that do this,
cyclopts refuses an option that is given twice, tyro prints errors as boxes and ends the process,
and neither jsonargparse nor simple-parsing knows all names (`-b`, `--batch_size`, `--no_scale`).
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args

from cachefreeze.errors import UserError
from cachefreeze.plan.views import FLIPS

_METAVARS = {int: "N", Path: "FOLDER"}


def option(
    *names: str,
    group: str | None = None,
    default: Any = None,
    told: str | None = None,
    limits: tuple[Callable[[Any], bool], str] | None = None,
    only: tuple[str, ...] = (),
    free: bool = False,
    hidden: Mapping[str, bool] | None = None,
    **argparse_options: Any,
) -> Any:
    """Describes a field of a dataclass as an option of the command line.

    The option is named as the field is, with hyphens. The string below the field is its help. A
    field of type `bool` has a `--no-` form.

    Args:
        *names: Other names of the option.
        group: Title of the group that begins with this option. If None, it is in the group of the
            field before it.
        default: Value if the option is not given. If it is a function, it is called with the other
            values, by name.
        told: Words for the default in the help. If None, the default itself is told.
        limits: Function that says whether a value makes sense, and words for what does.
        only: Networks or data sets that the option is for. Empty for all.
        free: Whether the setting can be changed in the middle of a run without changing one bit of
            its weights.
        hidden: Other names of a bool option that the help does not show, and the value of each.
        **argparse_options: Options of `add_argument`, such as `metavar`.
    """
    return dataclasses.field(
        metadata={
            "names": names,
            "group": group,
            "default": default,
            "told": told,
            "limits": limits,
            "only": only,
            "free": free,
            "hidden": hidden or {},
            "argparse": argparse_options,
        }
    )


def option_of(name: str) -> str:
    """Returns the command line's name of a setting."""
    return "--" + name.replace("_", "-")


def texts_of(described: type) -> dict[str, str]:
    """Returns the string below each field of a class, by the name of the field."""
    (body,) = ast.parse(inspect.getsource(described)).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def add_options(
    parser: argparse.ArgumentParser, described: type, names: Sequence[str] = ()
) -> None:
    """Adds options for the fields of a class to a parser. Those that are not given are None.

    Args:
        parser: Parser that reads the command line.
        described: Dataclass whose fields are made by `option`.
        names: Names of the fields. Empty for all of them.
    """
    groups = {group.title: group for group in parser._action_groups}
    title: str | None = None
    texts = texts_of(described)
    for one in dataclasses.fields(described):
        about = one.metadata
        title = about["group"] or title
        if names and one.name not in names:
            continue
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        types: Any = one.type
        kind = next(each for each in get_args(types) or (types,) if each is not NoneType)
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if kind is not bool:
            how = {"type": kind, "metavar": _METAVARS.get(kind), **about["argparse"]}
        # Short names stand first.
        spelled = sorted([option_of(one.name), *about["names"]], key=lambda name: name[:2] == "--")
        text = _help(texts[one.name], about["default"], about["told"])
        groups[title].add_argument(*spelled, dest=one.name, help=text, **how)
        for name, value in about["hidden"].items():
            parser.add_argument(
                name, dest=one.name, action="store_const", const=value, help=argparse.SUPPRESS
            )


def _help(text: str, default: Any, told: str | None) -> str:
    if told is None and default is not None and not callable(default):
        values = default if isinstance(default, tuple) else (default,)
        told = " ".join(map(_word, values))
    return (text if told is None else f"{text} (default: {told})").replace("%", "%%")


def _word(value: Any) -> str:
    return str(value) if not isinstance(value, bool) else "on" if value else "off"


def filled(described: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of all fields: those that were given, and the defaults of the others.

    Args:
        described: Dataclass whose fields are made by `option`.
        given: Values that were given, by the name of the field.
    """
    defaults = {
        one.name: one.metadata["default"]
        for one in dataclasses.fields(described)
        if one.name not in given
    }
    values = {name: None if callable(one) else one for name, one in defaults.items()} | {**given}
    for name, default in defaults.items():
        if callable(default):
            values[name] = default(values)
    return values


def refuse_senseless(described: type, values: Mapping[str, Any]) -> None:
    """Checks all values against the limits of their fields.

    Args:
        described: Dataclass whose fields are made by `option`.
        values: Values of the fields, by name.

    Raises:
        UserError: A value makes no sense.
    """
    for one in dataclasses.fields(described):
        value, limits = values[one.name], one.metadata["limits"]
        if value is not None and limits is not None and not limits[0](value):
            raise UserError(
                f"{option_of(one.name)} {value} does not make sense: it must be {limits[1]}"
            )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns a question that names what is closest to a word, or nothing if nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f": did you mean {close[0]}?" if close else ""


class Help(argparse.RawDescriptionHelpFormatter):
    """Breaks the lines of the help between words only: never within the name of an option."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """A parser that raises `UserError` instead of leaving the process."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Reads a command line, and names options that are close to one that is not known."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
            known = [name for action in shown for name in action.option_strings]
            hint = next(filter(None, (did_you_mean(one, known) for one in options)), "")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            choices = [str(one) for one in action.choices or ()]
            error.message += did_you_mean(str(value), choices)
            raise

    def error(self, message: str) -> NoReturn:
        """Raises UserError with the message of argparse."""
        raise UserError(f"{message} (see --help)")


def views_from(text: str) -> int | str:
    """Reads the value of `--views`: a number, or a word."""
    return int(text) if text.isdecimal() else text


def refuse_views(views: int | str | None) -> None:
    """Checks the value of `--views`.

    Args:
        views: Number of views, a word, or None if the option was not given.

    Raises:
        UserError: It is no number of views.
    """
    if views is not None and views != FLIPS and (isinstance(views, str) or views < 1):
        raise UserError(f"--views {views} does not make sense: it must be 1 or more, or flips")
