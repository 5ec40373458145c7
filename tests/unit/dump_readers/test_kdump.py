from __future__ import annotations

import hashlib
import struct
import threading
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.dump_readers._bitmap_runs import runs_of_ones
from qemu_dump_ext.errors import (
    CorruptDumpError,
    GuestMemoryFaultError,
    NotADumpError,
    RequestError,
)
from qemu_dump_ext.page_codecs import all_page_codecs
from tests.support.sample_kdump import BLOCK, ZERO, flatten, make_kdump

RANDOM_PAGE = hashlib.shake_128(b"page").digest(BLOCK)
TEXT_PAGE = (b"the quick brown fox " * 300)[:BLOCK]
PAGES = {0: TEXT_PAGE, 1: ZERO, 2: RANDOM_PAGE, 3: ZERO, 9: TEXT_PAGE[::-1], 40000: RANDOM_PAGE}
VMCOREINFO = b"OSRELEASE=6.1.0\nPAGESIZE=4096\nNUMBER(phys_base)=-1\n"


@pytest.fixture
def open_image(tmp_path):
    opened = []

    def open_(data):
        path = tmp_path / "dump"
        path.write_bytes(data)
        opened.append(open_dump(path))
        return opened[-1]

    yield open_
    for dump in opened:
        dump.close()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("word", "packed", "sub_header_size"), [(8, False, 104), (4, True, 80), (4, False, 96)]
)
@pytest.mark.parametrize("wrap", [bytes, flatten])
def test_every_shape(open_image, order, word, packed, sub_header_size, wrap):
    sample = make_kdump(PAGES, order=order, word=word, packed=packed, vmcoreinfo=VMCOREINFO)
    dump = open_image(wrap(sample.data))
    assert dump.format == ("kdump" if wrap is bytes else "kdump-flattened")
    assert dump.byte_order == ("little" if order == "<" else "big")
    assert dump.word_size == word
    assert dump.page_size == BLOCK
    assert dump.sub_header_size == sub_header_size
    assert dump.sub_header["phys_base"] == 0x1000000
    assert (dump.header["sysname"], dump.header["nodename"]) == ("Linux", "host")
    assert dump.header["nr_cpus"] == 1
    assert [(n.name, n.type, len(n.descriptor)) for n in dump.notes] == [
        ("CORE", 1, 336),
        ("VMCOREINFO", 0, len(VMCOREINFO)),
    ]
    assert dump.pid_of(dump.notes[0]) == 1
    assert dump.pid_of(dump.notes[1]) is None
    assert dump.vmcoreinfo == VMCOREINFO
    assert dump.vmcoreinfo_facts["NUMBER(phys_base)"] == "-1"
    assert list(dump.page_runs()) == [(0, 4), (9, 1), (40000, 1)]
    assert list(dump.memory_ranges()) == [
        (0, 4 * BLOCK),
        (9 * BLOCK, BLOCK),
        (40000 * BLOCK, BLOCK),
    ]
    for pfn, page in PAGES.items():
        assert dump.read(pfn * BLOCK, BLOCK) == page
    assert dump.read(10, 3 * BLOCK) == (TEXT_PAGE + ZERO + RANDOM_PAGE + ZERO)[10:][: 3 * BLOCK]
    counts = dump.count_pages()
    assert (counts.zero, counts.raw, counts.packed) == (2, 2, {"zlib": 2})
    assert (counts.lost, counts.bad) == (0, 0)
    assert counts.stored_bytes == len(sample.data) - sample.page_data - BLOCK


@pytest.mark.parametrize("codec", all_page_codecs().values(), ids=lambda codec: codec.name)
def test_every_codec(open_image, codec):
    sample = make_kdump(PAGES, compress=codec.compressor(), flag=codec.page_flag)
    dump = open_image(sample.data)
    assert dump.count_pages().packed == {codec.name: 2}
    for pfn, page in PAGES.items():
        assert dump.read(pfn * BLOCK, BLOCK) == page


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(4 * BLOCK, 1), (3 * BLOCK, BLOCK + 1), (8 * BLOCK, BLOCK), (1 << 40, 8), ((1 << 64) - 8, 8)],
)
def test_memory_that_is_not_there(open_image, gpa, size):
    with pytest.raises(GuestMemoryFaultError):
        open_image(make_kdump(PAGES).data).read(gpa, size)


def test_lost_page_of_an_incomplete_dump(open_image):
    sample = make_kdump(PAGES)
    sample.data[sample.descriptors : sample.descriptors + 24] = bytes(24)
    dump = open_image(sample.data)
    with pytest.raises(GuestMemoryFaultError, match="incomplete"):
        dump.read(0, 1)
    assert dump.count_pages().lost == 1


