"""Rows that are compressed or rounded: what is served, and what an exact run never finds."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cachefreeze import ActivationCache
from cachefreeze.cache.codec import GROUP, INT8_ERROR, decode, encode, encoded_numel
from cachefreeze.cache.entries import Entries
from cachefreeze.errors import UserError
from cachefreeze.store import Directory
from cachefreeze.store.inspect import inspect

from .harness import assert_same, batches, images, net, plainly


def keys_of(count: int) -> np.ndarray:
    return np.stack([np.arange(count), np.arange(count)], axis=1).astype(np.uint64)


def epochs(model: nn.Module, x: torch.Tensor, count: int, exact: bool) -> float:
    """Runs a loop. Returns the largest difference from a plain pass, as a share of the output."""
    far = 0.0
    for number in range(count):
        for batch in batches(x, number):
            output, plain = model(batch), plainly(model, batch)
            if exact:
                assert_same(output, plain)
            far = max(far, ((output - plain).abs().max() / plain.abs().max()).item())
    return far


def nbytes(folder: Path) -> int:
    return sum(one.nbytes for one in inspect(folder))


@settings(deadline=None, max_examples=60)
@given(
    numel=st.integers(1, 3 * GROUP),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    size=st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 6e4]),
)
def test_a_rounded_row_is_near_what_it_was(numel: int, dtype: torch.dtype, size: float) -> None:
    rows = (torch.rand(3, numel) * 2 - 1).mul_(size).to(dtype)
    rows[1] = 0
    coded = encode(rows)
    assert coded.shape == (3, encoded_numel(numel))
    back = decode(coded, numel, dtype)
    assert back.dtype == dtype
    assert back.is_contiguous()
    assert (back[1] == 0).all()
    # Half a step, and the rounding of the type itself.
    most = INT8_ERROR + (0.004 if dtype == torch.bfloat16 else 0.0005)
    assert ((back.double() - rows.double()).abs() <= most * size + 1e-37).all()


def test_numbers_of_one_group_do_not_disturb_those_of_another() -> None:
    rows = torch.cat([torch.rand(2, GROUP), 1e6 * torch.rand(2, GROUP)], dim=1)
    back = decode(encode(rows), 2 * GROUP, torch.float32)
    assert (back[:, :GROUP] - rows[:, :GROUP]).abs().max() <= INT8_ERROR


def test_rows_that_cannot_be_rounded_are_not_kept() -> None:
    entries = Entries(1 << 20, codec="int8")
    rows = torch.rand(4, 8)
    rows[1, 3], rows[2, 0] = float("-inf"), float("nan")
    assert entries.write(b"t", keys_of(4), rows) == 2
    table = entries.table(b"t")
    assert (table.find(keys_of(4)) >= 0).tolist() == [True, False, False, True]
    whole = torch.arange(12).view(4, 3) * 10**12
    assert entries.write(b"w", keys_of(4), whole) == 4
    found = entries.read(b"w", keys_of(4), entries.table(b"w").find(keys_of(4)))
    assert torch.equal(found, whole), "integers are kept as they are"


@pytest.mark.parametrize("max_bytes", [0, 1 << 20])
def test_rounded_rows_are_the_same_from_memory_and_from_the_disk(
    tmp_path: Path, max_bytes: int
) -> None:
    rows, name = torch.randn(20, 300), bytes(16)
    cpu = torch.device("cpu")
    for limit in (1 << 20, max_bytes):
        entries = Entries(limit, Directory(tmp_path, None), "int8")
        table = entries.open(name, (300,), torch.float32, cpu, {})
        assert entries.has(name) == (limit is max_bytes and len(table.below) > 0)
        if not entries.has(name):
            entries.write(name, keys_of(20), rows)
        found = entries.read(name, keys_of(20), table.find(keys_of(20)))
        assert torch.equal(found, decode(encode(rows), 300, torch.float32))
        entries.close()
    exact = Entries(1 << 20, Directory(tmp_path, None))
    assert not exact.has(name)
    table = exact.open(name, (300,), torch.float32, cpu, {})
    assert (table.find(keys_of(20)) == -1).all(), "a rounded row was found by an exact run"
    exact.close()


@pytest.mark.parametrize("numel", [GROUP, 300])
def test_the_example_of_the_page_reads_rounded_rows(tmp_path: Path, numel: int) -> None:
    page = (Path(__file__).parents[2] / "docs" / "store-format.md").read_text()
    example, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    rows = torch.randn(20, numel)
    entries = Entries(0, Directory(tmp_path, None), "int8")
    entries.open(bytes(16), (numel,), torch.float32, torch.device("cpu"), {})
    entries.write(bytes(16), keys_of(20), rows)
    entries.close()
    (folder,) = (one.parent for one in tmp_path.glob("*/*/zarr.json"))
    names: dict[str, Any] = {"rows": zarr.open_group(folder)["values"][:], "numel": numel}
    exec(example, names)
    assert np.array_equal(names["values"], decode(encode(rows), numel, torch.float32).numpy())


def test_compressed_rows_are_served_to_the_bit_in_less_room(tmp_path: Path) -> None:
    x = images(48)
    for codec in ("raw", "zstd"):
        torch.manual_seed(0)
        frozen = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU()).requires_grad_(False)
        model = nn.Sequential(frozen, nn.Conv2d(12, 2, 8))
        with ActivationCache(model, directory=tmp_path / codec, codec=codec) as cache:
            epochs(model, x, 4, exact=True)
            assert cache.stats.rows_served > 0
    assert nbytes(tmp_path / "zstd") < nbytes(tmp_path / "raw")
    # Whatever a run writes, it reads both.
    with ActivationCache(model, directory=tmp_path / "zstd") as cache:
        epochs(model, x, 1, exact=True)
        assert cache.stats.rows_served > 0


def test_small_rows_are_not_compressed(tmp_path: Path) -> None:
    entries = Entries(1 << 20, Directory(tmp_path, None), "zstd")
    for name, width in ((bytes(16), 255), (bytes([1] * 16), 256)):
        entries.open(name, (width,), torch.float32, torch.device("cpu"), {})
        entries.write(name, keys_of(4), torch.zeros(4, width))
    entries.close()
    codecs = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("*/*/zarr.json"))]
    assert [one["attributes"]["cachefreeze"]["codec"] for one in codecs] == ["raw", "zstd"]


def test_rounded_rows_are_served_if_that_is_allowed_and_it_is_told(tmp_path: Path) -> None:
    x, model = images(48), net()
    with ActivationCache(model, directory=tmp_path, codec="int8", exact=False) as cache:
        assert 0 < epochs(model, x, 4, exact=False) < 0.05
        assert cache.stats.rows_served > 0
        assert any("differ from computed ones" in one for one in cache.messages)
    with ActivationCache(model, directory=tmp_path, codec="int8", exact=False) as cache:
        epochs(model, x, 1, exact=False)
        assert cache.stats.rows_served > 0, "a later run finds them"
    with ActivationCache(model, directory=tmp_path) as cache:
        epochs(model, x, 3, exact=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"codec": "int8"}, "give exact=False"),
        ({"codec": "zstd"}, "give a directory too"),
        ({"codec": "lz4"}, "must be one of raw, zstd, int8"),
    ],
)
def test_a_codec_that_cannot_be_is_refused(options: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ActivationCache(net(), **options)


def test_rounded_rows_are_served_although_more_freezes_in_between() -> None:
    model, x = net(), images()
    model.body[3:].requires_grad_(True)
    cache = ActivationCache(model, codec="int8", exact=False)
    for epoch in range(8):
        if epoch == 4:
            model.body.requires_grad_(False)
            before = cache.stats.rows_served
        for batch in batches(x, epoch):
            model(batch).square().mean().backward()
    assert 0 < before < cache.stats.rows_served
    assert not any("is not cached" in one for one in cache.messages)
