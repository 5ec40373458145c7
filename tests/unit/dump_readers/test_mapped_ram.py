"""Streams by the capability mapped-ram, made by hand, good ones and hostile ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import CorruptDumpError, DumpError
from qemu_dump_ext.structures.migration import StreamBuffer, parse_stream
from tests.support.leftovers import nothing_left
from tests.support.sample_migration import PAGE, make_mapped

_BASE = 0x80000000
_CONTENT = b"\1" * PAGE + bytes(70 * PAGE) + b"\2" * PAGE


def test_pages_are_at_their_places(tmp_path: Path):
    path = tmp_path / "s"
    path.write_bytes(make_mapped(_CONTENT))
    with nothing_left(), open_dump(path) as dump:
        assert dump.format == "migration"
        assert list(dump.memory_ranges()) == [(_BASE, 72 * PAGE)]
        assert dump.read(_BASE, 72 * PAGE) == _CONTENT
        assert dump.populated(_BASE, 72 * PAGE) == [
            (_BASE, _BASE + PAGE),
            (_BASE + 71 * PAGE, _BASE + 72 * PAGE),
        ]
        report = verify_dump(dump)
        assert not report.problems
        assert (report.raw_pages, report.zero_pages) == (2, 70)


def test_a_page_that_is_not_in_the_map_is_zero_whatever_the_file_has_there(tmp_path: Path):
    path = tmp_path / "s"
    path.write_bytes(make_mapped(_CONTENT, bitmap=b"\1" + bytes(15)))
    with open_dump(path) as dump:
        assert dump.read(_BASE, 72 * PAGE) == _CONTENT[:PAGE] + bytes(71 * PAGE)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (make_mapped(_CONTENT, version=2), "a map of pages of version 2, of 0x1000 bytes each"),
        (make_mapped(_CONTENT, page_size=0), "of version 1, of 0x0 bytes each"),
        (make_mapped(_CONTENT, page_size=1 << 40), "bytes each"),
        (make_mapped(_CONTENT, bitmap_place=0), "tells of offset 0x0"),
        (make_mapped(_CONTENT, pages_place=40), "tells of offset 0x28"),
        (make_mapped(_CONTENT, bitmap_place=(1 << 64) - 8), "tells of offset 0xfffffffffffffff8"),
        (make_mapped(_CONTENT, pages_place=1 << 63), "tells of offset 0x8000000000000000"),
        (make_mapped(_CONTENT, bitmap_place=1 << 50, pages_place=1 << 51), "beyond the dump's end"),
        (make_mapped(_CONTENT, pages_place=1 << 50), "beyond the dump's end"),
        (make_mapped(_CONTENT, bitmap=bytes(15) + b"\x80"), "a page at 0x7f000 of a RAM block"),
        (make_mapped(_CONTENT)[: 20 * PAGE], "beyond the dump's end"),
        (make_mapped(_CONTENT)[:-1], "does not describe its devices"),
        (make_mapped(_CONTENT)[:120], "the stream ends at offset 0x78"),
    ],
)
def test_a_map_that_cannot_be_is_told(data: bytes, reason: str, tmp_path: Path):
    path = tmp_path / "s"
    path.write_bytes(data)
    with nothing_left(), pytest.raises(DumpError) as caught:
        open_dump(path)
    assert reason in str(caught.value)


class _Nothing:
    def begin(self, *_: object) -> None: ...
    def page(self, *_: object) -> None: ...
    def fill(self, *_: object) -> None: ...


def test_a_pipe_cannot_have_it():
    rest = memoryview(make_mapped(_CONTENT))

    def fill(buffer: memoryview) -> int:
        nonlocal rest
        count = min(len(buffer), len(rest))
        buffer[:count] = rest[:count]
        rest = rest[count:]
        return count

    with pytest.raises(CorruptDumpError, match="mapped-ram, which need a file"):
        parse_stream(StreamBuffer(fill), _Nothing())
