"""Rows are copied between folders and object stores, which the script lists, checks and prunes."""

import logging
import runpy
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import cachefreeze
from cachefreeze import UserError
from cachefreeze.store.inspect_objects import inspect_objects, verify_objects
from cachefreeze.train import main
from tests.store.harness import read_again, segments
from tests.store.harness import write as write_folder
from tests.support.object_server import Proxy, ask

from .harness import found, write

SCRIPT = Path(__file__).parents[2] / "scripts" / "cache_stats.py"
pytestmark = pytest.mark.usefixtures("small_chunks")


def places(url: str, tmp_path: Path) -> dict[str, str | Path]:
    return {
        "folder": tmp_path / "folder",
        "s3": url,
        "memory": f"memory://{uuid.uuid4()}",
        "file": f"file://{tmp_path}/objects",
    }


@pytest.mark.parametrize("source", ["folder", "s3"])
@pytest.mark.parametrize("target", ["folder", "s3", "memory", "file"])
def test_rows_are_copied_between_any_two(
    url: str, proxy: Proxy, tmp_path: Path, source: str, target: str
) -> None:
    one = places(f"{url}/one", tmp_path / "one")[source]
    other = places(f"{url}/two", tmp_path / "two")[target]
    if isinstance(one, Path):
        write_folder(one, np.arange(60))
    else:
        write(one, tmp_path / "a", np.arange(60))
    assert cachefreeze.copy(one, other) == 60
    assert cachefreeze.copy(one, other) == 0, "nothing is copied twice"
    if isinstance(other, Path):
        assert read_again(other, 60) == (60, [])
    else:
        assert found(other, tmp_path / "b", 60) == (60, [])
    proxy.requests.clear()  # copies list


def test_a_damaged_chunk_is_not_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path / "a", np.arange(40))
    (folder,) = segments(tmp_path / "a")
    (folder / "values" / "c.1.0.0").write_bytes(b"x")
    url = f"memory://{uuid.uuid4()}"
    with caplog.at_level(logging.WARNING, "cachefreeze"):
        assert cachefreeze.copy(tmp_path / "a", url) == 32
    assert "values/c.1.0.0" in caplog.text
    assert found(url, tmp_path / "b", 40, 1) == (32, [])
    assert list(verify_objects(url)) == [], "the damage was left behind"
    assert inspect_objects(url)[0].rows == 32
    assert cachefreeze.copy(url, tmp_path / "c") == 32
    assert read_again(tmp_path / "c", 40) == (32, [])


def test_what_cannot_be_copied_is_one_sentence(tmp_path: Path) -> None:
    for source, target, words in [
        (tmp_path, tmp_path / "b", "no activations"),
        ("memory://nothing-there", tmp_path / "b", "no activations"),
        ("s3://", tmp_path / "b", "names no bucket"),
        (tmp_path, tmp_path, "give another target"),
    ]:
        with pytest.raises(UserError, match=words):
            cachefreeze.copy(source, target)


@pytest.fixture
def stats(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    look = runpy.run_path(str(SCRIPT))["main"]

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
        code = look()
        return code, *capsys.readouterr()

    return run


def test_the_script_lists_checks_and_prunes(
    url: str, server: int, proxy: Proxy, tmp_path: Path, stats: Callable
) -> None:
    write(url, tmp_path / "a", np.arange(40))
    write(url, tmp_path / "a", np.arange(40, 60))
    (values,) = [path for _, path in proxy.requests if path.endswith("values/c.4.0.0")]
    code, out, _ = stats(url, "--verify")
    assert code == 0
    assert f"1 set of 60 rows in {url}" in out
    assert "verified" in out
    ask(server, "PUT", values, b"x")
    code, out, _ = stats(url, "--verify")
    assert code == 1
    assert "values/c.4.0.0 has 1 bytes" in out
    code, out, _ = stats(url, "--prune", "1")
    assert "removed: 0 B in all" in out
    code, out, _ = stats(url, "--prune", "0")
    assert (code, "removed: 60 rows" in out, "no rows in" in out) == (0, True, True)
    assert found(url, tmp_path / "b", 60, 0) == (0, [])
    write(url, tmp_path / "b", np.arange(10))
    assert found(url, tmp_path / "c", 10) == (10, [])
    proxy.requests.clear()  # the script lists


def test_what_the_script_cannot_open_is_one_line(url: str, proxy: Proxy, stats: Callable) -> None:
    for one, words in [(url, "no activations"), ("s3://", "names no bucket")]:
        code, out, err = stats(one)
        assert (code, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1
    proxy.fail("503")
    assert stats(url)[0] == 2


@pytest.mark.parametrize("folder", ["s3://bucket/x", "s3:/bucket/x"])
def test_the_program_for_training_takes_folders_only(
    folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--dataset", "digits", "--cache-dir", folder]) == 2
    assert "keeps rows in a folder, not at a URL" in capsys.readouterr().err
    assert not list(tmp_path.glob("s3*"))
