"""The examples, as a newcomer runs them, and with their one line taken out."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.programs import Programs, warm

from .programs import ROOT, assert_the_line_changes_nothing

# Each with the packages that it needs, and the share of the rows that must be served.
EXAMPLES: dict[str, tuple[list[str], float]] = {
    "own_loop": ([], 0.6),
    "segmentation": ([], 0.6),
    "distillation": ([], 0.6),
    "hugging_face": (["transformers", "accelerate"], 0.5),
    "lightning_probe": (["lightning"], 0.5),
    "lora": (["transformers", "peft", "accelerate"], 0.5),
    "diffusion": (["diffusers"], 0.6),
    "preference": (["transformers"], 0.5),
}
LIBRARIES = (
    "transformers.trainer", "transformers.models.bert", "transformers.models.llama", "accelerate",
    "lightning", "peft", "diffusers", "sklearn.datasets",
)  # fmt: skip


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    with warm(*LIBRARIES) as server:
        yield server


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_ends_with_the_weights_that_it_has_without_its_one_line(
    programs: Programs, name: str, tmp_path: Path
) -> None:
    packages, share = EXAMPLES[name]
    assert_the_line_changes_nothing(programs, f"examples/{name}.py", packages, share, tmp_path)


def test_the_teacher_of_the_example_runs_once_for_each_view(programs: Programs) -> None:
    printed = programs.run(ROOT / "examples/views.py", timeout=600).stdout
    served = re.findall(r"(\d+) of 256 rows served", printed)
    assert list(map(int, served[:3])) == [0, 0, 0]
    assert list(map(int, served[-3:])) == [256, 256, 256]


def test_the_backbone_of_a_sweep_runs_in_the_first_trial_only(programs: Programs) -> None:
    pytest.importorskip("optuna")
    printed = programs.run(ROOT / "examples/sweep.py", timeout=600).stdout
    served = list(map(int, printed.rpartition(":")[2].split()))
    assert len(served) == 10
    # In the others, a few batches are compared.
    assert all(one >= 512 for one in served[1:])


def test_rows_that_workers_of_ray_have_filled_are_found_by_a_training_run(
    programs: Programs,
) -> None:
    pytest.importorskip("ray")
    printed = programs.run(ROOT / "examples/fill_with_ray.py", timeout=600).stdout
    served = list(map(int, re.findall(r"(\d+) of 640 rows served", printed)))
    # One batch is followed, and two are compared: at once, and as the sixteenth that is served.
    assert served == [640 - 3 * 32, 640]
