"""Units that are frozen from the start, weights from elsewhere, rows that later runs find."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from cachefreeze.freezeout import count_of, units_of
from cachefreeze.models import build
from cachefreeze.train import main
from cachefreeze.training import command_line
from tests.chaos.harness import Nursery, results
from tests.conftest import Run, Train, write_images
from tests.training.test_parity import assert_same_run

Fails = Callable[..., str]
RESNET = ("--arch", "torchvision:resnet18", "--epochs", 3, "--lr", 0.02)
ROWS = 150 + 33


def cache_of(run: Run) -> dict[str, Any]:
    cache: dict[str, Any] = run.summary["cache"]
    return cache


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_a_frozen_backbone_is_run_once_and_by_the_next_run_not_at_all(
    train: Train, precision: str
) -> None:
    options = (*RESNET, "--freeze-first", "layer4.0", "--precision", precision)
    plain = train(*options, "--no-cache")
    first = train(*options)
    assert_same_run(first, plain)
    # Some batches of each split are compared before any is served.
    assert cache_of(first)["rows_served"] > 150
    assert cache_of(first)["rows_kept"] >= ROWS
    assert {line["frozen_units"] for line in first.metrics} == {8}
    again = train(*options, "--lr", 0.01)
    assert again.metrics[0]["rows_served"] > 0, "rows of the first run are found"
    assert cache_of(again)["rows_served"] > cache_of(first)["rows_served"]
    assert cache_of(again)["fills"] == []
    assert_same_run(again, train(*options, "--lr", 0.01, "--no-cache"))


def test_the_frozen_part_is_as_it_was_and_the_rest_trains(train: Train) -> None:
    run = train(*RESNET, "--freeze-first", -2)
    torch.manual_seed(0)
    before = build("torchvision:resnet18", 3, image_size=32).state_dict()
    after = torch.load(run.folder / "last.pt", weights_only=True)["model"]
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if not name.startswith(("layer4.1", "fc"))} == same


def test_the_others_freeze_by_freezeout_if_it_is_asked_for(train: Train) -> None:
    options = ("--arch", "wrn16_1", "--freeze-first", 3, "--epochs", 6)
    options += ("--schedule", "linear", "--t0", 0.3)
    cached, plain = train(*options), train(*options, "--no-cache")
    assert_same_run(cached, plain)
    frozen = [line["frozen_units"] for line in cached.metrics]
    assert frozen[0] == 3
    # Of the other five the first freezes at 0.3 of the run, as the first of five does.
    assert frozen[1] == 4
    assert frozen[-1] == 7
    rates = cached.metrics[0]["lr"]
    assert rates[:3] == [0.0, 0.0, 0.0]
    assert rates[3] > rates[7] > 0


def test_without_a_schedule_the_others_train_to_the_end(train: Train) -> None:
    run = train("--arch", "wrn10_1", "--freeze-first", "group1_block1", "--epochs", 3)
    assert [line["frozen_units"] for line in run.metrics] == [2, 2, 2]
    assert len(set(run.metrics[-1]["lr"][2:])) == 1


def test_an_interrupted_fine_tuning_goes_on_with_its_rows(
    train: Train, images: Path, tmp_path: Path
) -> None:
    options = [*map(str, RESNET), "--freeze-first", "layer4.0", "-b", "32", "-j", "0"]
    options += ["--precision", "fp32", "--dataset", "imagefolder", "--data-dir", str(images)]
    options += ["--image-size", "32", "--cache-dir", str(tmp_path / "cache")]
    folder = tmp_path / "cut"
    with Nursery() as nursery:
        log = tmp_path / "log"
        argv = [*options, "--checkpoint-every", "2", "--output-dir", str(folder)]
        assert nursery.live(argv, log, point="checkpoint", count=4) < 0
        assert nursery.live(["--resume", str(folder)], log) == 0
    assert results(folder) == results(train(*options, "--no-cache").folder)
    assert json.loads((folder / "summary.json").read_text())["resumed_at"]


def test_weights_of_a_run_start_another_with_a_head_of_its_own(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train("--arch", "wrn10_1", "--epochs", 2)
    write_images(tmp_path / "other" / "train", 20, seed=7)
    write_images(tmp_path / "other" / "val", 5, seed=8)
    for split in ("train", "val"):
        (tmp_path / "other" / split / "stripes").rename(tmp_path / "other" / split / "zebras")
    options = ("--arch", "wrn10_1", "--weights", first.folder / "best.pt", "--epochs", 2)
    options += ("--freeze-first", -1, "--dataset", "imagefolder", "--image-size", 32)
    capsys.readouterr()
    tuned = train(*options, "--data-dir", tmp_path / "other")
    told = capsys.readouterr().out
    assert "new for these classes: head.fc.bias, head.fc.weight" in told
    before = torch.load(first.folder / "best.pt", weights_only=True)
    after = torch.load(tuned.folder / "last.pt", weights_only=True)
    for name, tensor in before["model"].items():
        if not name.startswith("head"):
            assert torch.equal(tensor, after["model"][name]), name
    assert after["data"]["same"][3:] == before["data"]["same"][3:], "normalised as it was trained"
    # A run that goes on needs them no more.
    (first.folder / "best.pt").rename(tmp_path / "best.pt")
    (tuned.folder / "summary.json").unlink()
    assert main(["--resume", str(tuned.folder)]) == 0
    (tmp_path / "best.pt").rename(first.folder / "best.pt")
    # The same classes: the head goes on too.
    capsys.readouterr()
    train(*options[:4], "--epochs", 1, "--lr", 1e-9)
    assert "new for these classes" not in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_taken_from_a_state_dict_too(train: Train, tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(5)
    model = torchvision.models.resnet18(num_classes=1000)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.pth")
    run = train(*RESNET, "--weights", tmp_path / "w.pth", "--freeze-first", -1, "--epochs", 1)
    after = torch.load(run.folder / "last.pt", weights_only=True)
    assert after["model"]["fc.weight"].shape == (3, 512)
    assert torch.equal(after["model"]["layer1.0.conv1.weight"], model.layer1[0].conv1.weight)
    assert after["data"]["same"][3] == [0.485, 0.456, 0.406], "as torchvision's are normalised"
    assert run.args["lr"] == 0.02


def test_torchvisions_own_weights_are_found_by_name(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie where torch.hub puts them: here a file of ours."""
    torch.manual_seed(6)
    model = torchvision.models.mobilenet_v3_small()
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    weights = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT
    torch.save(model.state_dict(), hub / weights.url.rpartition("/")[2])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    options = ("--arch", "torchvision:mobilenet_v3_small", "--epochs", 1, "--freeze-first", -1)
    for name in ("DEFAULT", "IMAGENET1K_V1"):
        run = train(*options, "--weights", name)
        after = torch.load(run.folder / "last.pt", weights_only=True)["model"]
        assert after["classifier.3.weight"].shape == (3, 1024)
        assert torch.equal(after["features.0.0.weight"], model.features[0][0].weight)


