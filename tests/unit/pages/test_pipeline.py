from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.memory_sources._page_map import PageMap
from qemu_dump_ext.pages import pipeline as page_pipeline
from qemu_dump_ext.pages import zero_pages
from qemu_dump_ext.pages.pipeline import PIECE_SIZE, PieceWork, cut, read_through

MIB = 1 << 20


class FakeMemory:
    name = "fake"
    is_slow = False

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.ranges = ranges

    def populated(self, gpa: int, size: int) -> list[tuple[int, int]]:
        clipped = [(max(low, gpa), min(high, gpa + size)) for low, high in self.ranges]
        return [(low, high) for low, high in clipped if low < high]

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        assert any(low <= gpa and gpa + len(buffer) <= high for low, high in self.ranges)
        buffer[:] = b"\x01" * len(buffer)

    def close(self) -> None:
        pass


@st.composite
def populations(draw: st.DrawFn) -> tuple[RamBlock, list[tuple[int, int]]]:
    start = draw(st.integers(0, 4)) * 4096 + draw(st.sampled_from([0, 0, 32]))
    size = draw(st.integers(1, 12 * MIB))
    cuts = sorted(draw(st.sets(st.integers(0, size // 4096), max_size=8)))
    aligned = (start + 4095) // 4096 * 4096
    points = [min(max(start, aligned + c * 4096), start + size) for c in cuts]
    pairs = list(zip(points[::2], points[1::2], strict=False))
    return RamBlock(start, size, "ram", 0), [(low, high) for low, high in pairs if low < high]


@settings(deadline=None)
@given(populations(), st.sampled_from([1, 4096, 65536]))
def test_pieces_cover_the_block_and_read_what_is_populated(population, page_size):
    block, ranges = population
    start = block.gpa // page_size * page_size
    end = -(-block.end // page_size) * page_size
    pieces = list(cut(FakeMemory(ranges), (block,), start, end, page_size))
    position = start
    extents: list[tuple[int, int]] = []
    for piece in pieces:
        assert piece.gpa == position
        assert (piece.gpa - start) % page_size == 0
        assert 0 < piece.size <= (PIECE_SIZE if piece.extents else page_pipeline.ZERO_PIECE_SIZE)
        filled = 0
        for extent in piece.extents:
            assert extent.offset == extent.gpa - piece.gpa >= filled
            filled = extent.offset + extent.size
            if extents and extents[-1][1] == extent.gpa:
                extents[-1] = (extents[-1][0], extent.gpa + extent.size)
            else:
                extents.append((extent.gpa, extent.gpa + extent.size))
        assert filled <= piece.size
        position += piece.size
    assert position == end
    joined: list[tuple[int, int]] = []
    for low, high in ranges:
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    assert extents == joined


@pytest.mark.parametrize("page_size", [4096, 1 << 20])
def test_memory_that_is_read_slowly_is_handled_in_smaller_pieces(page_size):
    memory = FakeMemory([(0, 8 * MIB)])
    memory.is_slow = True
    pieces = list(cut(memory, (RamBlock(0, 8 * MIB, "ram", 0),), 0, 8 * MIB, page_size))
    assert {piece.size for piece in pieces} == {max(256 << 10, page_size)}
    assert sum(piece.size for piece in pieces) == 8 * MIB


def test_results_come_in_order_and_holes_are_not_read():
    block = RamBlock(0, 3 << 30, "ram", 0)
    memory = FakeMemory([(0, 9 * MIB), (2 << 30, (2 << 30) + 4096)])
    seen: list[tuple[int, int | None]] = []
    total: list[int] = []
    work: PieceWork[tuple[int, int | None]] = PieceWork(
        lambda piece, buffer: (piece.gpa, bytes(buffer.view).strip(b"\1").count(0)),
        lambda piece: (piece.gpa, None),
        seen.append,
    )
    pieces = cut(memory, (block,), 0, block.end, 4096)
    read_through(memory, pieces, work, total.append, threads=3)
    assert sum(total) == block.size
    assert [gpa for gpa, _ in seen] == sorted(gpa for gpa, _ in seen)
    assert [zeros for _, zeros in seen if zeros is not None] == [0, 0, 0, 0]


def test_an_error_of_a_worker_comes_out():
    block = RamBlock(0, 64 * MIB, "ram", 0)
    memory = FakeMemory([(0, block.end)])

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    work: PieceWork[None] = PieceWork(fail, fail, lambda _: None)
    with pytest.raises(ZeroDivisionError):
        read_through(memory, cut(memory, (block,), 0, block.end, 4096), work, lambda _: None)


@settings(deadline=None)
@given(st.binary(max_size=64), st.integers(0, 3), st.data())
def test_zero_pages_are_found_with_and_without_numpy(noise, tail, data):
    pages = data.draw(st.lists(st.booleans(), min_size=1, max_size=40))
    content = b"".join(
        (bytes(64 * 3) + (noise or b"\1")).ljust(4096, b"\0") if full else bytes(4096)
        for full in pages
    )
    content += noise * tail
    view = memoryview(bytearray(content))
    zero_pages.numpy_or_none()
    whole = view[: len(pages) * 4096]
    found = zero_pages.pages_with_content(whole, 4096)
    runs = zero_pages.runs_with_content(view, 4096, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_pages, "numpy_if_loaded", lambda: None)
        assert zero_pages.pages_with_content(whole, 4096) == found
        assert zero_pages.runs_with_content(view, 4096, 3) == runs
    assert found == [n for n in range(len(pages)) if any(whole[n * 4096 : (n + 1) * 4096])]
    rebuilt = bytearray(len(content))
    for start, end in runs:
        assert 0 <= start < end <= len(content)
        rebuilt[start:end] = view[start:end]
    assert rebuilt == content


def test_the_page_map_tells_what_was_written_and_what_was_only_read():
    page = mmap.PAGESIZE
    area = mmap.mmap(-1, 64 * page, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    for number in (0, 5, 6, 63):
        area[number * page] = 1
    assert area[20 * page] == 0  # the kernel's page of zeros is there now
    anchor = ctypes.c_char.from_buffer(area)
    start = ctypes.addressof(anchor)

    def relative(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [((low - start) // page, (high - start) // page) for low, high in ranges]

    page_map = PageMap(os.getpid())
    try:
        assert relative(page_map._read(start, start + 64 * page)) == [
            (0, 1),
            (5, 7),
            (20, 21),
            (63, 64),
        ]
        for alike, found in (((0, 1), [(0, 1)]), ((24, 60), [])):
            low, high = (start + number * page for number in alike)
            assert relative(page_map._read(low, high)) == found
        try:
            scanned = page_map._scan(start, start + 64 * page)
        except OSError:
            pytest.skip("before Linux 6.7")
        assert relative(scanned) == [(0, 1), (5, 7), (63, 64)]
    finally:
        page_map.close()
        del anchor
        area.close()
