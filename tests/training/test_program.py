"""`python -m cachefreeze.train`: its files, its words, and how it ends."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cachefreeze.cache import selection
from cachefreeze.data import InputRows, load
from cachefreeze.data import images as images_of
from cachefreeze.models import build
from cachefreeze.train import main
from cachefreeze.training.checkpoint import load_checkpoint
from tests.conftest import Train
from tests.support.programs import Programs
from tests.training.harness import SHORT
from tests.training.test_parity import assert_same_run


def test_a_run_leaves_settings_metrics_summary_and_weights(train: Train) -> None:
    run = train(*SHORT, "--lr", 0.05, "--report")
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "args.json",
        "best.pt",
        "last.pt",
        "metrics.csv",
        "metrics.jsonl",
        "previous.pt",
        "report.html",
        "summary.json",
    ]
    assert run.args["lr"] == 0.05
    assert run.args["t0"] == 0.2
    assert run.args["network"] == "wrn10_1"

    assert [line["epoch"] for line in run.metrics] == [1, 2, 3, 4]
    for line in run.metrics:
        assert line["step"] == 5 * line["epoch"]
        assert len(line["lr"]) == 5
        assert 0 <= line["val_accuracy"] <= 1
        assert line["train_loss"] > 0
        assert line["val_loss"] > 0
        assert line["seconds"] > 0
        assert line["images_per_second"] == pytest.approx(5 * 32 / line["train_seconds"])
    last = run.metrics[-1]
    assert last["frozen_units"] == 4
    assert [rate == 0 for rate in last["lr"]] == [True] * 5

    summary = run.summary
    assert summary["epochs"] == 4
    assert summary["steps"] == 20
    assert summary["val_accuracy"] == last["val_accuracy"]
    assert summary["best_val_accuracy"] == max(line["val_accuracy"] for line in run.metrics)
    assert summary["train_loss"] == last["train_loss"]
    assert summary["frozen_units"] == 4
    assert len(summary["weights_sha256"]) == 64
    parts = [summary[f"{part}_seconds"] for part in ("train", "fill", "validate", "checkpoint")]
    assert all(part > 0 for part in parts)
    assert sum(parts) <= summary["wall_seconds"]

    cache = summary["cache"]
    assert cache["enabled"]
    assert cache["directory"] == run.args["cache_dir"]
    assert [fill["step"] for fill in cache["fills"]] == [4, 8, 12]
    assert [fill["unit"] for fill in cache["fills"]] == ["stem", "group1_block1", "group2_block1"]
    assert all(fill["rows"] == 150 for fill in cache["fills"])
    assert cache["rows_kept"] >= 150
    assert cache["bytes"] > 150 * 16 * 16 * 16 * 4
    assert cache["rows_served"] == sum(line["rows_served"] for line in run.metrics) > 0
    # Every batch is full, and what is computed to keep all rows is told as seconds of filling.
    assert max(line["rows_served"] + line["rows_computed"] for line in run.metrics) == 7 * 32
    assert list(Path(cache["directory"]).iterdir())


def test_no_freeze_trains_everything_on_one_cosine(train: Train) -> None:
    run = train("--arch", "wrn10_1", "--epochs", 2, "--no-freeze")
    assert run.summary["frozen_units"] == 0
    assert run.summary["cache"]["fills"] == []
    assert run.summary["cache"]["messages"] == []
    assert run.metrics[0]["lr"] == pytest.approx([0.05] * 5)
    assert len(set(run.metrics[0]["lr"])) == 1


def test_a_cache_that_held_nothing_says_why(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("--arch", "wrn10_1", "--epochs", 1)
    assert run.summary["frozen_units"] == 3
    assert run.summary["cache"]["fills"] == []
    assert "no row came from it" in capsys.readouterr().out


def test_augmentation_switches_the_cache_off_and_says_so(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("--augment", *SHORT)
    assert not run.summary["cache"]["enabled"]
    assert run.summary["frozen_units"] == 4
    assert "off: augmented pixels are new in every epoch" in capsys.readouterr().out
    plain = train("--no-cache", *SHORT)
    assert run.summary["weights_sha256"] != plain.summary["weights_sha256"]


@pytest.mark.parametrize("views", [2, "flips"])
def test_views_of_augmented_images_are_kept_and_change_no_bit(
    train: Train, views: int | str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--augment", "--views", views, *SHORT)
    run, plain = train(*words), train("--no-cache", *words)
    assert run.summary["cache"]["enabled"]
    assert run.summary["weights_sha256"] == plain.summary["weights_sha256"]
    assert sum(line["rows_served"] for line in run.metrics) > 0
    assert "of each image" in " ".join(capsys.readouterr().out.split())


def test_its_words_say_what_happened_and_what_to_type_next(
    train: Train,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = train(*SHORT)
    captured = capsys.readouterr()
    assert captured.err == "", "bars are for terminals"
    lines = captured.out.splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 4
    assert "frozen 4/5" in epochs[-1]
    assert re.search(r"\d+% cached$", epochs[-1])
    told = [line for line in lines if "-m cachefreeze" not in line and tmp_path.name not in line]
    assert max(map(len, told)) <= 80
    assert any("step 4: kept 150 rows after stem in " in line for line in lines)
    text = captured.out
    assert f"{run.summary['val_accuracy']:.2%}" in text
    assert run.summary["cache"]["directory"] in text
    assert str(run.folder) in text
    assert "scripts/cache_stats.py" in text
    (command,) = [line for line in lines if line.endswith("--no-cache")]
    assert main(shlex.split(command)[3:]) == 0, "the command that it says to type next works"


def test_what_the_cache_says_is_told_once_and_as_a_warning(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "LEAST_SHARE", 1.0)  # it says that less than that is frozen
    run = train(*SHORT, "--dropout", 0.1)
    captured = capsys.readouterr()
    assert run.summary["cache"]["messages"]
    out = re.sub(r"\n +", " ", captured.out)
    told = [out.count(sentence) for sentence in run.summary["cache"]["messages"]]
    assert set(told) == {1}
    assert captured.err == ""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_runs_leave_no_files_and_maps_open(train: Train) -> None:
    def open_now() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text().count("/cache/")
        return len(os.listdir("/proc/self/fd")), maps

    train(*SHORT)
    before = open_now()
    for _ in range(3):
        train(*SHORT)
    assert open_now() == before


def test_with_the_cache_image_files_are_decoded_once(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []
    real = images_of.decode_image

    def counted(path: Path, size: int) -> Any:
        decoded.append(path)
        return real(path, size)

    monkeypatch.setattr(images_of, "decode_image", counted)
    cached = train(*SHORT)
    # All once for their mean and once for training; the epoch in which units freeze, and rows are
    # kept, was on its way already.
    assert len(decoded) <= 2 * (150 + 33) + 2 + 32
    decoded.clear()
    plain = train(*SHORT, "--no-cache")
    assert len(decoded) == 150 + 33 + 4 * (5 * 32 + 2 * 32)
    assert_same_run(cached, plain)


def test_a_checkpoint_loads_without_running_code(train: Train) -> None:
    run = train(*SHORT)
    state = load_checkpoint(run.folder / "last.pt")
    assert state["epoch"] == 4
    assert len(state["optimizer"]["param_groups"]) == 5
    assert state["scheduler"]["last_epoch"] == 20
    assert state["settings"]["arch"] == "wrn"


def test_the_accuracy_is_that_of_the_saved_weights_in_eval_mode(train: Train, images: Path) -> None:
    run = train(*SHORT, "--dropout", 0.5)
    model = build("wrn", 3, depth=10, width=1, dropout=0.5).eval()
    model.load_state_dict(load_checkpoint(run.folder / "last.pt")["model"])
    data = load(
        "imagefolder",
        images,
        image_size=32,
        val_fraction=None,
        workers=0,
        bar=lambda batches, total: batches,
    )
    x = next(InputRows(data.val, data.mean, data.std, torch.device("cpu")).batches([np.arange(33)]))
    with torch.no_grad():
        logits = model(x)
    accuracy = (logits.argmax(1) == data.val.labels).double().mean().item()
    loss = torch.nn.functional.cross_entropy(logits, data.val.labels).item()
    assert run.summary["val_accuracy"] == pytest.approx(accuracy)
    assert run.metrics[-1]["val_loss"] == pytest.approx(loss, rel=1e-4)


def test_cifar_is_read_from_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published format with a few random images; only the published checksums are replaced."""
    import hashlib
    import pickle

    from torchvision import datasets

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)

    def write(name: str, content: object) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    planes = {
        name: random.integers(0, 256, (4, 3, 32, 32), np.uint8)
        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
    }
    listed = [
        write(name, {"data": pixels.reshape(4, -1), "labels": [0, 1, 2, 3]})
        for name, pixels in planes.items()
    ]
    meta = write("batches.meta", {"label_names": [str(number) for number in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", listed[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", listed[5:])
    monkeypatch.setattr(
        datasets.CIFAR10,
        "meta",
        {"filename": meta[0], "key": "label_names", "md5": meta[1]},
    )
    data = load(
        "cifar10", tmp_path, image_size=32, val_fraction=None, workers=0, bar=lambda b, total: b
    )
    assert (len(data.train), len(data.val), len(data.classes)) == (20, 4, 10)
    image = next(iter(data.train.decode([np.array([5])])))[0]
    assert np.array_equal(image.permute(2, 0, 1).numpy(), planes["data_batch_2"][1])
    assert data.train.labels.tolist() == [0, 1, 2, 3] * 5


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("cachefreeze.training.run.make_network", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["--output-dir", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache")])


def test_the_program_runs_as_a_module_and_returns_its_exit_code(
    tmp_path: Path, programs: Programs
) -> None:
    bad = programs.run("cachefreeze.train", "--arch", "resnet", cwd=tmp_path)
    assert bad.code == 2
    assert bad.stderr.count("\n") == 1
    options = ("--arch", "wrn10_1", "--epochs", "1", "-b", "256")
    good = programs.run("cachefreeze.train", *options, cwd=tmp_path)
    assert good.code == 0
    assert good.stderr == ""
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "summary.json").exists()