def test_weights_that_cannot_be_had_are_one_sentence(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def refuse(*args: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    options = ("--arch", "torchvision:resnet18", "--output-dir", tmp_path / "run")
    sentence = fails(*options, "--weights", "DEFAULT")
    assert "no route to host" in sentence
    assert "resnet18-f37072fd.pth yourself and give it as --weights FILE" in sentence
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(nn.Linear(2, 2), tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    assert "cannot load the weights DEFAULT of resnet18" in fails(*options, "--weights", "DEFAULT")
    assert "there is no file V9, and torchvision has no such weights for resnet18" in fails(
        *options, "--weights", "V9"
    )
    assert "has no weights of its own" in fails("--weights", "DEFAULT")
    (tmp_path / "text").write_text("hello")
    assert "holds no weights, or was damaged" in fails(*options, "--weights", tmp_path / "text")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds no state dict" in fails(*options, "--weights", tmp_path / "list.pt")
    torch.save({"epoch": 2}, tmp_path / "odd.pt")
    assert "holds no state dict" in fails(*options, "--weights", tmp_path / "odd.pt")
    assert "is a folder" in fails(*options, "--weights", tmp_path)
    state = torchvision.models.resnet34().state_dict()
    torch.save(state, tmp_path / "34.pth")
    assert "which has no layer1.2" in fails(*options, "--weights", tmp_path / "34.pth")
    state = torchvision.models.resnet18().state_dict()
    del state["layer2.0.conv1.weight"]
    torch.save(state, tmp_path / "short.pth")
    assert "layer2.0.conv1.weight is missing, and should have shape" in fails(
        *options, "--weights", tmp_path / "short.pth"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--arch torchvision:resnet19", "did you mean resnet1"),
        ("--arch torchvision:fcn_resnet50", "no network 'fcn_resnet50' for classification"),
        ("--arch keras:resnet", "--arch keras:resnet is not known"),
        ("--arch torchvision:resnet18 --depth 20", "--depth is for wrn or densenet or vgg only"),
        ("--arch torchvision:inception_v3", "does not take images of 3x32x32"),
        ("--arch torchvision:resnet18 --freeze-first 10", "leaves nothing to train"),
        ("--arch torchvision:resnet18 --freeze-first layer9", "no unit 'layer9': it has conv1,"),
        ("--freeze-first 30", "cannot freeze 30 units"),
        ("--freeze-first -8", "leaves nothing to freeze: the network has 8 units"),
        ("--freeze-first 2 --t0 0.5", "--t0 is for units that freeze by FreezeOut"),
        ("--freeze-first 2 --no-freeze --schedule cubic", "leave out one of them"),
        ("--weights nowhere.pt --plan", "--weights nowhere.pt is not there"),
        ("--arch torchvision:vit_b_32 --weights DEFAULT", "give --image-size 224"),
        ("--arch timm:resnet9000", "timm"),
    ],
)
def test_what_cannot_be_is_told_before_anything_else(
    fails: Fails, tmp_path: Path, argv: str, named: str
) -> None:
    assert named in fails(*argv.split(), "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_unit_may_be_named_by_what_holds_it() -> None:
    found = command_line.parse(["--arch", "torchvision:resnet18", "--freeze-first", "layer3"])
    assert found.freeze_first == "layer3"
    assert count_of(units_of(build("wrn", 2, depth=16, width=1)), "group2") == 5
    assert count_of(units_of(build("torchvision:resnet18", 2)), "layer3") == 7
    assert not found.freeze
    assert command_line.parse(["--freeze-first", "-2", "--schedule", "cubic"]).freeze
    assert command_line.parse(["--weights", "x"]).lr == 0.01
    assert command_line.parse([]).lr == 0.1


@pytest.mark.parametrize("name", ["regnet_y_400mf", "googlenet"])
def test_networks_that_are_built_in_odd_ways_are_built(train: Train, name: str) -> None:
    run = train("--arch", f"torchvision:{name}", "--epochs", 3, "--freeze-first", -1)
    assert cache_of(run)["rows_served"] > 150


def test_timms_networks_run_too(train: Train) -> None:
    pytest.importorskip("timm")
    options = ("--arch", "timm:resnet10t", "--epochs", 3, "--freeze-first", -1)
    cached, plain = train(*options), train(*options, "--no-cache")
    assert_same_run(cached, plain)
    assert cache_of(cached)["rows_served"] > 150


def test_what_froze_in_a_run_is_found_by_the_next(train: Train) -> None:
    options = ("--arch", "wrn10_1", "--epochs", 6, "--t0", 0.25, "--schedule", "linear")
    first, again = train(*options), train(*options)
    assert_same_run(again, first)
    assert cache_of(first)["fills"]
    # Measured times decide which rows a run fills: the next one may add some of the 33 images that
    # it validates with. It writes no rows of the 150 training images again.
    assert 0 <= cache_of(again)["rows_kept"] - cache_of(first)["rows_kept"] < 150


def test_five_runs_at_once_share_their_rows(images: Path, tmp_path: Path) -> None:
    options = [*map(str, RESNET), "--freeze-first", "layer4.0", "-b", "32", "-j", "0"]
    options += ["--precision", "fp32", "--dataset", "imagefolder", "--data-dir", str(images)]
    options += ["--image-size", "32", "--cache-dir", str(tmp_path / "cache")]
    codes: dict[int, int] = {}

    def run(nursery: Nursery, number: int, *more: str) -> None:
        argv = [*options, "--lr", str(0.01 * (number + 1)), *more]
        folder = tmp_path / (f"run{number}" + "".join(more))
        codes[number] = nursery.live(
            [*argv, "--output-dir", str(folder)], tmp_path / f"{folder.name}.log"
        )

    nurseries = [Nursery() for _ in range(5)]
    try:
        threads = [
            threading.Thread(target=run, args=(nursery, number))
            for number, nursery in enumerate(nurseries)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number in (0, 4):
            run(nurseries[0], number, "--no-cache")
    finally:
        for nursery in nurseries:
            nursery.__exit__()
    assert set(codes.values()) == {0}
    caches = [
        json.loads((tmp_path / f"run{n}" / "summary.json").read_text())["cache"] for n in range(5)
    ]
    assert all(cache["rows_served"] > 0 for cache in caches)
    for number in (0, 4):
        assert results(tmp_path / f"run{number}") == results(tmp_path / f"run{number}--no-cache")


def test_classifiers_of_transformers_are_trained_by_folder(train: Train, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "vit")
    options = ("--arch", f"hf:{tmp_path / 'vit'}", "--epochs", 3, "--freeze-first", -1)
    cached, plain = train(*options), train(*options, "--no-cache")
    assert_same_run(cached, plain)
    assert cache_of(cached)["rows_served"] > 150
    tuned = train(*options, "--weights", tmp_path / "vit")
    after = torch.load(tuned.folder / "last.pt", weights_only=True)["model"]
    for name, tensor in model.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(after[f"model.{name}"], tensor), name
