"""Scripts of accelerate and Lightning in two processes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.programs import Programs, warm

from .loops import ROWS

PROCESSES = 2


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    with warm("accelerate", "lightning.pytorch") as server:
        yield server


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_scripts_of_other_libraries_end_with_the_weights_of_those_without_a_cache(
    programs: Programs, name: str, tmp_path: Path
) -> None:
    pytest.importorskip("lightning.pytorch" if name == "lightning" else name)
    done = programs.run("tests.distributed.libraries", name, str(tmp_path), timeout=120)
    assert done.code == 0, done.stderr[-3000:]
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    assert len({one[how]["weights"] for one in seen for how in ("plain", "cached")}) == 1
    # Rows go to other processes in each epoch, so few of them are known to one process alone.
    assert all(one["cached"]["served"] > ROWS / PROCESSES for one in seen), seen
