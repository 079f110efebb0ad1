"""Checks the words of docstrings: `python scripts/check_words.py`.

The text of an argument or attribute is a noun phrase that is understood without its name. An error
is told in a sentence. A module's first line says what the module holds. Exit code 1: there are
texts that do not, which are printed with their places.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Folders whose modules are checked, without the folders in them.
FOLDERS = [
    "cachefreeze",
    "cachefreeze/cache",
    "cachefreeze/data",
    "cachefreeze/freezeout",
    "cachefreeze/integrations",
    "cachefreeze/keys",
    "cachefreeze/lineage",
    "cachefreeze/models",
    "cachefreeze/plan",
    "cachefreeze/probing",
    "cachefreeze/report",
    "cachefreeze/store",
    "cachefreeze/training",
    "scripts",
    "scripts/gpu_cases",
    "examples",
]
# Words that begin no noun phrase.
BEGIN_NONE = re.compile(
    r"(are|as|at|by|for|from|how|if|in|is|it|likewise|of|on|see|that|to|what|when|where|which|with)"
    r"(?![\w-])",
    re.IGNORECASE,
)
BEGIN_NO_MODULE = re.compile(r"(what|whether|of|that)\b", re.IGNORECASE)


def main() -> int:
    """Checks all folders; returns the exit code."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    found = [line for folder in FOLDERS for line in in_folder(ROOT / folder)]
    print("\n".join(found or ["words: all are as they should be"]))
    return 1 if found else 0


def in_folder(folder: Path) -> Iterator[str]:
    """Yields the place of each text that is not as it should be, and the text."""
    for path in sorted(folder.glob("*.py")):
        for line, text in faults(path.read_text()):
            yield f"{path.relative_to(ROOT)}:{line}: {text}"


def faults(source: str) -> Iterator[tuple[int, str]]:
    """Yields the number of each line of a module that is not as it should be, and the line."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node) is None:
            continue
        expression = node.body[0]
        assert isinstance(expression, ast.Expr)
        assert isinstance(expression.value, ast.Constant)
        lines = str(expression.value.value).splitlines()
        for number, line in _faults_of(lines, isinstance(node, ast.Module)):
            yield expression.lineno + number, line.strip()


def _faults_of(lines: list[str], is_module: bool) -> Iterator[tuple[int, str]]:
    if is_module and BEGIN_NO_MODULE.match(lines[0]):
        yield 0, lines[0]
    section, indent = "", 0
    for number, line in enumerate(lines):
        here = len(line) - len(line.lstrip())
        if heading := re.fullmatch(r"(Args|Attributes|Raises):", line.strip()):
            section, indent = heading[1], here
        elif line.strip() and here <= indent:
            section = ""
        elif section and here == indent + 4:
            entry = re.fullmatch(r"\*{0,2}[\w.]+: (.*)", line.strip())
            if entry is None or not _fits(entry[1], section):
                yield number, line


def _fits(text: str, section: str) -> bool:
    if section == "Raises":
        return text[:1].isupper()
    return re.match(r"[A-Z0-9`\"']", text) is not None and not BEGIN_NONE.match(text)


if __name__ == "__main__":
    sys.exit(main())
