"""The examples and other trainers, each in a process, and with their one line taken out."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = "tests/cache/programs"
# Each with the packages that it needs, and the share of the rows that must be served.
EXAMPLES = {
    "examples/own_loop.py": ([], 0.6),
    "examples/segmentation.py": ([], 0.6),
    "examples/distillation.py": ([], 0.6),
    "examples/hugging_face.py": (["transformers", "accelerate"], 0.5),
    "examples/lightning_probe.py": (["lightning"], 0.5),
    "examples/lora.py": (["transformers", "peft", "accelerate"], 0.5),
    "examples/diffusion.py": (["diffusers"], 0.6),
    f"{PROGRAMS}/timm_style.py": (["timm"], 0.4),
    f"{PROGRAMS}/sentence_transformers_trainer.py": (["sentence_transformers", "datasets"], 0.5),
    f"{PROGRAMS}/two_processes.py": ([], 0.4),
}


def run(path: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_program_ends_with_the_weights_that_it_has_without_its_one_line(
    name: str, tmp_path: Path
) -> None:
    packages, share = EXAMPLES[name]
    if missing := [one for one in packages if importlib.util.find_spec(one) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    text = (ROOT / name).read_text()
    assert len(re.findall(r"ActivationCache\(", text)) == 1
    without = tmp_path / "without.py"
    without.write_text(re.sub(r"^ *(cache = |print\(cache).*\n", "", text, flags=re.MULTILINE))
    plain, cached = run(without), run(ROOT / name)
    weights = re.findall(r"^weights (.*)$", cached, re.MULTILINE)
    assert weights
    assert weights == re.findall(r"^weights (.*)$", plain, re.MULTILINE)
    served = re.findall(r"rows served \((\d+)%\)", cached)
    assert int(served[0]) >= 100 * share, cached
