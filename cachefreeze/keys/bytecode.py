"""Names that compiled Python code uses, and versions of packages."""

import dis
import functools
import itertools
import sys
import types
from collections.abc import Iterator
from importlib import metadata
from typing import Any

# Packages whose code does not change as long as their version does not.
_BY_VERSION = ("torch", "torchvision", "numpy", "PIL", "scipy", "sklearn", "pandas")


def content(cell: Any, empty: Any = None) -> Any:
    """Returns the value that a closure cell holds.

    Args:
        cell: Cell of a function's `__closure__`.
        empty: Value that is returned for an empty cell.
    """
    try:
        return cell.cell_contents
    except ValueError:
        return empty


def names(code: types.CodeType) -> list[str]:
    """Returns the names of all globals and attributes that code uses."""
    return list(dict.fromkeys(name for one in codes(code) for name in one.co_names))


@functools.lru_cache(2000)
def globals_of(code: types.CodeType) -> list[str]:
    """Returns the names of the globals that code reads."""
    found = (dis.get_instructions(one) for one in codes(code))
    steps = itertools.chain.from_iterable(found)
    return list(dict.fromkeys(one.argval for one in steps if one.opname in _OF_GLOBALS))


_OF_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME")


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yields a code object and those inside it: inner functions, lambdas, comprehensions."""
    yield code
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from codes(one)


def is_foreign(where: str | None) -> bool:
    """Returns whether a module belongs to Python or a package that is identified by its version."""
    root = (where or "").partition(".")[0]
    return root in _BY_VERSION or (root in sys.stdlib_module_names and root != "__main__")


@functools.cache
def version(where: str | None) -> str:
    """Returns the version of the package that a module belongs to.

    Returns:
        Version, or an empty string if the package has none or comes with Python.
    """
    root = (where or "").partition(".")[0]
    if root in sys.stdlib_module_names or not root:
        return ""
    module = sys.modules.get(root)
    found = getattr(module, "__version__", None)
    if isinstance(found, str):
        return found
    try:
        return metadata.version("pillow" if root == "PIL" else root)
    except metadata.PackageNotFoundError:
        return ""
