"""Programs of other people's, each in a process, with the cache and with its one line taken out."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(path: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def assert_the_line_changes_nothing(
    name: str, packages: list[str], share: float, folder: Path
) -> None:
    """Runs a program as it is, and with the one line taken out, and compares the weights.

    Args:
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
    plain, cached = run(without), run(ROOT / name)
    weights = re.findall(r"^weights (.*)$", cached, re.MULTILINE)
    assert weights
    assert weights == re.findall(r"^weights (.*)$", plain, re.MULTILINE)
    served = re.findall(r"rows served \((\d+)%\)", cached)
    assert int(served[0]) >= 100 * share, cached
