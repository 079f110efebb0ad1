"""scripts/measure_gpu.py on tiny networks: all cases are measured, and no result is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "measure_gpu.py"
CASES = {
    "resnet50_head", "vit_b16_head", "bert_last_2", "llama_lora", "vit_s14_heads", "wrn_freezeout",
    "densenet_freezeout", "resnet50_loader", "resnet50_channels_last", "resnet50_fp16",
    "llama_lora_offloaded",
}  # fmt: skip


def start(out: Path, *options: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--tiny", "--repeats", "1", *options]
    return subprocess.Popen(
        command, cwd=SCRIPT.parent, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(out: Path, *options: str) -> tuple[int, str, str]:
    process = start(out, *options)
    said, errors = process.communicate(timeout=1500)
    return process.returncode, said, errors


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_every_case_is_measured_and_ends_in_the_weights_of_the_plain_loop(tmp_path: Path) -> None:
    code, said, errors = run(tmp_path / "out", "--minutes", "30", "--no-tests")
    assert code == 0, said + errors
    cases = results(tmp_path / "out")["cases"]
    assert set(cases) == CASES
    for name, case in cases.items():
        assert case["status"] == "measured", (name, case)
        assert case["weights"]["equal"], (name, case["weights"])
        assert case["weights"]["rows_served"] > 0, (name, case["weights"])
        assert case["ratio_later"] > 0
        counted = case["counted"]
        assert counted["keys_seconds"] > 0
        assert counted["gather"]["rows_per_second"] > 0
        if "freezeout" not in name:
            assert counted["served_of_an_epoch"] == case["rows"], name
        assert not [part for part in case.values() if "failed" in str(part)], name
        assert f"\n{name} " in said, "the table has a line for each case"
    table = (tmp_path / "out" / "table.txt").read_text()
    assert table in said
    assert "say nothing about a GPU" in table


def test_a_signal_keeps_what_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "out"
    only = ("bert_last_2", "densenet_freezeout", "wrn_freezeout")
    process = start(out, "--minutes", "30", "--no-tests", "--only", *only)
    assert process.stdout is not None
    first = process.stdout.readline()  # a case has ended
    assert first.startswith("bert_last_2: "), first
    time.sleep(0.5)  # the next one has begun
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    found = results(out)
    assert found["stopped"] == "SIGTERM"
    assert found["cases"]["bert_last_2"]["status"] == "measured"
    assert found["cases"]["bert_last_2"]["weights"]["equal"]
    assert found["cases"]["densenet_freezeout"]["status"] in ("cut", "left out")
    assert "\nbert_last_2 " in said


def test_an_image_that_cannot_be_read_ends_no_more_than_the_cases_with_images(
    tmp_path: Path,
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    options = ("--images", str(tmp_path / "images"), "--only", "resnet50_head", "bert_last_2")
    code, said, _ = run(tmp_path / "out", "--minutes", "30", "--no-tests", *options)
    assert code == 1
    cases = results(tmp_path / "out")["cases"]
    assert cases["resnet50_head"]["status"] == "failed"
    assert "broken.jpg" in cases["resnet50_head"]["why"]
    assert any("read_images" in line for line in cases["resnet50_head"]["traceback"])
    assert cases["bert_last_2"]["status"] == "measured"
    assert "broken.jpg" in said


def test_it_ends_in_time_and_says_what_was_left_out(tmp_path: Path) -> None:
    code, said, _ = run(tmp_path / "out", "--minutes", "0.1", "--no-tests")
    assert code == 1
    assert set(results(tmp_path / "out")["cases"]) == CASES
    assert "no time was left" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--minutes", "0"), "--minutes"),
        (("--only", "nothing"), "there is no case nothing"),
        (("--images", "nowhere"), "there is no folder nowhere"),
    ],
)
def test_bad_options_are_told_in_a_sentence(
    tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    code, _, errors = run(tmp_path / "out", *options)
    assert code == 2
    assert errors.startswith("error: ")
    assert words in errors
    assert errors.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, errors = run(tmp_path / "file" / "out")
    assert code == 2
    assert "cannot write to" in errors
    assert errors.count("\n") == 1
