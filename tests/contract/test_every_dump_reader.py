"""What every file in dump_readers/ promises, of dumps of a guest of a few pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

import qemu_dump_ext.dump_readers as package
from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.cli import main
from qemu_dump_ext.dump_formats import all_dump_formats, find_dump_format
from qemu_dump_ext.dump_readers import DumpFile, Fit, all_dump_readers, open_dump, reader_of
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import CorruptDumpError, DumpError, GuestMemoryFaultError, NotADumpError
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.plan.plan import GuestSnapshot, make_plan
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.plan.windows_plan import make_windows_plan
from qemu_dump_ext.sinks import open_sink
from qemu_dump_ext.structures.dialect import MENDED
from qemu_dump_ext.structures.utsname import UtsName
from tests.support.fake_guest import BLOCKS, PAGE, content_of
from tests.support.leftovers import nothing_left
from tests.support.plain_memory import PlainMemory
from tests.support.sample_cores import (
    make_virtualbox,
    make_xen,
    virtualbox_notes,
    virtualbox_state,
    xen_context,
)
from tests.support.sample_migration import make_migration
from tests.support.sample_qcow2 import make_qcow2
from tests.support.sample_ranges import make_avml, make_lime, make_qemu_core, ram_with_kernel
from tests.support.sample_save_image import make_save_image, pack
from tests.support.sample_win_dmp import sample_windows_dump

# Formats whose dumps a reader opens; one of each way in which it may be wrapped.
READS = {
    "elf": ("elf",),
    "kdump": ("kdump-raw-zlib", "kdump-zlib"),
    "migration": ("migration",),
    "win_dmp": ("win-dmp",),
    "lime": ("lime",),
    "avml": ("avml",),
    "raw": ("raw",),
    "qemu_core": ("qemu_core",),
    "libvirt_save": ("libvirt_save", "libvirt_save-zstd"),
    "packed_migration": ("packed_migration",),
    "qcow2": ("qcow2",),
    "virtualbox": ("virtualbox",),
    "xen": ("xen",),
}
_OF_STREAMS = ("migration", "libvirt_save", "packed_migration", "qcow2")
_WITHOUT_HEADERS = ("raw", "qemu_core")
_CORES = ("elf", "qemu_core", "virtualbox", "xen")
_ALSO = dict.fromkeys(_CORES, _CORES)
# What no format of ours is: its guest has the memory that its machine has.
_STREAMED = (RamBlock(0x80000000, 12 * PAGE, BLOCKS[0].name, 0),)
_RAM = ram_with_kernel()
_CASES = [(reader, written) for reader, formats in READS.items() for written in formats]
EVERY_DUMP = pytest.mark.parametrize(("reader", "written"), _CASES)
EVERY_WRITTEN = pytest.mark.parametrize(
    "written", [written for reader, written in _CASES if reader not in _WITHOUT_HEADERS]
)
_HEAD = 16
_CUTS = 60
_SHOWN_AT_THE_TOP = {
    *("file", "format", "size_bytes", "byte_order", "word_bits", "segment_count"),
    *("sub_header", "vmcoreinfo", "problems"),
}
_DAMAGES = 150


def _frames(blocks: dict[int, bytes]) -> list[tuple[int, bytes]]:
    return [
        ((gpa + at) // PAGE, content[at : at + PAGE].ljust(PAGE, b"\0"))
        for gpa, content in blocks.items()
        for at in range(0, len(content), PAGE)
    ]


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dump of each format, by its name."""
    folder = tmp_path_factory.mktemp("dumps")
    architecture = all_architectures()["or1k"]
    registers = {register.name: 0x1234 for register in architecture.registers}
    blocks = {block.gpa: content_of(block) for block in BLOCKS}
    stream = make_migration(content_of(*_STREAMED))
    for name, content in (
        ("migration", stream),
        ("libvirt_save", make_save_image(stream)),
        ("libvirt_save-zstd", make_save_image(stream, "zstd")),
        ("packed_migration", pack(stream, "gzip")),
        ("virtualbox", make_virtualbox(blocks, virtualbox_notes([virtualbox_state({})]))),
        ("xen", make_xen(_frames(blocks), [xen_context({})])),
        ("qcow2", make_qcow2({"of-test": stream})),
        ("lime", make_lime(blocks)),
        ("avml", make_avml(blocks)),
        ("raw", _RAM),
        ("qemu_core", make_qemu_core(_RAM)),
    ):
        (folder / name).write_bytes(content)
    for name in sorted(all_dump_formats().keys() & {written for _, written in _CASES}):
        request = DumpRequest(format=name)
        snapshot = GuestSnapshot(architecture, BLOCKS, [Vcpu(0, registers)], b"", UtsName())
        with open_sink(str(folder / name), force=False, standard_output=None) as sink:
            found = find_dump_format(name)
            if found.of_windows:
                windows = sample_windows_dump(BLOCKS)
                plan = make_windows_plan(
                    architecture.cores[0], BLOCKS, BLOCKS, windows, dialect=MENDED, request=request
                )
            else:
                plan = make_plan(snapshot, MENDED, request, whole_pages=found.whole_pages)
            found.write(request, plan, PlainMemory(), sink, lambda _: None)
    return {name: folder / name for _, name in _CASES}


@pytest.fixture
def dump(dumps: dict[str, Path], reader: str, written: str) -> Iterator[DumpFile]:
    with nothing_left(), open_dump(dumps[written]) as dump:
        assert dump.reader == reader
        yield dump


def test_the_table_names_every_file():
    files = {path.stem for path in Path(package.__file__).parent.glob("[!_]*.py")}
    assert files == set(all_dump_readers()) == set(READS)


