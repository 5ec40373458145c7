"""Each kind of damage is found; what is whole or merely odd is not called damaged."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import sys
from collections.abc import Callable

import pytest

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.dump_readers._verify_report import PROBLEMS_KEPT, VerifyReport
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import CodecUnavailableError, CorruptDumpError
from qemu_dump_ext.page_codecs import all_page_codecs
from tests.support.sample_elf import Load, make_elf
from tests.support.sample_kdump import (
    BLOCK,
    FLAT_END,
    ZERO,
    SampleKdump,
    flatten,
    make_kdump,
    note,
    prstatus,
)

RANDOM_PAGE = hashlib.shake_128(b"page").digest(BLOCK)
PAGES = {
    pfn: hashlib.shake_128(b"%d" % pfn).digest(BLOCK // 2) * (1 + pfn % 2) + ZERO
    for pfn in range(0, 600, 2)
}
PAGES = {pfn: page[:BLOCK] for pfn, page in PAGES.items()} | {1: ZERO, 5: ZERO, 7: RANDOM_PAGE}
LOADS = [Load(0x1000, b"a" * 5000), Load(0x100000, b"b" * 3000)]


@pytest.fixture
def verify(tmp_path):
    def verify_(data: bytes) -> VerifyReport:
        path = tmp_path / "dump"
        path.write_bytes(data)
        with open_dump(path) as dump:
            return verify_dump(dump)

    return verify_


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("word", "packed"), [(8, False), (4, True), (4, False)])
@pytest.mark.parametrize("wrap", [bytes, flatten])
def test_whole_kdump(verify, order, word, packed, wrap):
    sample = make_kdump(PAGES, order=order, word=word, packed=packed, vmcoreinfo=b"A=1", nr_cpus=3)
    assert verify(wrap(sample.data)) == VerifyReport(
        memory_bytes=len(PAGES) * BLOCK,
        counts_pages=True,
        zero_pages=2,
        raw_pages=1,
        packed_pages=300,
    )


@pytest.mark.parametrize(
    "pages",
    [
        {0: ZERO},
        {3: ZERO, 4: ZERO},
        {0: RANDOM_PAGE},
        {9: b"text" * 1024},
        {n: b"%04d" % n * 1024 for n in range(1000)},
    ],
    ids=["one zero", "zero only", "raw only", "packed only", "many"],
)
def test_whole_kdump_of_few_kinds_of_pages(verify, pages):
    report = verify(make_kdump(pages).data)
    assert (report.problems, report.remarks) == ([], [])
    assert report.memory_bytes == len(pages) * BLOCK


def test_whole_kdump_whose_pages_share_data(verify):
    pages = PAGES | {11: PAGES[8], 13: RANDOM_PAGE, 301: PAGES[300], 599: PAGES[0]}
    sample = make_kdump(pages, share=True)
    assert len(sample.data) == len(make_kdump(PAGES).data) + 4 * 24
    report = verify(sample.data)
    assert (report.problems, report.remarks, report.packed_pages) == ([], [], 303)


def test_whole_kdump_without_a_page_of_zeroes(verify):
    """A writer that needs none may leave it out."""
    sample = make_kdump({1: RANDOM_PAGE, 2: b"text" * 1024})
    del sample.data[sample.page_data : sample.page_data + BLOCK]
    for at in (sample.descriptors, sample.descriptors + 24):
        (offset,) = struct.unpack_from("<q", sample.data, at)
        struct.pack_into("<q", sample.data, at, offset - BLOCK)
    report = verify(sample.data)
    assert (report.problems, report.remarks) == ([], [])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("word", [4, 8])
@pytest.mark.parametrize("sections_first", [True, False])
@pytest.mark.parametrize("wrap", [bytes, flatten])
def test_whole_elf(verify, order, word, sections_first, wrap):
    data = make_elf(LOADS, order=order, word=word, sections_first=sections_first)
    assert verify(wrap(data)) == VerifyReport(memory_bytes=8000)


def descriptor_of(sample: SampleKdump, pfn: int) -> int:
    return sample.descriptors + 24 * sorted(PAGES).index(pfn)


def with_descriptor(pfn: int, position: int, form: str, value: int):
    def damage(sample: SampleKdump) -> None:
        struct.pack_into(f"<{form}", sample.data, descriptor_of(sample, pfn) + position, value)

    return damage


def with_bytes(place: str, position: int, form: str, value: int):
    def damage(sample: SampleKdump) -> None:
        start = getattr(sample, place) if place != "data" else 0
        struct.pack_into(f"<{form}", sample.data, start + position, value)

    return damage


def cut(size: int):
    def damage(sample: SampleKdump) -> None:
        del sample.data[-size:]

    return damage


def flip_page_byte(sample: SampleKdump) -> None:
    (offset,) = struct.unpack_from("<q", sample.data, descriptor_of(sample, 8))
    sample.data[offset + 100] ^= 1


def share_page(sample: SampleKdump) -> None:
    one, other = descriptor_of(sample, 10), descriptor_of(sample, 200)
    sample.data[one : one + 24] = sample.data[other : other + 24]


def share_part_of_page(sample: SampleKdump) -> None:
    (offset,) = struct.unpack_from("<q", sample.data, descriptor_of(sample, 7))
    struct.pack_into("<qI", sample.data, descriptor_of(sample, 8), offset + 2048, BLOCK)
    struct.pack_into("<I", sample.data, descriptor_of(sample, 8) + 12, 0)


def without_bit(*bitmaps: int):
    def damage(sample: SampleKdump) -> None:
        for number in bitmaps:
            sample.data[sample.bitmaps + number * sample.bitmap_size + 50] ^= 1 << 2

    return damage


def with_extra_bit(*bitmaps: int):
    def damage(sample: SampleKdump) -> None:
        for number in bitmaps:
            sample.data[sample.bitmaps + number * sample.bitmap_size + 50] ^= 1 << 3

    return damage


KDUMP_DAMAGE = {
    "cut tail": (cut(1), "outside the data"),
    "cut in the data": (cut(20000), "outside the data"),
    "flipped byte in a page": (flip_page_byte, "page 0x8: page data at offset"),
    "flipped byte in the page of zeroes": (with_bytes("page_data", 9, "B", 1), "is not zero"),
    "offset beyond": (with_descriptor(8, 0, "q", 1 << 40), "page 0x8: descriptor with offset"),
    "offset negative": (with_descriptor(8, 0, "q", -1), "page 0x8: descriptor with offset"),
    "offset in the headers": (with_descriptor(8, 0, "q", 4096), "page 0x8: descriptor with offset"),
    "offset of another page": (share_page, "2126 bytes among the page data belong"),
    "offset into another page": (share_part_of_page, "page 0x8: its data at offset"),
    "size 0": (with_descriptor(8, 8, "I", 0), "page 0x8: descriptor of 0x0 bytes"),
    "size of 4 GiB": (with_descriptor(8, 8, "I", 0xFFFFFFFF), "page 0x8: descriptor of 0xffffffff"),
    "size too small": (with_descriptor(8, 8, "I", 100), "page 0x8: page data at offset"),
    "raw of half a page": (with_descriptor(7, 8, "I", 2048), "page 0x7: descriptor of 0x800 bytes"),
    "unknown codec": (with_descriptor(8, 12, "I", 0x40), "page 0x8: descriptor with unknown flags"),
    "two codecs": (with_descriptor(8, 12, "I", 3), "page 0x8: descriptor with unknown flags"),
    "wrong codec": (with_descriptor(8, 12, "I", 4), "page 0x8: page data at offset"),
    "lost page": (
        lambda sample: sample.data.__setitem__(
            slice(descriptor_of(sample, 8), descriptor_of(sample, 8) + 24), bytes(24)
        ),
        "page 0x8: empty descriptor",
    ),
    "bit missing in the second bitmap": (without_bit(1), "bitmap and descriptors disagree"),
    "bit missing in both bitmaps": (without_bit(0, 1), "bitmap and descriptors disagree"),
    "bit missing in the first bitmap": (without_bit(0), "in the second bitmap only"),
    "bit too many in the second bitmap": (with_extra_bit(1), "in the second bitmap only"),
    "bit too many in both bitmaps": (with_extra_bit(0, 1), "outside the data"),
    "max_mapnr too small": (with_bytes("data", BLOCK + 96, "Q", 400), "beyond max_mapnr 0x190"),
    "max_mapnr of the header": (with_bytes("data", 440, "I", 1), "max_mapnr is 0x1 in the header"),
    "nr_cpus": (with_bytes("data", 460, "i", 2), "1 NT_PRSTATUS notes, there should be 2"),
    "incomplete": (with_bytes("data", 424, "I", 9), "says that it is incomplete"),
    "notes elsewhere": (with_bytes("data", BLOCK + 48, "Q", 8192), "outside the sub-header"),
    "notes beyond the file": (with_bytes("data", BLOCK + 56, "Q", 1 << 40), "outside the sub-h"),
    "note that reaches too far": (
        with_bytes("data", BLOCK + 104 + 4, "I", 5000),
        "reaches beyond the notes' end",
    ),
    "VMCOREINFO elsewhere": (with_bytes("data", BLOCK + 32, "Q", BLOCK + 200), "VMCOREINFO of"),
    "descriptors cut": (lambda sample: sample.data.__delitem__(slice(20000, None)), "truncated"),
}


@pytest.mark.parametrize("kind", KDUMP_DAMAGE)
@pytest.mark.parametrize("wrap", [bytes, flatten])
def test_damaged_kdump(verify, kind, wrap):
    damage, message = KDUMP_DAMAGE[kind]
    sample = make_kdump(PAGES, vmcoreinfo=b"A=1\n")
    assert not verify(wrap(sample.data)).problems
    damage(sample)
    report = verify(wrap(sample.data))
    assert any(message in problem for problem in report.problems), report.problems
    assert report.problem_count >= len(report.problems)


@pytest.mark.parametrize("bitmaps", [(1,), (0, 1)])
def test_bit_missing_where_no_page_is_zero(verify, bitmaps):
    """No shared page gives it away."""
    sample = make_kdump({pfn: page for pfn, page in PAGES.items() if page != ZERO})
    without_bit(*bitmaps)(sample)
    report = verify(sample.data)
    assert "bitmap and descriptors disagree" in " ".join(report.problems)


@pytest.mark.parametrize("codec", all_page_codecs().values(), ids=lambda codec: codec.name)
def test_every_codec(verify, codec):
    sample = make_kdump(PAGES, compress=codec.compressor(), flag=codec.page_flag)
    assert not verify(sample.data).problem_count
    with_descriptor(8, 8, "I", 100)(sample)
    (problem,) = verify(sample.data).problems
    assert f"{codec.name} page does not unpack" in problem


def test_missing_codec_package_is_not_damage(verify, monkeypatch):
    sample = make_kdump(PAGES, compress=all_page_codecs()["zstd"].compressor(), flag=0x20)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(CodecUnavailableError, match=r"pip install .qemu_dump_ext\[fast\]"):
        verify(sample.data)


def test_problems_are_counted_and_not_all_kept(verify):
    sample = make_kdump(PAGES)
    del sample.data[sample.page_data + BLOCK :]
    report = verify(sample.data)
    assert report.problem_count == 301
    assert len(report.problems) == PROBLEMS_KEPT


FLATTENED_DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda stream: stream[:-100], "reaches beyond the end"),
    "no end marker": (lambda stream: stream[:-16], "no end marker"),
    "bytes behind": (lambda stream: stream + b"x", "1 bytes behind the end marker"),
    "chunk gone wild": (
        lambda stream: stream[:4096] + struct.pack(">qq", -7, 3000) + stream[4112:],
        "offset -7",
    ),
    "endless chunk": (
        lambda stream: stream[:-16] + struct.pack(">qq", 0, 1 << 62) + FLAT_END,
        "0x4000000000000000 bytes reaches beyond",
    ),
    "size -2": (lambda stream: stream[:-16] + struct.pack(">qq", 0, -2) + FLAT_END, "size -2"),
}


@pytest.mark.parametrize("kind", FLATTENED_DAMAGE)
def test_damaged_flattened_stream(verify, kind):
    damage, message = FLATTENED_DAMAGE[kind]
    data = bytes(make_kdump(PAGES).data)
    try:
        text = " ".join(verify(damage(flatten(data, chunk=len(data) - 500))).problems)
    except CorruptDumpError as error:
        text = str(error)
    assert message in text


PHDRS = 64 + 2 * 64
LOAD0, LOAD1 = PHDRS + 56, PHDRS + 2 * 56
MEMORY_END = 8000 + 11


def elf(offset: int, form: str, value: int) -> bytearray:
    data = make_elf(LOADS)
    struct.pack_into(f"<{form}", data, offset, value)
    return data


ELF_DAMAGE = {
    "cut by one byte": (make_elf(LOADS)[:-1], "section 1 at offset"),
    "cut in memory": (make_elf(LOADS)[:-1000], "its data end at offset"),
    "cut in memory, no sections": (make_elf(LOADS, sections_first=False)[:-1], "its data end at"),
    "e_version": (elf(20, "I", 2), "e_version is 2"),
    "e_phoff": (elf(32, "Q", 8), "inside the ELF header"),
    "e_shentsize": (elf(58, "H", 63), "e_shentsize is 63"),
    "e_shoff": (elf(40, "Q", 1 << 40), "beyond the dump's end"),
    "data in the headers": (elf(LOAD0 + 8, "Q", 4), "lie inside the headers"),
    "data beyond the file": (elf(LOAD0 + 8, "Q", 1 << 40), "its data end at offset"),
    "p_filesz over p_memsz": (elf(LOAD0 + 40, "Q", 4999), "is more than p_memsz"),
    "overlap in memory": (elf(LOAD1 + 24, "Q", 0x1100), "overlaps PT_LOAD 1 in guest memory"),
    "overlap in the file": (
        elf(LOAD1 + 8, "Q", 900),
        "overlaps PT_LOAD 1 in the file",
    ),
    "no notes": (elf(PHDRS, "I", 0), "no PT_NOTE"),
    "no memory": (make_elf([]), "no guest memory"),
    "no PRSTATUS": (make_elf(LOADS, notes=b""), "0 NT_PRSTATUS notes"),
    "PRSTATUS too short": (make_elf(LOADS, notes=note(b"CORE", 1, b"1234")), "is too short"),
    "QEMU notes": (
        make_elf(LOADS, notes=prstatus(1) + prstatus(2) + note(b"QEMU", 0, b"1234")),
        "1 QEMU notes beside 2",
    ),
    "bad note": (make_elf(LOADS, notes=prstatus(1)[:-8]), "reaches beyond the notes' end"),
    "notes beyond the file": (elf(PHDRS + 32, "Q", 1 << 40), "too large"),
}


@pytest.mark.parametrize("kind", ELF_DAMAGE)
def test_damaged_elf(verify, kind):
    data, message = ELF_DAMAGE[kind]
    try:
        text = " ".join(verify(data).problems)
    except CorruptDumpError as error:
        text = str(error)
    assert message in text


def test_oddities_of_elf_are_remarks(verify):
    data = make_elf([Load(0x1000, b"a" * 5000, memsz=6000)])
    struct.pack_into("<H", data, 52, 8)
    report = verify(data)
    assert not report.problems
    assert [remark.split()[0] for remark in report.remarks] == ["e_ehsize", "1"]


def test_section_header_in_the_byte_order_of_the_host(verify):
    data = make_elf(LOADS, order=">")
    struct.pack_into("<QQ", data, 64 + 64 + 24, len(data) - 11, 11)
    report = verify(data)
    assert not report.problems
    assert "wrong byte order" in report.remarks[0]
    assert "truncated" in verify(data[:-1]).problems[0]


def test_mappings_of_the_same_memory_are_no_overlap(verify):
    data = make_elf([Load(0x1000, b"a" * 5000), Load(0x1400, b"", memsz=64)])
    phdr = 64 + 2 * 64 + 2 * 56
    (offset,) = struct.unpack_from("<Q", data, phdr - 56 + 8)
    struct.pack_into("<Q", data, phdr + 8, offset + 0x400)
    struct.pack_into("<Q", data, phdr + 32, 64)
    assert not verify(data).problems


def test_memory_of_a_hostile_size_takes_no_time(verify):
    data = make_elf([Load(0x1000, b"a" * 50, memsz=1 << 62)])
    assert verify(data).memory_bytes == 50


def test_unreadable_medium(verify, monkeypatch):
    read = os.preadv

    def preadv(fd, buffers, offset):
        if len(buffers[0]) == len(LOADS[0].data):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    (problem,) = verify(make_elf(LOADS)).problems
    assert "Input/output error" in problem


def test_progress(tmp_path):
    path = tmp_path / "dump"
    path.write_bytes(make_kdump(PAGES).data)
    seen = []
    with open_dump(path) as dump:
        verify_dump(dump, workers=3, progress=lambda done, total: seen.append((done, total)))
    total = len(PAGES) * BLOCK
    assert seen == [(256 * BLOCK, total), (total, total)]


def test_bytes_behind_the_last_page_are_a_remark(verify):
    report = verify(make_kdump(PAGES).data + b"more")
    assert (report.problems, report.remarks) == ([], ["4 bytes behind the last page"])
