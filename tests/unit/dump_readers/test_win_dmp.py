"""Dumps of Windows with a bitmap, made by hand; those with runs are in tests/contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_dump_ext.dump_readers import open_dump, win_dmp
from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.structures.win_dmp import (
    DUMP_TYPE_BITMAP_FULL,
    HEADERS,
    PAGE_SIZE,
    SIGNATURE,
    SUMMARY,
    SUMMARY_VALID_DUMP,
    VALID_DUMP,
)


def _dump_with_bitmap(path: Path, bitmap: bytes) -> Path:
    layout = HEADERS[8]
    pages = sum(byte.bit_count() for byte in bitmap)
    header = layout.pack(
        Signature=SIGNATURE, ValidDump=VALID_DUMP[8], DumpType=DUMP_TYPE_BITMAP_FULL
    )
    summary = SUMMARY.pack(
        Signature=b"SDMP",
        ValidDump=SUMMARY_VALID_DUMP,
        HeaderSize=layout.size + SUMMARY.size + len(bitmap),
        Pages=pages,
        BitmapSize=8 * len(bitmap),
    )
    path.write_bytes(header + summary + bitmap + bytes(pages * PAGE_SIZE))
    return path


def test_pages_in_more_runs_than_a_guest_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(win_dmp, "_RUNS_MAX", 8)
    with open_dump(_dump_with_bitmap(tmp_path / "few", b"\x55" * 2)) as dump:
        assert len(list(dump.memory_ranges())) == 8
    with pytest.raises(CorruptDumpError, match="more than 8 runs of pages: no guest has so many"):
        open_dump(_dump_with_bitmap(tmp_path / "many", b"\x55\x55\1"))
