"""Runs that share a cache folder, and processes that die in it."""

import json
import threading
from pathlib import Path

import pytest

from tests.chaos.harness import NETWORKS, SCHEDULE, Nursery, results


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_two_runs_at_once_share_rows_and_take_none_from_each_other(
    images: Path, tmp_path: Path, seeds: tuple[int, int]
) -> None:
    options = [*NETWORKS["wrn"], *SCHEDULE, "--dataset", "imagefolder", "--data-dir", str(images)]
    options += ["--image-size", "32"]

    def run(nursery: Nursery, name: str, seed: int, *more: str) -> None:
        argv = [*options, "--seed", str(seed), "--output-dir", str(tmp_path / name), *more]
        codes[name] = nursery.live(argv, tmp_path / f"{name}.log")

    codes: dict[str, int] = {}
    with Nursery() as one, Nursery() as other:
        threads = [
            threading.Thread(
                target=run, args=(nursery, name, seed, "--cache-dir", str(tmp_path / "c"))
            )
            for nursery, name, seed in zip((one, other), ("one", "other"), seeds, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, seed in zip(("one", "other"), seeds, strict=True):
            run(one, f"plain {name}", seed, "--no-cache")
    assert set(codes.values()) == {0}
    served = 0
    for name in ("one", "other"):
        assert results(tmp_path / name) == results(tmp_path / f"plain {name}")
        told = (tmp_path / f"{name}.log").read_text()
        assert "cannot be read" not in told
        assert "damaged" not in told
        served += json.loads((tmp_path / name / "summary.json").read_text())["cache"]["rows_served"]
    assert served > 150
