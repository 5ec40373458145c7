"""Descriptors and data of pages, with and without numpy."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from qemu_dump_ext.dump_formats import _kdump_pages, kdump
from qemu_dump_ext.dump_formats._kdump_pages import BulkPageWriter, PageForm
from qemu_dump_ext.pages.packing import Packer
from qemu_dump_ext.pages.page_packing import Compression
from qemu_dump_ext.pages.pipeline import Buffer, Extent, Piece
from qemu_dump_ext.structures.c_struct import Abi
from qemu_dump_ext.structures.kdump import PAGE_DESCRIPTOR

_PAGE = 4096
_DATA = 1 << 16
_DESCRIPTOR = PAGE_DESCRIPTOR.bind(Abi("little", 8, 8))
_NOISE = [bytes((7 * n + n * n * number) % 251 for n in range(_PAGE)) for number in range(1, 4)]


def _written(
    monkeypatch: pytest.MonkeyPatch,
    pieces: list[list[bytes]],
    *,
    by: ModuleType | None,
    once: bool,
    keep_zero_pages: bool = True,
    index_of: Callable[[int], int] | None = None,
) -> tuple[bytes, BulkPageWriter]:
    monkeypatch.setattr(_kdump_pages, "numpy_if_loaded", lambda: by)
    file = bytearray()

    def write_at(offset: int, data: bytes | memoryview) -> None:
        file.extend(bytes(max(0, offset + len(data) - len(file))))
        file[offset : offset + len(data)] = data

    form = PageForm(_PAGE, _DESCRIPTOR, 1, keep_zero_pages=keep_zero_pages)
    packer = Packer(Compression("zlib"))
    writer = BulkPageWriter(
        form,
        packer,
        write_at,
        descriptor_offset=0,
        data_offset=_DATA,
        once=once,
        index_of=index_of,
    )
    work, gpa = writer.work(), 0
    for pages in pieces:
        content = bytearray(b"".join(pages))
        piece = Piece(gpa, len(content), (Extent(gpa, len(content), 0),))
        work.consume(work.pack(piece, Buffer(memoryview(content))))
        gpa += len(content)
    writer.finish()
    return bytes(file), writer


def _descriptors(file: bytes, count: int) -> list[tuple[int, int]]:
    found = (_DESCRIPTOR.unpack_integers(file, n * _DESCRIPTOR.size) for n in range(count))
    return [(one["offset"], one["size"]) for one in found]


_ZEROS = bytes(_PAGE)
_PIECES = [[_NOISE[0], _ZEROS, _NOISE[1], _NOISE[0]], [_NOISE[1], _NOISE[2], _ZEROS]]


def test_equal_pages_are_stored_once_without_numpy(monkeypatch):
    file, _ = _written(monkeypatch, _PIECES, by=None, once=True)
    one, zero, two, again, other, three, zeros = _descriptors(file, 7)
    assert (one, two, zero) == (again, other, zeros)
    assert len({one, two, three, zero}) == 4
    assert len(file) == _DATA + _PAGE + one[1] + two[1] + three[1]


@pytest.mark.parametrize("keep", [True, False])
def test_the_same_is_written_with_and_without_numpy(monkeypatch, keep):
    (file, writer), (other, its) = (
        _written(monkeypatch, _PIECES, by=by, once=False, keep_zero_pages=keep) for by in (None, np)
    )
    assert file == other
    assert (
        writer.bitmap == its.bitmap == ({} if keep else {0: bytearray(b"\x3d".ljust(_PAGE, b"\0"))})
    )


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(_kdump_pages, "_REMEMBERED", _PAGE)
    file, _ = _written(monkeypatch, _PIECES, by=None, once=True)
    one, _zero, two, again, other, *_ = _descriptors(file, 7)
    assert one == again
    assert two != other


def test_two_pieces_may_share_a_byte_of_the_bitmap(monkeypatch):
    pieces = [[_NOISE[0]] * 3, [_ZEROS, _NOISE[1]], [_NOISE[2]] * 9]
    _, writer = _written(monkeypatch, pieces, by=None, once=True, keep_zero_pages=False)
    assert writer.bitmap == {0: bytearray(b"\xf7\x3f".ljust(_PAGE, b"\0"))}


def _piece(number: int, *, full: bool) -> Piece:
    return Piece(number * _PAGE, _PAGE, (Extent(number * _PAGE, _PAGE, 0),) if full else ())


def test_pieces_of_zeros_lie_evenly_between_others(monkeypatch):
    pieces = [_piece(number, full=number < 3) for number in range(9)]
    order = [piece.gpa // _PAGE for piece in kdump.with_zeros_between(iter(pieces))]
    assert order == [0, 3, 4, 1, 5, 6, 2, 7, 8]
    monkeypatch.setattr(kdump, "_LOOKAHEAD", 2)
    order = [piece.gpa // _PAGE for piece in kdump.with_zeros_between(iter(pieces))]
    assert order == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    zeros = [_piece(number, full=False) for number in range(3)]
    assert list(kdump.with_zeros_between(iter(zeros))) == zeros


def test_descriptors_are_where_they_belong_in_any_order_of_the_pieces(monkeypatch):
    runs = [kdump.PageRun(0, 4, ()), kdump.PageRun(16, 20, ())]
    index_of = kdump.page_index(runs)
    assert [index_of(pfn) for pfn in (0, 3, 16, 19)] == [0, 3, 4, 7]
    pieces = [[_NOISE[0]], [_NOISE[1]]]
    forth, _ = _written(monkeypatch, pieces, by=np, once=False, index_of=lambda pfn: pfn)
    back, _ = _written(monkeypatch, pieces, by=np, once=False, index_of=lambda pfn: 1 - pfn)
    assert _descriptors(forth, 2) == _descriptors(back, 2)[::-1]
