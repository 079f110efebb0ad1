"""A store's name changes with whatever its rows depend on, to the last bit."""

import importlib
import linecache
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from cachefreeze import PrefixCache, Units
from cachefreeze.data import InputRows, load
from cachefreeze.provenance import Weights

from .conftest import Pixels, write_images

BATCH = 8


class Scaled(nn.Module):
    def __init__(self, factor: object) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def double(*args: object) -> None:
    return None


def halve(*args: object) -> int:
    return 0


def test_the_fingerprint_changes_with_whatever_the_rows_depend_on(tmp_path: Path) -> None:
    def fingerprint(
        *,
        change: object = None,
        factor: object = 2.0,
        seed: int = 1,
        stop: int = 3,
        **options: object,
    ) -> str:
        torch.manual_seed(0)
        units = Units(
            {
                "stem": nn.Conv2d(3, 4, 3, padding=1),
                "scale": Scaled(factor),
                "block": nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
                "head": nn.Flatten(),
            }
        )
        if callable(change):
            with torch.no_grad():
                change(units)
        units.freeze(3)
        inputs = {"train": Pixels(37, seed), "val": Pixels(10, 2)}
        options = {"batch_size": BATCH, **options}
        return PrefixCache(units, inputs, **options).fingerprint(stop)  # type: ignore[arg-type]

    def a_bit_of_a_weight(units: Units) -> None:
        weight = units[0].weight.view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))

    def a_buffer(units: Units) -> None:
        units[2][0].running_var[1] += 1e-6

    def another_activation(units: Units) -> None:
        units[2][1] = nn.ReLU6()

    def a_stride(units: Units) -> None:
        units[0].stride = (2, 2)

    def a_hidden_setting(units: Units) -> None:
        units[2][0].eps = 1e-4

    def a_hook(units: Units) -> None:
        units[0].register_forward_hook(double)

    def another_memory_format(units: Units) -> None:
        units[0].to(memory_format=torch.channels_last)

    reference = fingerprint()
    assert fingerprint() == reference
    assert len(reference) == 32
    threads = torch.get_num_threads()
    variants = [
        fingerprint(change=change)
        for change in (
            a_bit_of_a_weight,
            a_buffer,
            another_activation,
            a_stride,
            a_hidden_setting,
            a_hook,
            another_memory_format,
        )
    ]
    variants += [
        *(fingerprint(factor=factor) for factor in (3.0, [2.0], [3.0], {"a": 2.0}, "2.0")),
        *(fingerprint(factor=factor) for factor in (torch.ones(1), torch.zeros(1), double, halve)),
        *(fingerprint(factor=object()) for _ in range(2)),
        fingerprint(seed=5),
        fingerprint(stop=2),
        fingerprint(batch_size=BATCH + 1),
        fingerprint(autocast_dtype=torch.bfloat16),
    ]
    torch.set_num_threads(threads + 1)
    try:
        variants.append(fingerprint())
    finally:
        torch.set_num_threads(threads)
    assert len({reference, *variants}) == 1 + len(variants)

    def a_head(units: Units) -> None:
        units[3].start_dim = 2

    assert fingerprint(change=a_head) == reference, "the suffix is none of the store's business"


def edit(folder: Path) -> None:
    path = next((folder / "train").rglob("*.jpg"))
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def touch(folder: Path) -> None:
    path = next((folder / "val").rglob("*.jpg"))
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def rename(folder: Path) -> None:
    path = next((folder / "train").rglob("*.jpg"))
    path.rename(path.with_name("000000.jpg"))


def add(folder: Path) -> None:
    path = next((folder / "train").rglob("*.jpg"))
    shutil.copy(path, path.with_name("zzz.jpg"))


def remove(folder: Path) -> None:
    next((folder / "val").rglob("*.jpg")).unlink()


