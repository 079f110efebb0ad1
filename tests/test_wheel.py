"""The wheel, installed into an empty folder and used far from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support.run_files import make_run

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
from pathlib import Path
import torch, cachefreeze
from cachefreeze.report.html_report import write_report

assert Path(cachefreeze.__file__).is_relative_to(sys.argv[1]), cachefreeze.__file__
layers = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
cachefreeze.freeze(layers[0])
model = torch.nn.Sequential(*layers)
with cachefreeze.ActivationCache(model, directory="cache"):
    model(torch.randn(8, 4)).sum().backward()
assert "torch._dynamo" not in sys.modules, "seconds in every process"
print(write_report(Path(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout: a build leaves files in the place."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(
        ROOT / "cachefreeze", source / "cachefreeze", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(folder)]
    subprocess.run(command, cwd=source, check=True, stdout=subprocess.DEVNULL)
    (built,) = folder.glob("cachefreeze-*.whl")
    return built


def test_a_wheel_holds_the_package_and_its_templates_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    here = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "cachefreeze").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in names if ".dist-info/" not in name} == here
    assert any(name.startswith("cachefreeze/report/templates/") for name in names)


def test_a_wheel_works_where_no_checkout_is(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:  # all that pip does with a wheel without scripts
        archive.extractall(installed)
    run = make_run(tmp_path / "run")
    # -S: nothing of this environment but the packages that the wheel asks for, so no editable
    # install of the checkout; -P: not the present folder either.
    packages = Path(torch.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(packages)])}
    command = [sys.executable, "-S", "-P", "-c", PROGRAM, str(installed), str(run.folder)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_text().startswith("<!DOCTYPE html>")
    assert json.loads((run.folder / "summary.json").read_text())
    assert (tmp_path / "cache" / "CACHEDIR.TAG").exists()
