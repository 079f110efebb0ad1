"""Probing: heads trained together are those trained alone, and the program tells what is wrong."""

import csv
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import cachefreeze
from cachefreeze import ActivationCache, UserError
from cachefreeze.probing.backbone import Backbone, Joined, find_layout
from cachefreeze.probing.fits import logistic, neighbours
from cachefreeze.probing.heads import Heads, Linear
from cachefreeze.probing.probe import rows_of
from cachefreeze.probing.program import main
from cachefreeze.probing.rows import frozen
from cachefreeze.probing.saved import Saved

WIDTH, CLASSES, CPU = 12, 3, torch.device("cpu")


def head(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "linear":
        return Linear(range(2, 10), CLASSES)
    if kind == "scattered columns":
        return Linear([0, 1, 5], CLASSES)
    if kind in ("torch's own", "without bias"):
        return nn.Linear(WIDTH, CLASSES, bias=kind == "torch's own")
    if kind == "two layers":
        return nn.Sequential(nn.Linear(WIDTH, 5), nn.ReLU(), nn.Linear(5, CLASSES))
    return nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES))


KINDS = ("linear", "scattered columns", "torch's own", "without bias", "two layers", "batch norm")


def batches(steps: int = 20) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(steps, 16, WIDTH, generator=generator)
    y = torch.randint(0, CLASSES, (steps, 16), generator=generator)
    return list(zip(x, y, strict=True))


def alone(one: nn.Module, rate: float, decay: float) -> nn.Module:
    """Trains a head by torch's own SGD."""
    optimizer = torch.optim.SGD(one.parameters(), rate, momentum=0.9, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches()))
    one.train()
    for x, y in batches():
        loss = F.cross_entropy(one(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return one


def test_heads_trained_together_have_the_weights_of_heads_trained_alone() -> None:
    grid = [(kind, rate, decay) for kind in KINDS for rate in (0.001, 0.1) for decay in (0.0, 0.01)]
    heads = [head(kind, number) for number, (kind, _, _) in enumerate(grid)]
    group = Heads(heads, [one[1] for one in grid], [one[2] for one in grid], len(batches()))
    for x, y in batches():
        group.learn(x, F.one_hot(y, CLASSES).float())
    group.finish()
    for number, (kind, rate, decay) in enumerate(grid):
        expected = alone(head(kind, number), rate, decay)
        for name, tensor in heads[number].state_dict().items():
            other = expected.state_dict()[name].double()
            difference = (tensor.double() - other).abs().max() / other.abs().max().clamp(min=1e-12)
            assert difference <= 1e-5, (kind, rate, decay, name, float(difference))


def test_heads_of_one_structure_run_as_one() -> None:
    heads = [head(kind, number) for number, kind in enumerate(KINDS * 3)]
    group = Heads(heads, [0.1] * len(heads), [0.0] * len(heads), 1)
    assert [len(one.numbers) for one in group._groups] == [3] * len(KINDS)
    x, y = batches(1)[0]
    group.learn(x, F.one_hot(y, CLASSES).float())
    assert all(one._together for one in group._groups)


def test_a_head_that_diverges_reaches_no_other() -> None:
    heads = [head("linear", 0), head("linear", 0)]
    group = Heads(heads, [1e38, 0.1], [0.0, 0.0], len(batches()))
    for x, y in batches():
        group.learn(x * 1e3, F.one_hot(y, CLASSES).float())
    group.finish()
    assert not heads[0].linear.weight.isfinite().all()
    assert heads[1].linear.weight.isfinite().all()


def test_heads_that_draw_random_numbers_run_one_after_another() -> None:
    def drops() -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, CLASSES))

    group = Heads([drops(), drops()], [0.1] * 2, [0.0] * 2, 1)
    x, y = batches(1)[0]
    group.learn(x, F.one_hot(y, CLASSES).float())
    assert not group._groups[0]._together


def test_logistic_regression_is_that_of_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    x, y = (torch.cat(some) for some in zip(*batches(4), strict=True))
    for strength, (weight, bias) in zip(
        (10.0, 0.1), logistic(x, y, CLASSES, (10.0, 0.1)), strict=True
    ):
        theirs = LogisticRegression(C=strength, tol=1e-8, max_iter=1000).fit(x.numpy(), y.numpy())
        np.testing.assert_allclose(weight.numpy(), theirs.coef_, atol=2e-3)
        # A number that is added to all of them changes nothing.
        ours = (bias - bias.mean()).numpy()
        np.testing.assert_allclose(ours, theirs.intercept_ - theirs.intercept_.mean(), atol=2e-3)


