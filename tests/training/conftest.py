"""Fixtures of the tests of training."""

from pathlib import Path

import pytest

from tests.support.interrupter import command


@pytest.fixture
def argv(images: Path, tmp_path: Path) -> list[str]:
    """A run of the program in `tmp_path/run`."""
    return command(images, tmp_path, "wrn")
