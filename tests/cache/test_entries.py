"""Tables of kept rows: what is found is what was written, in little memory."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefreeze.cache.entries import Entries
from cachefreeze.cache.row_layout import RowLayout
from cachefreeze.keys import batch_key, row_keys
from cachefreeze.lineage import Axis
from cachefreeze.store import Index


def keys_of(numbers: np.ndarray) -> np.ndarray:
    """Keys that collide in the lower bits, which the index goes by."""
    return np.stack([numbers % 7, numbers], axis=1).astype(np.uint64)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 400), max_size=300), st.integers(1, 40))
def test_an_index_finds_what_a_dict_would(numbers: list[int], step: int) -> None:
    index, known = Index(), {}
    for start in range(0, len(numbers), step):
        some = np.array(numbers[start : start + step])
        places = index.find(keys_of(some))
        assert places.tolist() == [known.get(number, -1) for number in some.tolist()]
        new = np.unique(some[places < 0])
        known.update(zip(new.tolist(), index.add(keys_of(new)).tolist(), strict=True))
    kept = [place for number, place in known.items() if number % 3]
    index.keep(np.array(kept, dtype=np.int64))
    places = index.find(keys_of(np.arange(401))).tolist()
    for number, place in enumerate(places):
        assert place == (kept.index(known[number]) if number in known and number % 3 else -1)


@pytest.mark.parametrize("count", [8, 50])
def test_keys_that_look_alike_in_the_table_are_told_apart(count: int) -> None:
    # Equal in the half that says where they lie, and in the part that is compared first.
    second = np.arange(60, dtype=np.uint64) << np.uint64(32) | np.uint64(5)
    keys = np.stack([np.full(60, 126, dtype=np.uint64), second], axis=1)
    index = Index()
    index.add(keys[:count])
    assert index.find(keys).tolist() == [*range(count), *[-1] * (60 - count)]


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_a_value_is_the_same_after_it_was_taken_apart_and_put_together(data: st.DataObject) -> None:
    rows, inner, outer = (data.draw(st.integers(1, 4)) for _ in range(3))
    shape = data.draw(st.lists(st.integers(1, 4), max_size=3))
    dim = data.draw(st.integers(0, len(shape)))
    shape.insert(dim, rows * inner * outer)
    order = data.draw(st.permutations(range(len(shape))))
    value = torch.randn([shape[one] for one in order]).permute(list(np.argsort(order)))
    axis = Axis(dim, inner, outer)
    layout = RowLayout(tuple(value.shape), value.stride(), axis, rows)
    parts = layout.split(value)
    assert parts.shape[0] == rows
    joined = layout.join(parts.clone())
    assert torch.equal(joined, value)
    assert joined.stride() == value.stride()
    # A row is what the axis says that it is.
    row = data.draw(st.integers(0, rows - 1))
    one = axis.take(value, [row], rows)
    assert torch.equal(parts[row].sort().values, one.reshape(-1).sort().values)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_a_value_that_is_kept_with_its_batch_is_one_row(shape: tuple[int, ...]) -> None:
    value = torch.randn(shape)
    layout = RowLayout(shape, value.stride(), None, 1)
    assert layout.split(value).shape == (1, value.numel())
    assert torch.equal(layout.join(layout.split(value).clone()), value)


def test_bfloat16_integers_and_booleans_come_back_as_they_were() -> None:
    entries = Entries(1 << 20)
    for name, rows in (
        (b"a", torch.randn(4, 3).bfloat16()),
        (b"b", torch.arange(12).reshape(4, 3)),
        (b"c", torch.rand(4, 3) > 0.5),
        (b"d", torch.randn(4, 3, dtype=torch.complex64)),
    ):
        keys = keys_of(np.arange(4))
        assert entries.write(name, keys, rows) == 4
        assert entries.write(name, keys, rows) == 0
        table = entries.table(name)
        assert table is not None
        back = table.read(table.find(keys[[2, 0]]), 1)
        assert torch.equal(back, rows[[2, 0]])


def test_rows_that_were_used_lately_stay() -> None:
    row = torch.zeros(1, 64)
    entries = Entries(40 * (256 + 40))
    for number in range(200):
        entries.now += 1
        entries.write(b"t", keys_of(np.array([number])), row + number)
        table = entries.table(b"t")
        assert table is not None
        first = table.find(keys_of(np.array([0])))
        assert first[0] >= 0, f"the row that is always used is gone after {number}"
        assert table.read(first, entries.now)[0, 0] == 0
        assert entries.nbytes <= entries.max_bytes + 4096
    last = table.find(keys_of(np.array([199])))
    assert table.read(last, 0)[0, 0] == 199


def test_a_row_of_a_million_costs_less_than_64_bytes_beside_its_values() -> None:
    index = Index()
    numbers = np.arange(1_300_000)
    for some in np.array_split(numbers, 26):
        index.add(np.stack([some * 2654435761, some], axis=1).astype(np.uint64))
    assert (index.nbytes + 4 * len(numbers)) / len(numbers) <= 64


def test_keys_tell_rows_apart_by_every_input_and_by_nothing_else() -> None:
    ids, mask = torch.arange(12).reshape(3, 4), torch.ones(3, 4, dtype=torch.long)
    keys = row_keys([ids, mask], [], 3)
    assert len(np.unique(keys, axis=0)) == 3
    # The same rows in another order, in other memory.
    moved = row_keys([ids[[2, 0, 1]], mask.t().contiguous().t()], [], 3)
    assert (moved == keys[[2, 0, 1]]).all()
    mask[1, 3] = 0
    other = row_keys([ids, mask], [], 3)
    assert ((other == keys).all(axis=1) == [True, False, True]).all()
    shared = row_keys([ids], [torch.tensor(1.0)], 3)
    assert not (shared == row_keys([ids], [torch.tensor(2.0)], 3)).any()
    assert (batch_key(keys) != batch_key(keys[::-1])).any()
    assert row_keys([], [ids], 3).shape == (3, 2)


def test_large_rows_of_several_inputs_are_hashed_like_small_ones() -> None:
    x, y = torch.randn(2, 5000), torch.randn(2, 3)
    keys = row_keys([x, y], [], 2)
    y[0, 0] += 1
    assert ((row_keys([x, y], [], 2) == keys).all(axis=1) == [False, True]).all()