@pytest.mark.parametrize("name", sorted(all_dump_readers()))
def test_it_knows_its_own_by_the_first_bytes(name: str, dumps: dict[str, Path]):
    probe = all_dump_readers()[name].probe
    for reader, formats in READS.items():
        # What is wrapped in a stream begins like the stream.
        head = dumps[formats[0]].read_bytes()[:_HEAD]
        # Cores all begin alike, and RAM like anything.
        if reader not in _WITHOUT_HEADERS:
            assert (probe(head) is Fit.NO) == (name not in {reader, *_ALSO.get(reader, ())})
        for size in range(_HEAD):
            assert probe(head[:size]) in Fit
    for head in (b"", bytes(_HEAD), b"\xff" * _HEAD, b"#!/bin/sh\necho  "):
        assert probe(head) is not Fit.SURE


def _blocks_of(dump: DumpFile) -> tuple[RamBlock, ...]:
    if dump.reader in _WITHOUT_HEADERS:
        return (RamBlock(0, len(_RAM), "kernel", 0),)
    return _STREAMED if dump.reader in _OF_STREAMS else BLOCKS


def _content_of(block: RamBlock) -> bytes:
    return _RAM if block.name == "kernel" else content_of(block)


@EVERY_DUMP
def test_ranges_are_in_order_and_all_of_them_can_be_read(dump: DumpFile):
    ranges = list(dump.memory_ranges())
    edges = [edge for gpa, size in ranges for edge in (gpa, gpa + size)]
    assert edges == sorted(set(edges)), "ascending, merged, not empty"
    for block in _blocks_of(dump):
        assert any(gpa <= block.gpa and block.end <= gpa + size for gpa, size in ranges)
        assert dump.read(block.gpa, block.size) == _content_of(block)
        assert dump.read(block.end - 3, 3) == _content_of(block)[-3:]
    for gpa, size in ranges:
        found = dump.populated(gpa, size)
        inside = [gpa, *(edge for pair in found for edge in pair), gpa + size]
        assert inside == sorted(inside)
        for low, high in pairwise(inside):
            if (low, high) not in found:
                assert not any(dump.read(low, high - low))


@EVERY_DUMP
def test_memory_that_it_has_not_is_a_fault(dump: DumpFile):
    (first, first_size), *_ = dump.memory_ranges()
    end = first + first_size
    for gpa, size in ((end, 1), (end - 1, 2), (0x90000000, PAGE), (1 << 70, 1)):
        with pytest.raises(GuestMemoryFaultError):
            dump.read(gpa, size)


@EVERY_DUMP
def test_its_description_can_be_sent(dump: DumpFile):
    parts = reader_of(dump).describe(dump)
    assert parts
    assert json.dumps({name: describe() for name, describe in parts.items()})


@pytest.mark.parametrize("written", [written for _, written in _CASES])
def test_its_description_can_be_read(written: str, dumps: dict[str, Path], capsys):
    assert main(["inspect", str(dumps[written])]) == 0
    shown = capsys.readouterr().out
    assert not set("{}[]") & set(shown)
    assert main(["inspect", "--json", str(dumps[written])]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert all(f"{key.replace('_', ' ')}:" in shown for key in facts.keys() - _SHOWN_AT_THE_TOP)


@EVERY_DUMP
def test_a_good_dump_has_no_damage(dump: DumpFile):
    report = verify_dump(dump)
    assert not report.problems
    assert report.memory_bytes >= sum(block.size for block in _blocks_of(dump))


@EVERY_DUMP
def test_closing_it_twice_is_harmless(dump: DumpFile):
    dump.close()


def _damage_found(path: Path) -> list[str]:
    """Return what is said about a dump by all that looks at it."""
    try:
        with open_dump(path) as dump:
            for describe in reader_of(dump).describe(dump).values():
                with suppress(CorruptDumpError):
                    describe()
            for block in _blocks_of(dump):
                with suppress(CorruptDumpError, GuestMemoryFaultError):
                    dump.read(block.gpa, block.size)
            return list(verify_dump(dump).problems)
    except DumpError as error:
        return [str(error)]


@EVERY_WRITTEN
def test_a_dump_that_is_cut_is_told(written: str, dumps: dict[str, Path], tmp_path):
    content = dumps[written].read_bytes()
    cuts = {0, 1, _HEAD, len(content) - 1, *range(0, len(content), len(content) // _CUTS)}
    path = tmp_path / "cut"
    for size in sorted(cuts):
        path.write_bytes(content[:size])
        with nothing_left():
            found = _damage_found(path)
            assert found, f"{size} of {len(content)} bytes"
            assert not any("\n" in line for line in found)
    path.write_bytes(content[: len(content) // 2])
    assert main(["inspect", str(path)]) == CorruptDumpError.exit_status


@EVERY_WRITTEN
def test_a_damaged_dump_is_an_error_of_ours_at_worst(
    written: str, dumps: dict[str, Path], tmp_path: Path
):
    content = bytearray(dumps[written].read_bytes())
    path = tmp_path / "damaged"
    with nothing_left():
        for position in range(_DAMAGES):
            before = content[position]
            for value in (0xFF, 0x7F, before ^ 1):
                content[position] = value
                path.write_bytes(content)
                _damage_found(path)
            content[position] = before


def test_what_is_no_dump_is_told_with_what_is_read(tmp_path: Path):
    path = tmp_path / "text"
    path.write_text("no dump at all\n")
    with nothing_left(), pytest.raises(NotADumpError) as caught:
        open_dump(path)
    assert all(name in str(caught.value) for name in all_dump_readers())