def test_neighbours_vote_by_their_cosine() -> None:
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.2, 0.8]])
    y = torch.tensor([0, 0, 1, 1, 1])
    queries = torch.tensor([[10.0, 1.0], [0.3, 0.5]])
    few, all_of_them = neighbours(x, y, 2, queries, (1, 99))
    assert few.tolist() == all_of_them.tolist() == [0, 1]


# The function.


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, WIDTH))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def rows(count: int, seed: int) -> list[Any]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return [(one, int(one[:2].argmax())) for one in x]


def test_probe_finds_the_head_that_learns_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Frozen().train()
    heads = [nn.Linear(WIDTH, CLASSES) for _ in range(3)]
    arguments: dict[str, Any] = {"lr": [0.0001, 0.3, 0.0001], "epochs": 5, "batch_size": 16}
    state = torch.get_rng_state()
    found = cachefreeze.probe(
        model, rows(96, 0), rows(32, 1), heads, directory=tmp_path, **arguments
    )
    assert torch.equal(state, torch.get_rng_state())
    assert found.best == 1
    assert found.accuracies[1] > 0.8
    assert model.training
    assert all(one.requires_grad for one in model.parameters())
    assert found.heads[1] is heads[1]
    with torch.no_grad():
        right = [int(heads[1](model(x)).argmax()) == y for x, y in rows(32, 1)]
    assert np.mean(right) == pytest.approx(found.accuracies[1])


def test_views_show_another_view_in_each_epoch() -> None:
    seen: list[Tensor] = []

    def noise(x: Tensor) -> Tensor:
        seen.append(x + torch.rand(1))
        return seen[-1]

    heads = [nn.Linear(WIDTH, CLASSES)]
    cachefreeze.probe(Frozen(), rows(8, 0), rows(8, 1), heads, views=3, transform=noise, epochs=4)
    assert len({one.sum().item() for one in seen}) == 3 * 8


