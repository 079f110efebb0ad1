"""scripts/try_object_server.py tells what a server honours."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.object_server import BUCKET, ask, environment, free_port

SCRIPT = Path(__file__).parents[2] / "scripts" / "try_object_server.py"


def tried(port: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT, f"s3://{BUCKET}", "--rounds", "3"],
        env={**os.environ, **environment(port)},
        capture_output=True,
        text=True,
    )


def test_a_server_is_tried_and_left_empty(server: int) -> None:
    ran = tried(server)
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = [line.strip("| ").split(" | ") for line in ran.stdout.splitlines()]
    table = {line[0]: line[-1] for line in lines}
    assert table["put if absent, new object"] == "written"
    assert table["put if absent, object exists"] == "refused, old content is there"
    # This server looks first and writes then, so several may win.
    assert "won in" in table["put if absent, 8 at once, 3 times"]
    assert table["the content is that of one that won"] == "3 of 3"
    for run in ("first run", "second machine", "once more"):
        assert table[run].startswith("weights of the plain loop; ")
        assert "says" not in table[run]
    _, listed = ask(server, "GET", f"/{BUCKET}?prefix=try-")
    assert b"<ListBucketResult" in listed
    assert b"<Key>" not in listed


def test_a_server_that_does_not_answer_is_one_sentence() -> None:
    ran = tried(free_port())
    assert ran.returncode == 2
    assert ran.stderr == f"s3://{BUCKET} does not work: the server cannot be reached\n"
