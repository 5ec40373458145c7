from __future__ import annotations

import io
import struct

import pytest
from elftools.elf.elffile import ELFFile

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.errors import CorruptDumpError, GuestMemoryFaultError, NotADumpError
from qemu_dump_ext.structures.elf_notes import encode_note
from tests.support.sample_elf import Load, make_elf
from tests.support.sample_kdump import flatten, note, prstatus

A, B = b"a" * 5000, b"b" * 3000
LOADS = [Load(0x1000, A), Load(0x100000, B)]


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
@pytest.mark.parametrize("word", [4, 8])
@pytest.mark.parametrize("sections_first", [True, False])
@pytest.mark.parametrize("xnum", [True, False])
@pytest.mark.parametrize("wrap", [bytes, flatten])
def test_every_shape(open_image, order, word, sections_first, xnum, wrap):
    data = make_elf(LOADS, order=order, word=word, sections_first=sections_first, xnum=xnum)
    dump = open_image(wrap(data))
    assert dump.format == ("elf" if wrap is bytes else "elf-flattened")
    assert (dump.byte_order, dump.word_size) == ("little" if order == "<" else "big", word)
    assert [n.name for n in dump.notes] == ["CORE"]
    assert dump.pid_of(dump.notes[0]) == 1
    assert dump.header["e_machine"] == 62
    assert list(dump.memory_ranges()) == [(0x1000, 5000), (0x100000, 3000)]
    assert dump.read(0x1000, 5000) == A
    assert dump.read(0x100010, 2984) == B[:2984]
    expected = [
        (s["p_offset"], s["p_paddr"], s["p_filesz"], s["p_memsz"])
        for s in ELFFile(io.BytesIO(data)).iter_segments("PT_LOAD")
    ]
    if not xnum:  # pyelftools does not know it
        assert expected == [(s.p_offset, s.p_paddr, s.p_filesz, s.p_memsz) for s in dump.segments]


def test_many_program_headers(open_image):
    loads = [Load(number << 12, b"%6d" % number) for number in range(70000)]
    dump = open_image(make_elf(loads, xnum=True))
    assert len(dump.segments) == 70000
    assert dump.read(69999 << 12, 6) == b" 69999"


def test_memory_that_the_file_does_not_have_reads_as_zero(open_image):
    dump = open_image(make_elf([Load(0x1000, A, memsz=6000), Load(0x2800, B)]))
    assert dump.read(0x1000, 6000) == A + bytes(1000)
    with pytest.raises(GuestMemoryFaultError):
        dump.read(0x1000, 6001)
    dump = open_image(make_elf([Load(0x1000, b"", memsz=64, offset=(1 << 64) - 1)]))
    assert dump.read(0x1000, 64) == bytes(64)


def test_data_win_over_a_mapping_that_was_cut_off(open_image):
    loads = [Load(0x2000, B), Load(0x1000, A[:4096], memsz=0x2000)]
    dump = open_image(make_elf(loads))
    assert dump.read(0x1000, 0x2000) == A[:4096] + B + bytes(1096)


@pytest.mark.parametrize(("gpa", "size"), [(0xFFF, 2), (0x1000, 5001), (0, 1), ((1 << 64) - 1, 1)])
def test_memory_that_is_not_there(open_image, gpa, size):
    with pytest.raises(GuestMemoryFaultError):
        open_image(make_elf(LOADS)).read(gpa, size)


def test_cut_tail_fails_to_read(open_image):
    dump = open_image(make_elf(LOADS)[:-50])
    assert dump.read(0x1000, 5000) == A
    with pytest.raises(CorruptDumpError, match="truncated"):
        dump.read(0x100000, 3000)


def test_vmcoreinfo(open_image):
    text = b"OSRELEASE=6.1\n"
    dump = open_image(make_elf(LOADS, notes=prstatus(1) + note(b"VMCOREINFO", 0, text + b"\0\0")))
    assert dump.vmcoreinfo == text


