"""The examples, as somebody runs them who has just cloned this."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cachefreeze.training.device import has_bf16

ROOT = Path(__file__).parents[1]
ROWS = 1797  # of digits


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


@pytest.mark.skipif(
    not has_bf16(torch.device("cpu")), reason="this processor has no bfloat16 instructions"
)
def test_freezeout_killed_and_resumed_ends_as_it_would_have_ended(tmp_path: Path) -> None:
    checkpoint, other, copy = (tmp_path / f"{name}.pt" for name in ("last", "other", "copy"))
    without = Example("freezeout", tmp_path / "without", "--no-cache", "--checkpoint", other)
    killed = Example("freezeout", tmp_path, "--checkpoint", checkpoint)
    assert killed.process.stdout is not None
    for line in killed.process.stdout:
        killed.printed += line
        if line.startswith("epoch  5"):
            killed.process.kill()
            break
    killed.process.communicate()
    # What is needed to go on is in the checkpoint, and nothing of the cache is.
    shutil.copy(checkpoint, copy)
    state = torch.load(copy, weights_only=True)
    assert state.keys() == {"model", "optimizer", "scheduler", "epochs"}
    uncached = Example(
        "freezeout", tmp_path / "without", "--no-cache", "--checkpoint", copy, "--resume"
    )
    resumed = Example("freezeout", tmp_path, "--checkpoint", checkpoint, "--resume").finish()
    without.finish()
    uncached.finish()
    assert resumed.weights
    assert resumed.weights == without.weights == uncached.weights

    served = r"(\d+) rows from the cache"
    assert set(without.numbers(served)) == set(uncached.numbers(served)) == {0}
    # The first unit freezes in the second epoch.
    assert killed.numbers(served)[:2] == [0, 0]
    assert killed.numbers(served)[4] > ROWS
    epochs = resumed.numbers(r"epoch +(\d+) ")
    assert epochs[0] in (6, 7)  # it may have come to the end of one more
    # Rows on disk are served in the very first epoch, but for batches that are compared.
    assert resumed.numbers(served)[0] > ROWS / 2
    assert resumed.numbers(r"frozen (\d)/4")[-1] == 3
