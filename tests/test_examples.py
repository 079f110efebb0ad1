"""The examples, as somebody runs them who has just cloned this."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cachefreeze.device import has_bf16

ROOT = Path(__file__).parents[1]
ROWS, TRAIN = 1797, 1408  # of digits, and those of freezeout.py's full batches


class Example:
    """An example in a process of its own."""

    def __init__(self, name: str, folder: Path, *options: object) -> None:
        command = [sys.executable, f"examples/{name}.py", "--cache-dir", folder / "cache", *options]
        self.printed = ""
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True
        )

    def numbers(self, pattern: str) -> list[int]:
        """What it prints in the place of the group, in order."""
        return [int(found) for found in re.findall(pattern, self.printed)]

    @property
    def weights(self) -> list[str]:
        return re.findall(r"^weights ([0-9a-f]{16})$", self.printed, re.MULTILINE)

    def finish(self) -> "Example":
        self.printed, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0
        return self


def both(name: str, folder: Path, *options: object) -> Example:
    """The example with the cache, which ends with the weights that it has without one."""
    without = Example(name, folder / "without", "--no-cache", *options)
    cached = Example(name, folder, *options).finish()
    without.finish()
    assert cached.weights
    assert cached.weights == without.weights
    assert set(without.numbers(r"(\d+) rows from the cache")) == {0}
    assert not (folder / "without").exists()
    assert (folder / "cache").is_dir()
    return cached


@pytest.mark.skipif(
    not has_bf16(torch.device("cpu")), reason="this processor has no bfloat16 instructions"
)
def test_freezeout_killed_and_resumed_ends_as_it_would_have_ended(tmp_path: Path) -> None:
    checkpoint, other = tmp_path / "last.pt", tmp_path / "without.pt"
    without = Example("freezeout", tmp_path / "without", "--no-cache", "--checkpoint", other)
    killed = Example("freezeout", tmp_path, "--checkpoint", checkpoint)
    assert killed.process.stdout is not None
    for line in killed.process.stdout:
        killed.printed += line
        if line.startswith("epoch  4"):
            killed.process.kill()
            break
    killed.process.communicate()
    resumed = Example("freezeout", tmp_path, "--checkpoint", checkpoint, "--resume").finish()
    without.finish()
    assert resumed.weights
    assert resumed.weights == without.weights

    served, per_epoch = r"(\d+) rows from the cache", TRAIN + ROWS // 5
    assert set(without.numbers(served)) == {0}
    # The first unit freezes in the second epoch.
    assert killed.numbers(served) == [0, 0, per_epoch, 2 * per_epoch]
    epochs = resumed.numbers(r"epoch +(\d+) ")
    assert epochs[0] in (5, 6)  # it may have come to the end of one more
    # The store that the checkpoint names serves at once.
    assert resumed.numbers(served) == [per_epoch * (i + 1) for i in range(len(epochs))]
    assert resumed.numbers(r"frozen (\d)/4")[-1] == 3