def relabel(folder: Path) -> None:
    path = next((folder / "train" / "blobs").rglob("*.jpg"))
    path.rename(folder / "train" / "stripes" / "aaa.jpg")


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize("change", [nothing, edit, touch, rename, add, remove, relabel])
def test_the_fingerprint_changes_with_the_images_and_how_they_are_prepared(
    tmp_path: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "train", 3, seed=1)
    write_images(tmp_path / "val", 2, seed=2)

    def fingerprints(size: int = 16, scale: float = 1.0) -> list[str]:
        data = load(
            "imagefolder",
            tmp_path,
            image_size=size,
            val_fraction=None,
            workers=0,
            bar=lambda batches, total: batches,
        )
        std = [value * scale for value in data.std]
        inputs = {
            "train": InputRows(data.train, data.mean, std, torch.device("cpu")),
            "val": InputRows(data.val, data.mean, std, torch.device("cpu")),
        }
        units = Units({"stem": nn.Flatten(), "head": nn.Flatten()})
        units.freeze(1)
        cache = PrefixCache(units, inputs, batch_size=BATCH)
        return [cache.fingerprint(0), cache.fingerprint(1)]

    before = fingerprints()
    assert before == fingerprints()
    if change is nothing:
        larger, scaled = fingerprints(size=17), fingerprints(scale=2.0)
        assert scaled[0] == before[0], "pixels are kept before they are normalised"
        monkeypatch.setattr("cachefreeze.provenance.FORMAT", 99)
        found = [*before, *larger, scaled[1], *fingerprints()]
        assert len(set(found)) == len(found)
        return
    change(tmp_path)
    assert not set(fingerprints()) & set(before)


def test_the_fingerprint_changes_with_the_code_of_a_module(tmp_path: Path) -> None:
    """Someone edits `forward` between two runs; names, settings and weights stay."""
    source = (
        "from torch import nn\n"
        "class Block(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x + 1\n"
    )
    found = []
    sys.path.insert(0, str(tmp_path))
    try:
        for number, text in enumerate((source, source.replace("+ 1", "+ 2"))):
            (tmp_path / "edited_block.py").write_text(text + "#" * number)
            sys.modules.pop("edited_block", None)
            importlib.invalidate_caches()
            linecache.checkcache()
            block = importlib.import_module("edited_block").Block
            units = Units({"block": block(), "head": nn.Flatten()})
            units.freeze(1)
            cache = PrefixCache(units, {"train": Pixels(9, 1)}, batch_size=BATCH)
            found.append(cache.fingerprint(1))
    finally:
        sys.path.remove(str(tmp_path))
    assert found[0] != found[1]


