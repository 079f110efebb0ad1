"""The examples, as a newcomer runs them, and the same with their one line taken out."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each with the packages that it needs, and the share of the rows that must be served.
EXAMPLES = {
    "own_loop": ([], 0.6),
    "segmentation": ([], 0.6),
    "distillation": ([], 0.6),
    "hugging_face": (["transformers", "accelerate"], 0.5),
    "lightning_probe": (["lightning"], 0.5),
    "lora": (["transformers", "peft", "accelerate"], 0.5),
    "diffusion": (["diffusers"], 0.6),
}


def run(path: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_ends_with_the_weights_that_it_has_without_its_one_line(
    name: str, tmp_path: Path
) -> None:
    packages, share = EXAMPLES[name]
    if missing := [one for one in packages if importlib.util.find_spec(one) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert len(re.findall(r"ActivationCache\(", text)) == 1
    without = tmp_path / "without.py"
    without.write_text(re.sub(r"^(cache = |print\(cache).*\n", "", text, flags=re.MULTILINE))
    plain, cached = run(without), run(ROOT / "examples" / f"{name}.py")
    weights = re.findall(r"^weights (.*)$", cached, re.MULTILINE)
    assert weights
    assert weights == re.findall(r"^weights (.*)$", plain, re.MULTILINE)
    served = re.findall(r"rows served \((\d+)%\)", cached)
    assert int(served[0]) >= 100 * share, cached
