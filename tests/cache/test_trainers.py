"""Other libraries' trainers, unmodified but for the one line, each in a process of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.programs import Programs, warm

from .programs import assert_the_line_changes_nothing

# Each with the packages that it needs, and the share of the rows that must be served.
TRAINERS: dict[str, tuple[list[str], float]] = {
    "timm_style": (["timm"], 0.4),
    "sentence_transformers_trainer": (["sentence_transformers", "datasets"], 0.5),
    "two_processes": ([], 0.4),
}


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    with warm("timm", "sentence_transformers", "datasets") as server:
        yield server


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_ends_with_the_weights_that_it_has_without_the_line(
    programs: Programs, name: str, tmp_path: Path
) -> None:
    packages, share = TRAINERS[name]
    program = f"tests/cache/programs/{name}.py"
    assert_the_line_changes_nothing(programs, program, packages, share, tmp_path)