def test_code_that_is_edited_while_a_run_goes_on_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "half_edited_block.py"
    path.write_text("from torch import nn\nclass Block(nn.Identity):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    block = importlib.import_module("half_edited_block").Block()
    units = Units({"block": block, "head": nn.Flatten()})
    units.freeze(1)
    cache = PrefixCache(units, {"train": Pixels(9, 1)}, batch_size=BATCH)
    before = cache.fingerprint(1)
    path.write_text("class Block(nn.Identity:\n    pa")
    os.utime(path, (1, 1))
    assert cache.fingerprint(1) == before
    PrefixCache(units, {"train": Pixels(9, 1)}, batch_size=BATCH).fingerprint(1)


# ---- What the code of a class does not show.

FACTOR = 2.0


def helper(x: Tensor) -> Tensor:
    return x * FACTOR


class Calls(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return helper(x)


class Hidden(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self._factor


class Acts(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def made_at_a_prompt(factor: int) -> nn.Module:
    scope: dict[str, object] = {"nn": nn}
    code = f"class Typed(nn.Module):\n    def forward(self, x):\n        return x * {factor}\n"
    exec(code, scope)  # no source text is to be had of it
    return scope["Typed"]()  # type: ignore[operator, no-any-return]


def fingerprint_of(module: nn.Module) -> str:
    units = Units({"first": module, "head": nn.Linear(2, 2)})
    units.freeze(1)
    return PrefixCache(units, {"train": Pixels(9, 1)}, batch_size=4).fingerprint(1)


def scaling(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor


@pytest.mark.parametrize(
    "make",
    [
        Hidden,
        made_at_a_prompt,
        lambda k: Acts(scaling(k)),
        lambda k: Acts(lambda x, k=k: x * k),
        lambda k: Acts(lambda x: x * {1: 2.0, 2: 3.0}[k]),
    ],
    ids=["private attribute", "no source", "closure", "default", "closure of a constant"],
)
def test_what_the_source_of_a_class_does_not_show_counts_too(
    make: Callable[[int], nn.Module],
) -> None:
    assert fingerprint_of(make(1)) == fingerprint_of(make(1))
    assert fingerprint_of(make(1)) != fingerprint_of(make(2))


def test_so_do_the_functions_that_it_calls_and_what_they_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = fingerprint_of(Calls())
    assert fingerprint_of(Calls()) == before
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3.0)
    assert fingerprint_of(Calls()) != before
    monkeypatch.undo()
    monkeypatch.setattr(sys.modules[__name__], "helper", lambda x: x)
    assert fingerprint_of(Calls()) != before


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2


class Plain:
    @staticmethod
    def f(x: Tensor) -> Tensor:
        return x * 2


class Inherits(Plain):
    pass


shelf = ModuleType("shelf")
shelf.f = lambda x: x * 2


class Applies(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Twice.apply(x)


class Asks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Inherits.f(x)


class Imports(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (lambda: shelf.f(x))() if shelf else x


def of_a_class_inside() -> nn.Module:
    inside = Plain
    return Acts(lambda x: inside.f(x))


@pytest.mark.parametrize(
    ("make", "owner", "name"),
    [
        (Applies, Twice, "forward"),
        (Asks, Plain, "f"),
        (Imports, shelf, "f"),
        (of_a_class_inside, Plain, "f"),
    ],
    ids=["autograd function", "base of a class", "module", "closure"],
)
def test_and_what_they_use_of_classes_and_modules(
    make: Callable[[], nn.Module], owner: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint_of(make())
    assert fingerprint_of(make()) == before
    monkeypatch.setattr(owner, name, staticmethod(lambda *x: x[-1] * 3))
    assert fingerprint_of(make()) != before


def test_a_class_that_uses_itself_is_written_down_once() -> None:
    """And with it what can be known of it: another run comes to the same."""

    class Itself:
        @staticmethod
        def f(x: Tensor, depth: int = 2) -> Tensor:
            return Itself.f(x, depth - 1) if depth else x

    assert fingerprint_of(Acts(lambda x: Itself.f(x))) == fingerprint_of(
        Acts(lambda x: Itself.f(x))
    )


def test_weights_that_are_compared_are_held() -> None:
    """Or others could come to have their address, and lie in their memory."""
    first = torch.zeros(1000)
    before, gone, memory = Weights([first]), weakref.ref(first), first.data_ptr()
    assert before.are(Weights([first]))
    first.data = torch.zeros(1000)
    assert first.data_ptr() != memory
    assert not before.are(Weights([first]))
    first = torch.zeros(1000)
    assert gone() is not None
    assert not before.are(Weights([first]))


def test_another_process_comes_to_the_same(tmp_path: Path) -> None:
    """Also where the order of a set is another one there, and of functions made by functions."""
    program = (
        "import torch, torch.nn.functional as F\n"
        "from torch import nn\n"
        "from cachefreeze import PrefixCache, partition\n"
        "from tests.conftest import Pixels\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.LazyLinear(2)\n"
        "    def forward(self, x, kind='relu'):\n"
        "        x = F.max_pool2d(self.conv(x), 2)\n"
        "        if kind in {'relu', 'silu', 'gelu', 'tanh'}:\n"
        "            x = F.relu(x)\n"
        "        return self.fc(x.flatten(1))\n"
        "torch.manual_seed(0)\n"
        "model = Net(); model(torch.zeros(2, 3, 16, 16))\n"
        "units = partition(model); units.freeze(1)\n"
        "print(PrefixCache(units, {'train': Pixels(9, 1)}, batch_size=4).fingerprint(1))\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