def test_long_reads_cross_pieces_of_the_bitmap(open_image):
    first = 8 * (1 << 14) - 300
    pages = {pfn: struct.pack("<Q", pfn) * (BLOCK // 8) for pfn in range(first, first + 600)}
    dump = open_image(make_kdump(pages).data)
    assert dump.read(first * BLOCK, 600 * BLOCK) == b"".join(pages.values())
    assert list(dump.page_runs()) == [(first, 600)]


def test_version_5_has_no_64_bit_max_mapnr(open_image):
    sample = make_kdump(PAGES, version=5)
    sample.data[BLOCK + 96 : BLOCK + 104] = bytes(8)
    assert open_image(sample.data).max_mapnr == 40001


@given(st.binary(max_size=40), st.integers(0, 1000))
def test_runs_of_ones(bitmap, first):
    numbers = [
        n for start, count in runs_of_ones(bitmap, first) for n in range(start, start + count)
    ]
    assert numbers == [first + n for n in range(8 * len(bitmap)) if bitmap[n // 8] >> n % 8 & 1]


def header(**changes: int) -> bytearray:
    offsets = {
        "header_version": 8,
        "block_size": 428,
        "sub_hdr_size": 432,
        "bitmap_blocks": 436,
        "nr_cpus": 460,
        "split": BLOCK + 12,
        "max_mapnr_64": BLOCK + 96,
    }
    data = make_kdump(PAGES).data
    for name, value in changes.items():
        struct.pack_into("<i", data, offsets[name], value)
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(header_version=0), "header_version at offset 0x8"),
        (header(block_size=4095), "block_size at offset 0x1ac is 0xfff"),
        (header(block_size=1 << 30), "block_size"),
        (header(sub_hdr_size=-1), "sub_hdr_size"),
        (header(bitmap_blocks=0), "bitmap_blocks"),
        (header(bitmap_blocks=0x7FFFFFFF), "beyond the dump's end"),
        (header(bitmap_blocks=2, max_mapnr_64=0x7FFFFFFF), "do not hold 0x7fffffff bits"),
        (header(nr_cpus=-1), "nr_cpus"),
        (header(nr_cpus=0x7FFFFFFF), "nr_cpus"),
        (header()[:300], "beyond the dump's end"),
        (header()[: 2 * BLOCK], "beyond the dump's end"),
    ],
)
def test_impossible_headers(open_image, data, message):
    with pytest.raises(CorruptDumpError, match=message) as caught:
        open_image(data)
    assert not isinstance(caught.value, NotADumpError)


def test_split_dump_is_refused(open_image):
    with pytest.raises(RequestError, match="split"):
        open_image(header(split=1))


@pytest.mark.parametrize(
    "data", [b"", b"KDUMP", b"DISKDUMP" * 600, b"\0" * 9000, flatten(b"x" * 99)]
)
def test_not_a_dump(open_image, data):
    with pytest.raises(NotADumpError):
        open_image(data)


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(RequestError, match="No such file"):
        open_dump(tmp_path / "missing")
    with pytest.raises(NotADumpError, match="regular"):
        open_dump(tmp_path)
    with pytest.raises(NotADumpError, match="regular"):
        open_dump("/dev/null")


def test_pages_far_apart_in_the_file_take_no_memory(tmp_path):
    sample = make_kdump({0: RANDOM_PAGE, 1: TEXT_PAGE, 2: RANDOM_PAGE})
    far = 512 << 20
    struct.pack_into("<q", sample.data, sample.descriptors + 48, far)
    path = tmp_path / "dump"
    with path.open("wb") as file:
        file.write(sample.data)
        file.seek(far)
        file.write(RANDOM_PAGE)
    with open_dump(path) as dump:
        tracemalloc.start()
        try:
            assert dump.read(0, 3 * BLOCK) == RANDOM_PAGE + TEXT_PAGE + RANDOM_PAGE
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("threads", [1, 3])
def test_many_pages_are_the_same_by_any_number_of_threads(open_image, threads):
    pages = {pfn: b"%08d" % (pfn % 700) * (BLOCK // 8) for pfn in range(5, 1500)}
    dump = open_image(make_kdump(pages).data)
    dump.threads = threads
    expected = b"".join(pages.values())
    assert dump.read(5 * BLOCK, len(expected)) == expected
    assert dump.read(5 * BLOCK + 77, len(expected) - 100) == expected[77:-23]
    with pytest.raises(GuestMemoryFaultError):
        dump.read(5 * BLOCK, len(expected) + BLOCK)
    dump.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("unpack")]


@pytest.mark.parametrize("threads", [1, 3])
def test_of_pages_that_are_damaged_the_first_is_told(open_image, threads):
    pages = {pfn: b"%08d" % pfn * (BLOCK // 8) for pfn in range(1500)}
    data = bytearray(make_kdump(pages).data)
    for pfn in (700, 1400):
        at = data.index(zlib.compress(pages[pfn], 1)[4:])
        data[at + 8] ^= 1
    dump = open_image(data)
    dump.threads = threads
    with pytest.raises(CorruptDumpError, match=f"guest memory at {700 * BLOCK:#x}"):
        dump.read(0, 1500 * BLOCK)
    assert dump.read(701 * BLOCK, 600 * BLOCK) == b"".join(pages[n] for n in range(701, 1301))
