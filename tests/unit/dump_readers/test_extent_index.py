from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from qemu_dump_ext.dump_readers import _extent_index as extent_index
from qemu_dump_ext.dump_readers._extent_index import ExtentIndex

EXTENTS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=12)


@given(EXTENTS, st.integers(0, 90), st.integers(0, 90), st.sampled_from([1, 3, 1 << 16]))
def test_equals_a_byte_array_that_is_written_over(extents, start, size, at_once):
    index = ExtentIndex()
    model: list[int | None] = [None] * 200
    place = 0
    for first, length in extents:
        index.append(first, length, place)
        model[first : first + length] = range(place, place + length)
        place += length + 7
    original, extent_index._SORT_AT_ONCE = extent_index._SORT_AT_ONCE, at_once
    try:
        index.settle()
    finally:
        extent_index._SORT_AT_ONCE = original
    found: list[int | None] = []
    for length, where in index.pieces(start, size):
        assert length > 0
        found += [None] * length if where is None else range(where, where + length)
    assert found == model[start : start + size]
    covered = [
        position for first, length in index.ranges() for position in range(first, first + length)
    ]
    assert covered == [position for position, where in enumerate(model) if where is not None]
    ranges = list(index.ranges())
    assert all(a + b < c for (a, b), (c, _) in pairwise(ranges))


def test_highest_addresses():
    index = ExtentIndex()
    index.append((1 << 64) - 4096, 4096, 5)
    index.settle()
    assert list(index.pieces((1 << 64) - 1, 1)) == [(1, 4100)]
    assert list(index.pieces(0, 1)) == [(1, None)]
