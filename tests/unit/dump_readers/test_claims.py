"""Small files that claim to be large: what they do not hold costs neither time nor memory.

Each would keep its reader busy for minutes, or take gigabytes, if its claims were believed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.dump_readers.kdump import KdumpFile
from qemu_dump_ext.engine.dmesg import read_log
from qemu_dump_ext.engine.inspect import describe
from qemu_dump_ext.engine.stored_guest import StoredGuest
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import DumpError
from tests.support.peak_memory import forget_peak, peak
from tests.support.sample_elf import Load, make_elf
from tests.support.sample_kdump import BLOCK, make_kdump, note

MIB, TIB = 1 << 20, 1 << 40
PAGES = 1 << 33
BLOCKS = 2 * (PAGES // 8 // BLOCK)
SECOND_PHDR = 64 + 2 * 64 + 56


def kdump(bits: bytes) -> tuple[bytes, int, dict[int, bytes]]:
    """Two bitmaps of a GiB each in a hole of a terabyte, but for `bits` of the second."""
    head = bytearray(make_kdump({0: b"a" * BLOCK}).data[: 2 * BLOCK])
    struct.pack_into("<I", head, 428 + 8, BLOCKS)
    struct.pack_into("<Q", head, BLOCK + 96, PAGES)
    head[5 * 65 + 12 - 65 : 5 * 65 + 12] = b"x86_64".ljust(65, b"\0")
    return bytes(head), TIB, {2 * BLOCK + BLOCKS // 2 * BLOCK: bits}


def elf_of_any_size() -> tuple[bytes, int, dict[int, bytes]]:
    elf = make_elf([Load(0, b"a" * 4096)])
    struct.pack_into("<QQ", elf, SECOND_PHDR + 32, 4 * TIB, 4 * TIB)
    return bytes(elf), 5 * TIB, {}


def elf_of_empty_program_headers() -> tuple[bytes, int, dict[int, bytes]]:
    elf = make_elf([Load(0, b"a" * 4096)], xnum=True, sections_first=False)
    struct.pack_into("<I", elf, 64 + 2 * 56 + 44, 1 << 20)
    return bytes(elf), TIB, {}


def elf_of_empty_notes(size: int) -> tuple[bytes, int, dict[int, bytes]]:
    elf = make_elf([Load(0, b"a" * 4096)], notes=note(b"", 0, b""))
    struct.pack_into("<QQ", elf, SECOND_PHDR - 56 + 8, MIB, 0)
    struct.pack_into("<Q", elf, SECOND_PHDR - 56 + 32, size)
    return bytes(elf), TIB, {}


CLAIMS: dict[str, Callable[[], tuple[bytes, int, dict[int, bytes]]]] = {
    "bitmaps without a bit": lambda: kdump(b""),
    "a page that is everywhere": lambda: kdump(b"\xff" * (MIB >> 1)),
    "ranges of one page": lambda: kdump(b"\x55" * (64 << 10)),
    "memory in a hole": elf_of_any_size,
    "program headers in a hole": elf_of_empty_program_headers,
    "notes in a hole": lambda: elf_of_empty_notes(48 * MIB),
    "notes of gigabytes": lambda: elf_of_empty_notes(TIB >> 1),
}


@pytest.fixture(params=CLAIMS)
def claimed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    head, size, places = CLAIMS[request.param]()
    path = tmp_path / "dump"
    path.write_bytes(head)
    os.truncate(path, size)
    with path.open("r+b") as file:
        for offset, content in places.items():
            file.seek(offset)
            file.write(content)
    return path


@pytest.mark.parametrize("use", ["inspect", "verify", "dmesg"])
def test_claims_cost_nothing(claimed: Path, use: str):
    uses: dict[str, Callable[[], object]] = {
        "inspect": lambda: describe("dump", dump),
        "verify": lambda: verify_dump(dump),
        "dmesg": lambda: read_log(StoredGuest(dump, search_seconds=1)),
    }
    before = forget_peak()
    with open_dump(claimed) as dump:
        try:
            uses[use]()
        except DumpError as error:
            assert len(str(error)) < 300  # noqa: PT017 - it may also pass
    assert peak() - before < 400 * MIB


def test_pages_behind_holes_of_a_bitmap_are_found(tmp_path: Path):
    """A bit in the middle of a hole, and the descriptor that is its own."""
    far = PAGES // 2 + 12345
    head, size, _ = kdump(b"")
    path = tmp_path / "dump"
    path.write_bytes(head)
    os.truncate(path, size)
    bitmaps, descriptors = 2 * BLOCK, (2 + BLOCKS) * BLOCK
    with path.open("r+b") as file:
        for number in (0, 1):
            for pfn in (3, far):
                file.seek(bitmaps + number * PAGES // 8 + pfn // 8)
                file.write(bytes([1 << pfn % 8]))
        file.seek(descriptors)
        data = descriptors + 2 * 24
        file.write(struct.pack("<qIIQ", data, BLOCK, 0, 0))
        file.write(struct.pack("<qIIQ", data + BLOCK, BLOCK, 0, 0))
        file.write(bytes(BLOCK) + b"far!" * (BLOCK // 4))
    with open_dump(path) as dump:
        assert isinstance(dump, KdumpFile)
        assert list(dump.memory_ranges()) == [(3 * BLOCK, BLOCK), (far * BLOCK, BLOCK)]
        assert dump.read(far * BLOCK, 4) == b"far!"
        counts = dump.count_pages()
        assert (counts.zero, counts.raw, counts.lost) == (1, 1, 0)
        assert [p for p in verify_dump(dump).problems if "max_mapnr" not in p] == []
