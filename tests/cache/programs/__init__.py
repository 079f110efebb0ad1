"""Programs of other people's, each in a process, with the cache and with its one line taken out."""

import importlib.util
import re
from pathlib import Path

import pytest

from tests.support.programs import Programs

ROOT = Path(__file__).parents[3]


def assert_the_line_changes_nothing(
    programs: Programs, name: str, packages: list[str], share: float, folder: Path
) -> None:
    """Runs a program as it is, and with the one line taken out, and compares the weights.

    Args:
        programs: Processes to run it in.
        name: Path of the program from the project's root.
        packages: Packages that it needs.
        share: Share of the rows that must be served.
        folder: Empty folder.
    """
    if missing := [one for one in packages if importlib.util.find_spec(one) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    text = (ROOT / name).read_text()
    assert len(re.findall(r"ActivationCache\(", text)) == 1
    without = folder / "without.py"
    without.write_text(re.sub(r"^ *(cache = |print\(cache).*\n", "", text, flags=re.MULTILINE))
    plain, cached = (programs.run(path, timeout=600) for path in (without, ROOT / name))
    assert (plain.code, cached.code) == (0, 0), plain.stderr[-2000:] + cached.stderr[-2000:]
    weights = re.findall(r"^weights (.*)$", cached.stdout, re.MULTILINE)
    assert weights
    assert weights == re.findall(r"^weights (.*)$", plain.stdout, re.MULTILINE)
    served = re.findall(r"rows served \((\d+)%\)", cached.stdout)
    assert int(served[0]) >= 100 * share, cached.stdout