@pytest.mark.parametrize(
    ("train", "heads", "options", "says"),
    [
        (rows(8, 0), [], {}, "give a list of modules"),
        (rows(8, 0), [nn.Linear(WIDTH, 3)], {"lr": [0.1, 0.2]}, "2 values for 1 heads"),
        (rows(8, 0), [nn.ReLU()], {}, "no parameter to train"),
        ([], [nn.Linear(WIDTH, 3)], {}, "is empty"),
        ([x for x, _ in rows(8, 0)], [nn.Linear(WIDTH, 3)], {}, "labels are missing"),
        ([(x, 7) for x, _ in rows(8, 0)], [nn.Linear(WIDTH, 3)], {}, "from 0 to 2"),
        (
            [(torch.zeros(6 + n % 2), 0) for n in range(8)],
            [nn.Linear(WIDTH, 3)],
            {},
            "images are of several sizes",
        ),
    ],
)
def test_what_cannot_be_probed_is_told(train: Any, heads: Any, options: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        cachefreeze.probe(Frozen(), train, rows(4, 1), heads, **options)


def test_probe_is_a_function_and_a_program() -> None:
    with pytest.raises(ImportError, match="is a function"):
        importlib.import_module("cachefreeze.probe")
    assert cachefreeze.probe.__name__ == "probe"  # type: ignore[attr-defined]
    help_text = subprocess.run(
        [sys.executable, "-m", "cachefreeze.probe", "--help"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "--model" in help_text


# Blocks of networks.


class Flat(nn.Module):
    """Layers without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


@pytest.mark.parametrize(
    ("name", "blocks", "norm", "prefix", "form"),
    [
        ("timm:test_vit", "blocks.5", "norm", 1, "tokens"),
        ("torchvision:resnet18", "layer4.1", "", 0, "NCHW"),
        ("torchvision:vit_b_32", "encoder.layers.encoder_layer_11", "encoder.ln", 1, "tokens"),
    ],
)
def test_blocks_and_the_norm_behind_them_are_found(
    name: str, blocks: str, norm: str, prefix: int, form: str
) -> None:
    from cachefreeze.models import build

    with torch.device("meta"):
        model = build(name, 2, image_size=64).eval()
    layout = find_layout(model, 2, 64, torch.device("meta"))
    assert (layout.blocks[0], layout.norm, layout.prefix, layout.form) == (
        blocks, norm, prefix, form,
    )  # fmt: skip


def test_rows_of_a_vision_transformer_are_those_of_its_library() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=2).eval()
    layout = find_layout(model, 2, 32, CPU)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found = Joined()(Backbone(model, layout)(x))
        theirs = model.forward_intermediates(
            x, indices=2, norm=True, output_fmt="NLC", return_prefix_tokens=True,
            intermediates_only=True,
        )  # fmt: skip
    for number, (patches, prefix) in enumerate(theirs[::-1]):
        for pooling, value in (("class", prefix[:, 0]), ("mean", patches.mean(1))):
            columns = layout.columns(number + 1, pooling)[-value.shape[1] :]
            torch.testing.assert_close(found[:, columns], value)


def test_fewer_blocks_are_found_among_those_that_were_kept(tmp_path: Path) -> None:
    import timm

    served = []
    images = [(torch.randn(3, 32, 32), 0) for _ in range(48)]
    for blocks in (2, 1):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", img_size=32, num_classes=2).eval()
        backbone = Backbone(model, find_layout(model, blocks, 32, CPU))
        with frozen(backbone), ActivationCache(backbone, directory=tmp_path) as cache:
            rows_of(lambda x, net=backbone: Joined()(net(x)), cache, images, CPU, size=8)
            served.append(cache.stats.rows_served)
    assert served == [0, 24]  # one batch is followed, and two are compared


# The program.

RESNET = ("--model", "torchvision:resnet18")
NETWORK = ("--model", "timm:test_vit", "--image-size", "32", "--workers", "0")


def save(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 100, (40, 36, 3))
    Image.fromarray((noise + np.array(colour)).astype(np.uint8)).save(path)


COLOURS = {"blue": (0, 0, 150), "green": (0, 150, 0), "red": (150, 0, 0)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 16), ("val", 6)):
        for name, colour in COLOURS.items():
            for number in range(count):
                save(folder / split / name / f"{number}.png", colour, number)
    return folder


@pytest.fixture(scope="module")
def probed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a probing, with its cache beside it."""
    folder = tmp_path_factory.mktemp("probing")
    words = ("--data-dir", str(photos), "--cache-dir", str(folder / "cache"), *NETWORK)
    more = ("--blocks", "1", "2", "--output-dir", str(folder / "first"), "--epochs", "5")
    assert main([*words, *more, "--quiet"]) == 0
    return folder


def test_the_program_finds_a_head_and_a_second_run_computes_nothing_anew(
    probed: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = json.loads((probed / "first" / "heads.json").read_text())
    assert len(first["heads"]) == 13 * 2 * 3 + 3 * 4 + 3 * 2
    assert max(one["score"] for one in first["heads"]) == 1.0
    assert "heads were tried" in (probed / "first" / "report.html").read_text()
    second = probed / "second"
    words = ("--data-dir", str(photos), "--cache-dir", str(probed / "cache"), *NETWORK)
    more = ("--blocks", "1", "2", "--output-dir", str(second), "--epochs", "5", "--no-report")
    before = sum(path.stat().st_size for path in (probed / "cache").rglob("*") if path.is_file())
    assert main([*words, *more]) == 0
    again = json.loads((second / "heads.json").read_text())
    assert again["heads"] == first["heads"]
    assert "best      " in capsys.readouterr().out
    after = sum(path.stat().st_size for path in (probed / "cache").rglob("*") if path.is_file())
    assert after < 1.2 * before  # no row is kept twice


def test_the_best_head_predicts_what_it_was_chosen_for(
    probed: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--head", str(probed / "first" / "best.pt"), "--predict", str(photos / "val")]
    assert main([*words, "--output-dir", str(tmp_path)]) == 0
    assert "predicted 18 images" in capsys.readouterr().out
    with (tmp_path / "predictions.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert all(line["class"] == Path(line["image"]).parent.name for line in lines)


def test_the_best_head_loads_without_this_project(probed: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tutorials" / "probing.md").read_text()
    (code,) = (one for one in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "timm" in one)
    assert "cachefreeze" not in code
    names: dict[str, Any] = {}
    exec(code.replace("probes/mine/best.pt", str(probed / "first" / "best.pt")), names)
    x = torch.rand(2, 3, 32, 32)
    saved = Saved.read(probed / "first" / "best.pt")
    mean, std = (torch.tensor(one)[:, None, None] for one in (saved.mean, saved.std))
    with torch.no_grad():
        torch.testing.assert_close(names["predict"](x), saved.built(CPU)((x - mean) / std))


def test_views_run_the_network_once_for_each(photos: Path, tmp_path: Path) -> None:
    words = ("--data-dir", str(photos), "--cache-dir", str(tmp_path / "cache"), *NETWORK)
    more = ("--blocks", "1", "--methods", "linear", "--lr", "0.01", "--views", "2", "--no-report")
    assert main([*words, *more, "--output-dir", str(tmp_path / "out"), "--quiet"]) == 0
    assert json.loads((tmp_path / "out" / "heads.json").read_text())["rows"] == 2 * 48 + 18


def test_a_head_learns_the_class_of_each_pixel(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(24):
        mask = np.zeros((32, 32), np.uint8)
        if random.random() < 0.5:
            mask[:, 16:] = 1
        else:
            mask[16:] = 1
        mask[:2] = 255
        pixels = random.integers(0, 60, (32, 32, 3)) + 180 * (mask == 1)[..., None]
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
    out = tmp_path / "out"
    words = ("--data-dir", str(tmp_path), "--cache-dir", str(tmp_path / "cache"), *NETWORK)
    more = ("--task", "segmentation", "--blocks", "1", "2", "--epochs", "20", "-b", "8")
    predict = ("--predict", str(tmp_path / "images"), "--no-report", "--quiet")
    assert main([*words, *more, *predict, "--output-dir", str(out)]) == 0
    heads = json.loads((out / "heads.json").read_text())["heads"]
    assert max(one["score"] for one in heads) > 0.8
    said, truth = (np.array(Image.open(one / "3.png")) for one in (out, tmp_path / "masks"))
    assert (said == truth)[2:].mean() > 0.8


def bad(folder: Path, images: dict[str, int]) -> Path:
    for name, count in images.items():
        for number in range(count):
            save(folder / name / f"{number}.png", (0, 0, 0), number)
    return folder


@pytest.mark.parametrize(
    ("images", "words", "says"),
    [
        ({"cat": 5}, (), "only the class 'cat'"),
        ({"cat": 2, "dog": 1}, (), "'dog' has a single image"),
        ({".": 4}, (), "has no class folders"),
        ({"cat": 4, "dog": 4}, ("--model", "vgg11"), "has no blocks"),
        ({"cat": 4, "dog": 4}, ("--blocks", "99"), "has 6 blocks, and the last 99"),
        ({"cat": 4, "dog": 4}, ("--model", "timm:vit_nothing"), "no network 'vit_nothing'"),
        ({"cat": 4, "dog": 4}, ("--views", "twirls"), "--views twirls"),
        ({"cat": 4, "dog": 4}, ("--lr", "0"), "--lr"),
        ({"cat": 4, "dog": 4}, ("--methods", "neighbours"), "leaves no head"),
        ({"cat": 4, "dog": 4}, ("--views", "2", "--methods", "logistic"), "for linear heads only"),
        ({"cat": 4, "dog": 4}, ("--predict", "nowhere"), "nowhere is not a folder"),
        ({"cat": 4, "dog": 4}, ("--output-dir", __file__), "cannot be written to"),
        ({"cat": 4, "dog": 4}, (*RESNET, "--pooling", "class"), "no class token"),
        ({"images": 4}, ("--task", "segmentation"), "no folder masks"),
        ({"images": 4, "masks": 3}, ("--task", "segmentation"), "labels are missing"),
        ({"images": 4, "masks": 4}, ("--task", "segmentation"), "colour picture"),
        ({}, ("--head", "nothing.pt", "--predict", "x"), "leave out --model"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(
    images: dict[str, int], words: tuple[str, ...], says: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = bad(tmp_path / "photos", images)
    always = ("--data-dir", str(folder), "--cache-dir", str(tmp_path / "cache"), *NETWORK)
    assert main([*always, "--output-dir", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1
    # Nothing has been computed in vain.
    assert not (tmp_path / "cache").exists()


def test_a_file_that_is_no_head_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    assert main(["--head", str(tmp_path / "other.pt"), "--predict", str(tmp_path)]) == 2
    assert "is no head of a probing" in capsys.readouterr().err