def test_the_owner_of_a_note_is_kept_byte_by_byte(open_image):
    owner = bytes(range(1, 256))
    dump = open_image(make_elf(LOADS, notes=prstatus(1) + note(owner, 7, b"abcd")))
    (_, found) = dump.notes
    encoded = encode_note(found.name, found.type, found.descriptor, "little")
    assert encoded == note(owner, 7, b"abcd")


def test_32_bit_prstatus_in_elfclass64(open_image):
    dump = open_image(
        make_elf(LOADS, notes=note(b"CORE", 1, struct.pack("<24xI116x", 7)) + note(b"CORE", 1, b""))
    )
    assert [dump.pid_of(n) for n in dump.notes] == [7, None]


def patched(offset: int, form: str, *values: int, **shape) -> bytearray:
    data = make_elf(LOADS, **shape)
    struct.pack_into(f"<{form}", data, offset, *values)
    return data


PHDRS = 64 + 2 * 64
LOAD0 = PHDRS + 56


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (patched(4, "B", 3), "class 3"),
        (patched(5, "B", 0), "data 0"),
        (patched(54, "H", 55), "e_phentsize is 55"),
        (patched(32, "Q", 1 << 63), "beyond the dump's end"),
        (patched(56, "H", 0xFFFE), "beyond the dump's end"),
        (patched(64 + 44, "I", 0xFFFFFFFF, xnum=True), "4294967295 program headers"),
        (patched(40, "Q", 1 << 50, xnum=True), "beyond the dump's end"),
        (patched(LOAD0 + 8, "Q", 1 << 63), "program header 1 has impossible sizes"),
        (patched(LOAD0 + 24, "Q", (1 << 64) - 1), "program header 1 has impossible sizes"),
        (patched(LOAD0 + 40, "Q", 1 << 63), "program header 1 has impossible sizes"),
        (make_elf(LOADS)[:40], "beyond the dump's end"),
        (make_elf(LOADS)[:12], "beyond the dump's end"),
    ],
)
def test_impossible_headers(open_image, data, message):
    with pytest.raises(CorruptDumpError, match=message) as caught:
        open_image(data)
    assert not isinstance(caught.value, NotADumpError)


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        (prstatus(1)[:-4], "reaches beyond the notes' end"),
        (prstatus(1) + b"12345678", "is cut off"),
        (struct.pack("<III", 0xFFFFFFFF, 0xFFFFFFFF, 1), "reaches beyond the notes' end"),
    ],
)
def test_bad_notes(open_image, notes, message):
    dump = open_image(make_elf(LOADS, notes=notes))
    with pytest.raises(CorruptDumpError, match=message):
        _ = dump.notes


def test_executables_are_no_dumps(open_image):
    with pytest.raises(NotADumpError, match="type 2"):
        open_image(patched(16, "H", 2))


@pytest.mark.parametrize("wrap", [bytes, flatten])
def test_what_the_file_does_not_have_is_not_populated(open_image, wrap):
    dump = open_image(wrap(make_elf([Load(0x1000, A, memsz=1 << 40), Load(1 << 41, B)])))
    assert list(dump.populated(0x1000, 1 << 40)) == [(0x1000, 0x1000 + len(A))]
    assert list(dump.populated(1 << 41, len(B))) == [(1 << 41, (1 << 41) + len(B))]
    assert list(dump.populated(0x2000, 16)) == [(0x2000, 0x2010)]


def test_holes_are_not_populated_but_what_was_cut_off_may_be(tmp_path):
    path = tmp_path / "dump"
    data = make_elf([Load(0, bytes(1 << 22))])
    start = len(data) - (1 << 22) - len(b"\0.shstrtab\0")
    path.write_bytes(data[:start])
    with path.open("r+b") as file:
        file.seek(start + (1 << 21))
        file.write(b"x" * 4096)
        file.truncate(start + (3 << 20))
    with open_dump(path) as dump:
        populated = list(dump.populated(0, 1 << 22))
        assert sum(end - gpa for gpa, end in populated) < (1 << 20) + (3 << 16)
        assert any(gpa <= 1 << 21 < end for gpa, end in populated)
        assert populated[-1] == (3 << 20, 1 << 22)
