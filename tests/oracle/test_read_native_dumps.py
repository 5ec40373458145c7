"""What QEMU dumps is read as independent readers read it, and found whole."""

from __future__ import annotations

import random
import shutil
import struct

import pytest
from elftools.elf.elffile import ELFFile

from qemu_dump_ext.cli import main
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.dump_readers._dump_file import DumpFile
from qemu_dump_ext.dump_readers.elf import ElfCoreFile
from qemu_dump_ext.dump_readers.kdump import KdumpFile
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import CorruptDumpError, GuestMemoryFaultError
from tests.support.sample_kdump import read_kdump, unflatten

pytestmark = pytest.mark.qemu
FORMATS = ("elf", "flattened", "raw")


def vcpu_facts(dump: DumpFile) -> list[tuple[str, int, bytes]]:
    return [(note.name, note.type, note.descriptor) for note in dump.notes]


@pytest.mark.parametrize("name", FORMATS)
def test_native_dumps_are_whole(native_dumps, name):
    with open_dump(getattr(native_dumps, name)) as dump:
        report = verify_dump(dump)
    assert report.problems == []
    assert report.memory_bytes >= 64 << 20
    assert all("e_ehsize" in r or "wrong byte order" in r for r in report.remarks), report.remarks


def test_elf_equals_pyelftools(native_dumps):
    with native_dumps.elf.open("rb") as file, open_dump(native_dumps.elf) as dump:
        assert isinstance(dump, ElfCoreFile)
        reference = ELFFile(file)
        assert dump.byte_order == ("little" if reference.little_endian else "big")
        assert dump.word_size == reference.elfclass // 8
        assert dump.header["e_phnum"] == reference.num_segments()
        loads = list(reference.iter_segments("PT_LOAD"))
        assert len(loads) == len(dump.segments)
        for load in loads:
            assert dump.read(load["p_paddr"], load["p_memsz"]) == load.data()
        (notes,) = reference.iter_segments("PT_NOTE")
        expected = []
        data, position = notes.data(), 0
        letter = "<" if reference.little_endian else ">"
        while position < len(data):
            name_size, size, kind = struct.unpack_from(f"{letter}III", data, position)
            start = position + 12 + (name_size + 3) // 4 * 4
            name = data[position + 12 : position + 12 + name_size - 1].decode()
            expected.append((name, kind, data[start : start + size]))
            position = start + (size + 3) // 4 * 4
        assert vcpu_facts(dump) == expected


@pytest.mark.parametrize("name", ["flattened", "raw"])
def test_kdump_equals_an_independent_reader(native_dumps, name):
    image = native_dumps.raw.read_bytes()
    with open_dump(getattr(native_dumps, name)) as dump:
        assert isinstance(dump, KdumpFile)
        order = "<" if dump.byte_order == "little" else ">"
        pages = 0
        for gpa, page in read_kdump(image, order, dump.word_size):
            assert dump.read(gpa, len(page)) == page
            pages += 1
        assert pages == dump.page_count
        assert dump.page_size == len(page)


def test_flattened_equals_rearranged(native_dumps):
    image = native_dumps.raw.read_bytes()
    assert unflatten(native_dumps.flattened.read_bytes()) == image
    with open_dump(native_dumps.flattened) as dump:
        assert dump.image.read(0, dump.image.size) == image


def test_formats_agree(native_dumps):
    dumps = [open_dump(getattr(native_dumps, name)) for name in FORMATS]
    elf, *kdumps = dumps
    for kdump in kdumps:
        assert vcpu_facts(kdump) == vcpu_facts(elf)
        assert list(kdump.memory_ranges()) == list(elf.memory_ranges())
        for gpa, size in elf.memory_ranges():
            assert kdump.read(gpa, size) == elf.read(gpa, size)
            with pytest.raises(GuestMemoryFaultError):
                kdump.read(gpa + size, 1)
    for dump in dumps:
        dump.close()


def test_vcpus_are_numbered(x86_dumps):
    for name in FORMATS:
        with open_dump(getattr(x86_dumps, name)) as dump:
            assert [dump.pid_of(note) for note in dump.notes] == [1, 2, None, None]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_commands(x86_dumps, name, command, capsys):
    assert main([command, str(getattr(x86_dumps, name))]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", FORMATS)
def test_every_cut_is_found(x86_dumps, name, tmp_path):
    path = tmp_path / "dump"
    shutil.copyfile(getattr(x86_dumps, name), path)
    size = path.stat().st_size
    for length in (size - 1, size - 5000, size // 2, 9000, 500, 40):
        with path.open("r+b") as file:
            file.truncate(length)
        try:
            with open_dump(path) as dump:
                assert verify_dump(dump).problems, length
        except CorruptDumpError:
            continue


def test_every_flipped_byte_behind_the_descriptors_is_found(x86_dumps, tmp_path):
    """All that lies there is zlib pages, with a checksum, and the page of zeroes."""
    image = bytearray(x86_dumps.raw.read_bytes())
    with open_dump(x86_dumps.raw) as dump:
        assert isinstance(dump, KdumpFile)
        start = dump.data_offset
    path = tmp_path / "dump"
    for position in random.Random(1).sample(range(start, len(image)), 40):  # noqa: S311
        image[position] ^= 0x10
        path.write_bytes(image)
        with open_dump(path) as dump:
            assert verify_dump(dump).problems, hex(position)
        image[position] ^= 0x10
