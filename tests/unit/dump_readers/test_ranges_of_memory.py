"""Memory without a dump's headers: LiME, AVML, plain RAM, and the core of a QEMU."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest

from qemu_dump_ext.cli import main
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.dump_readers._image import PlainImage
from qemu_dump_ext.dump_readers.raw import parse_layout
from qemu_dump_ext.engine.stored_guest import StoredGuest
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import CorruptDumpError, NotADumpError, RequestError
from qemu_dump_ext.linux import vmcoreinfo_search
from tests.support.sample_ranges import (
    RAM_SIZE,
    make_avml,
    make_lime,
    make_qemu_core,
    ram_with_kernel,
)

MIB = 1 << 20
RAM = ram_with_kernel()
BLOCKS = {0x1000: b"first" * 2000, 0x100000: hashlib.shake_128(b"second").digest(230_400)}
_GUEST_BLOCKS = {0: RAM[: 3 * MIB], 3 * MIB: RAM[3 * MIB :]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "dump"


@pytest.mark.parametrize("make", [make_lime, make_avml])
def test_every_range_is_read(path: Path, make):
    path.write_bytes(make(BLOCKS))
    with open_dump(path) as dump:
        assert [gpa for gpa, _ in dump.memory_ranges()] == sorted(BLOCKS)
        for gpa, content in BLOCKS.items():
            assert dump.read(gpa, len(content)) == content
            assert dump.read(gpa + 4321, 3000) == content[4321:7321]
        assert verify_dump(dump).problems == []


@pytest.mark.parametrize("make", [make_lime, make_avml])
@pytest.mark.parametrize("missing", [1, 9, 5000, 70_000])
def test_of_a_file_that_is_cut_what_is_there_is_read(path: Path, make, missing: int):
    content = make(BLOCKS)
    path.write_bytes(content[:-missing])
    with open_dump(path) as dump:
        ranges = list(dump.readable_ranges())
        assert ranges[0] == (0x1000, len(BLOCKS[0x1000]))
        for gpa, size in ranges:
            start = max(at for at in BLOCKS if at <= gpa)
            assert dump.read(gpa, size) == BLOCKS[start][gpa - start :][:size]
        assert verify_dump(dump).problems


def test_what_stands_between_ranges_is_told(path: Path):
    content = bytearray(make_lime(BLOCKS))
    second = 32 + len(BLOCKS[0x1000])
    content[second : second + 4] = b"what"
    path.write_bytes(content)
    with open_dump(path) as dump:
        assert list(dump.memory_ranges()) == [(0x1000, len(BLOCKS[0x1000]))]
        assert f"offset {second:#x}" in verify_dump(dump).problems[0]


def test_a_damaged_chunk_is_told(path: Path):
    content = bytearray(make_avml({0x1000: b"text " * 4000}))
    content[-200] ^= 0xFF
    path.write_bytes(content)
    with open_dump(path) as dump:
        with pytest.raises(CorruptDumpError, match="chunk at offset"):
            dump.read(0x1000, 20_000)
        assert verify_dump(dump).problems


@pytest.mark.parametrize("content", [b"text " * 4000, hashlib.shake_128(b"").digest(20_000)])
@pytest.mark.parametrize("place", [4, 5000])
def test_a_chunk_of_another_checksum_is_damaged(path: Path, content: bytes, place: int):
    """Packed, and stored as it is where it cannot be made smaller."""
    whole = bytearray(make_avml({0x1000: content}))
    chunk = 32 + 10
    place = min(place, len(whole) - chunk - 9)
    whole[chunk + place] ^= 1
    path.write_bytes(whole)
    with open_dump(path) as dump:
        assert f"chunk at offset {chunk:#x}: " in verify_dump(dump).problems[0]
        with pytest.raises(CorruptDumpError, match="chunk at offset 0x2a"):
            dump.read(0x1000, 20_000)


def test_a_range_of_no_size_is_none(path: Path):
    path.write_bytes(struct.pack("<IIQQQ", 0x4C694D45, 1, 0x2000, 0x1000, 0) + bytes(5000))
    with pytest.raises(CorruptDumpError, match="offset 0x0"):
        open_dump(path)


@pytest.mark.parametrize("make", [make_lime, make_avml])
def test_the_kernel_tells_of_what_target_it_is(path: Path, make):
    path.write_bytes(make(_GUEST_BLOCKS))
    with open_dump(path) as dump:
        guest = StoredGuest(dump)
        assert guest.architecture.name == "x86_64"
        assert guest.find_vmcoreinfo().text.startswith(b"OSRELEASE=6.1.0\n")
        assert guest.lacking == ("the earlier dump has no registers",)


@pytest.mark.parametrize("written", ["raw", "core", "core in parts"])
def test_the_kernel_tells_where_ram_lies(path: Path, written: str):
    path.write_bytes(RAM if written == "raw" else make_qemu_core(RAM, parts=1 + len(written) // 9))
    with open_dump(path) as dump:
        assert dump.reader == ("raw" if written == "raw" else "qemu_core")
        assert list(dump.memory_ranges()) == [(0, RAM_SIZE)]
        assert dump.read(0, RAM_SIZE) == RAM
        assert StoredGuest(dump).architecture.name == "x86_64"
        assert dump.notes == ()


def test_of_a_core_that_is_cut_what_is_there_is_read(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vmcoreinfo_search, "_CHUNK", MIB)  # the end, which is missing, comes first
    whole = make_qemu_core(RAM)
    # Its stack, the names of its sections, and the end of the guest's memory are missing.
    path.write_bytes(whole[: whole.index(RAM) + 3 * MIB])
    with open_dump(path) as dump:
        assert dump.reader == "qemu_core"
        assert list(dump.readable_ranges()) == [(0, 3 * MIB)]
        assert dump.read(0, 3 * MIB) == RAM[: 3 * MIB]
        assert verify_dump(dump).problems


def test_a_mapping_that_claims_more_than_the_file_is_searched_where_it_is_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    core = bytearray(make_qemu_core(RAM))
    (offset,) = struct.unpack_from("<Q", core, 32)
    struct.pack_into("<Q", core, offset + 56 + 32, 1 << 47)  # p_filesz of QEMU's program
    path.write_bytes(core)
    reads: list[int] = []
    read_into = PlainImage.read_into

    def counted(image: PlainImage, offset: int, buffer: memoryview) -> None:
        reads.append(offset)
        assert len(reads) < 5000
        read_into(image, offset, buffer)

    monkeypatch.setattr(PlainImage, "read_into", counted)
    with open_dump(path) as dump:
        assert dump.reader == "qemu_core"
        assert dump.read(0, len(RAM)) == RAM


@pytest.mark.parametrize("make", [bytes, make_qemu_core])
def test_ram_without_a_kernel_is_no_dump(path: Path, make):
    path.write_bytes(make(bytes(2 * MIB) + b"no kernel" * 1000))
    with pytest.raises(NotADumpError, match="no kernel"):
        open_dump(path)


def test_a_layout_that_is_given_is_believed(path: Path, tmp_path: Path):
    path.write_bytes(b"low" * 4096 + b"high" * 4096)
    with open_dump(path, layout="0x80000000:16K@12K,0x1000:12K@0") as dump:
        assert list(dump.memory_ranges()) == [(0x1000, 12 << 10), (0x80000000, 16 << 10)]
        assert dump.read(0x80000000, 8) == b"highhigh"
        assert dump.read(0x1000, 6) == b"lowlow"
    layout = ["--layout", "0:28K", "--target", "riscv64"]
    assert main(["convert", str(path), str(tmp_path / "elf"), *layout]) == 6
    with open_dump(tmp_path / "elf") as dump:
        assert dump.header["e_machine"] == 243
        assert dump.read(0, 28 << 10) == path.read_bytes()


@pytest.mark.parametrize(
    ("layout", "size", "windows"),
    [
        ("q35", 1 << 30, [(0, 0, 1 << 30)]),
        ("pc-q35", 4 << 30, [(0, 0, 2 << 30), (4 << 30, 2 << 30, 2 << 30)]),
        ("i440fx", 4 << 30, [(0, 0, 3 << 30), (4 << 30, 3 << 30, 1 << 30)]),
        ("aarch64/virt", 1 << 30, [(1 << 30, 0, 1 << 30)]),
        ("0:1G,4G:1G", 2 << 30, [(0, 0, 1 << 30), (4 << 30, 1 << 30, 1 << 30)]),
        ("0x1f000:0x1F", 0x1F, [(0x1F000, 0, 0x1F)]),
    ],
)
def test_layouts(layout: str, size: int, windows: list[tuple[int, int, int]]):
    assert list(parse_layout(layout, size)) == windows


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ("q36", "no machine 'q36'"),
        ("virt", "several targets"),
        ("mips/q35", "no machine 'mips/q35' of mips"),
        ("0:", "'' is no number"),
        ("0:0", "no range of memory"),
        ("0:1M", "ends at offset 0x100000, the file at 0x1000"),
        ("0:2K,0x400:2K", "two ranges have the address 0x400"),
        ("0:2K,,", "'' is no number"),
        ("0xffffffffffffffff:4K", "no range of memory"),
        ("99999999999999999999:4K", "is no number"),
        ("16777216T:4K", "is no number"),
    ],
)
def test_layouts_that_are_none(layout: str, reason: str):
    with pytest.raises(RequestError, match=reason):
        parse_layout(layout, 4096)
