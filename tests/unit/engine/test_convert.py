"""Dumps of dumps have every page, note and register of them; an independent reader decides."""

from __future__ import annotations

import hashlib
import io
import struct
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.cli import main
from qemu_dump_ext.dump_formats import find_dump_format
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.convert import convert
from qemu_dump_ext.engine.report import DumpReport
from qemu_dump_ext.engine.stored_guest import StoredGuest
from qemu_dump_ext.errors import CorruptDumpError, RequestError, UnsupportedTargetError
from qemu_dump_ext.guest.model import Vcpu
from qemu_dump_ext.plan.plan import GuestSnapshot, make_plan
from qemu_dump_ext.plan.request import DumpOptions, MemoryRange
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.sinks import open_sink
from qemu_dump_ext.structures.dialect import MENDED
from qemu_dump_ext.structures.utsname import UtsName
from tests.support.fake_guest import BLOCKS, PAGE, content_of
from tests.support.fake_kernel import FlatMemory
from tests.support.plain_memory import PlainMemory
from tests.support.sample_elf import Load, make_elf
from tests.support.sample_kdump import BLOCK, flatten, make_kdump, note, prstatus, read_kdump
from tests.support.sample_ranges import make_lime, ram_with_kernel

_PLAIN = DumpOptions()
_X86 = "x86_64"
MIB = 1 << 20


def _convert(
    source: Path, target: Path, dump_format: str = "elf", options: DumpOptions = _PLAIN, **more
) -> DumpReport:
    parts = more.pop("parts", ())
    with (
        open_dump(source, *parts) as dump,
        open_sink(f"file:{target}", force=False, standard_output=None) as sink,
    ):
        request = options.of_format(dump_format)
        return convert(request, dump, sink, progress=ProgressMeter(None), **more)


@dataclass(frozen=True)
class Content:
    """What an independent reader finds: pages by gpa, and the notes area."""

    pages: Mapping[int, bytes]
    notes: bytes


def _elf(path: Path) -> Content:
    file = ELFFile(io.BytesIO(path.read_bytes()))
    pages = {}
    for load in file.iter_segments("PT_LOAD"):
        data = load.data()
        for start in range(0, len(data), PAGE):
            pages[load["p_paddr"] + start] = data[start : start + PAGE].ljust(PAGE, b"\0")
    (notes,) = file.iter_segments("PT_NOTE")
    return Content(pages, notes.data())


def _kdump(path: Path, order: str = "<", word: int = 8) -> Content:
    image = path.read_bytes()
    sub_header = struct.unpack_from(f"{order}{'QQ' if word == 8 else 'QI'}", image, BLOCK + 48)
    return Content(dict(read_kdump(image, order, word)), image[sub_header[0] :][: sub_header[1]])


def _write(
    folder: Path, pages: Mapping[int, bytes], notes: bytes | None = None, name: str = "in"
) -> Path:
    path = folder / name
    loads = [Load(BLOCK * pfn, page) for pfn, page in sorted(pages.items())]
    path.write_bytes(make_elf(loads, notes=_notes() if notes is None else notes))
    return path


def _notes(vcpus: int = 2) -> bytes:
    of_vcpus = b"".join(prstatus(number + 1) for number in range(vcpus))
    state = struct.pack("<II", 1, 440) + bytes(432)
    return of_vcpus + note(b"QEMU", 0, state) * vcpus


@pytest.mark.parametrize("name", all_architectures())
def test_every_target_goes_round(name: str, tmp_path: Path):
    architecture = all_architectures()[name]
    registers = {register.name: 0x1234 for register in architecture.registers}
    snapshot = GuestSnapshot(architecture, BLOCKS, [Vcpu(0, registers)], b"", UtsName())
    first = find_dump_format("elf")
    with open_sink(str(tmp_path / "0"), force=False, standard_output=None) as sink:
        request = _PLAIN.of_format("elf")
        plan = make_plan(snapshot, MENDED, request, whole_pages=False)
        first.write(request, plan, PlainMemory(), sink, lambda _: None)
    chain = ("kdump-raw-zlib", "kdump-zlib", "kdump-raw-zlib", "elf")
    for number, dump_format in enumerate(chain):
        report = _convert(tmp_path / f"{number}", tmp_path / f"{number + 1}", dump_format)
        assert report.exit_status == 0
    expected = _elf(tmp_path / "0")
    found = _elf(tmp_path / "4")
    assert found.notes == expected.notes
    assert {gpa: found.pages[gpa] for gpa in expected.pages} == expected.pages
    # Pages of a kdump are whole, and may be larger.
    assert not any(any(found.pages[gpa]) for gpa in found.pages.keys() - expected.pages.keys())
    for block in BLOCKS:
        content = content_of(block)
        for start in range(0, block.size, PAGE):
            page = content[start : start + PAGE]
            assert found.pages[block.gpa + start][: len(page)] == page
    order = "<" if plan.core.byte_order == "little" else ">"
    # All but the first and the last, which have other places for their members, are the same.
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()
    kdump = dict(read_kdump((tmp_path / "1").read_bytes(), order, plan.core.word_size))
    size = plan.page_size
    for gpa, page in expected.pages.items():
        assert kdump[gpa // size * size][gpa % size :][:PAGE] == page, hex(gpa)


_CONTENTS = st.sampled_from([bytes(BLOCK), b"a" * BLOCK, bytes(range(256)) * (BLOCK // 256)])
_FORMATS = st.sampled_from(
    ["elf", "kdump-zlib", "kdump-raw-zlib", "kdump-raw-none", "kdump-raw-zstd"]
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    pages=st.dictionaries(st.integers(0, 9000), _CONTENTS, min_size=1, max_size=40),
    chain=st.lists(_FORMATS, min_size=1, max_size=3),
    order=st.sampled_from("<>"),
)
def test_whatever_the_chain_every_page_is_kept(
    tmp_path: Path, pages: dict[int, bytes], chain: list[str], order: str
):
    for path in tmp_path.iterdir():
        path.unlink()
    if order == ">":  # s390x, with notes that nobody knows
        image = make_elf(
            [Load(BLOCK * pfn, page) for pfn, page in pages.items()],
            order=">",
            notes=note(b"OTHER", 7, b"x" * 9, ">"),
        )
        struct.pack_into(">H", image, 18, 22)
        (tmp_path / "in").write_bytes(image)
    else:
        _write(tmp_path, pages)
    source = tmp_path / "in"
    for number, dump_format in enumerate((*chain, "elf")):
        target = tmp_path / f"{number}"
        _convert(source, target, dump_format)
        source = target
    found = _elf(source)
    assert found.pages == {BLOCK * pfn: page for pfn, page in pages.items()}
    assert found.notes == _elf(tmp_path / "in").notes


def _filtered(tmp_path: Path, *, page: bytes = b"a" * BLOCK) -> Path:
    """Pages 1, 2 and 5; 3 and 4 are in the first bitmap only."""
    image = make_kdump(dict.fromkeys((1, 2, 5), page), max_mapnr=64)
    image.data[image.bitmaps] |= 0b11000
    struct.pack_into("<i", image.data, BLOCK + 8, 31)
    image.data[12 + 4 * 65 : 12 + 4 * 65 + 6] = b"x86_64"
    path = tmp_path / "filtered"
    path.write_bytes(image.data)
    return path


@pytest.mark.parametrize("through", [(), ("kdump-zlib",)])
def test_pages_that_were_left_out_stay_left_out(tmp_path: Path, through: tuple[str, ...]):
    source = _filtered(tmp_path)
    for dump_format in through:
        _convert(source, tmp_path / dump_format, dump_format)
        source = tmp_path / dump_format
    report = _convert(source, tmp_path / "raw", "kdump-raw-zlib")
    assert report.exit_status == 0
    image = (tmp_path / "raw").read_bytes()
    bitmaps = image[2 * BLOCK : 4 * BLOCK]
    assert (bitmaps[0], bitmaps[BLOCK]) == (0b111110, 0b100110)
    assert struct.unpack_from("<i", image, BLOCK + 8) == (31,)
    assert set(_kdump(tmp_path / "raw").pages) == {BLOCK, 2 * BLOCK, 5 * BLOCK}
    _convert(source, tmp_path / "elf")
    assert set(_elf(tmp_path / "elf").pages) == {BLOCK, 2 * BLOCK, 5 * BLOCK}


def test_lost_pages_are_left_out_and_named(tmp_path: Path):
    image = make_kdump(dict.fromkeys(range(1, 6), b"a" * BLOCK), status=9)
    struct.pack_into("<qIIQ", image.data, image.descriptors + 2 * 24, 0, 0, 0, 0)
    image.data[12 + 4 * 65 : 12 + 4 * 65 + 6] = b"x86_64"
    (tmp_path / "in").write_bytes(image.data)
    report = _convert(tmp_path / "in", tmp_path / "elf")
    assert report.exit_status == 6
    assert any("0x3000-0x3fff" in line and "lost" in line for line in report.lines())
    assert set(_elf(tmp_path / "elf").pages) == {BLOCK * pfn for pfn in (1, 2, 4, 5)}
    raw = _convert(tmp_path / "in", tmp_path / "raw", "kdump-raw-zlib")
    assert raw.exit_status == 6
    bitmaps = (tmp_path / "raw").read_bytes()[2 * BLOCK : 4 * BLOCK]
    assert (bitmaps[0], bitmaps[BLOCK]) == (0b111110, 0b110110)


@pytest.mark.parametrize("form", ["elf", "kdump", "flattened"])
@pytest.mark.parametrize("with_numpy", [True, False])
def test_of_a_truncated_dump_what_is_there_is_kept(
    form: str, with_numpy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not with_numpy:
        module = "qemu_dump_ext.dump_readers._descriptor_runs.numpy_or_none"
        monkeypatch.setattr(module, lambda: None)
    pages = {pfn: hashlib.shake_128(b"%d" % pfn).digest(BLOCK) for pfn in range(1, 60)}
    if form == "elf":
        content = bytes(make_elf([Load(BLOCK, b"".join(pages.values()))], notes=_notes()))
    else:
        image = make_kdump(pages).data
        image[12 + 4 * 65 : 12 + 4 * 65 + 6] = b"x86_64"
        content = bytes(image)
    if form == "flattened":
        content = flatten(content, chunk=5000, in_order=True)
    for cut in (len(content) * 9 // 10, len(content) // 2 + 5):
        (tmp_path / "in").write_bytes(content[:cut])
        report = _convert(tmp_path / "in", tmp_path / f"{cut}")
        assert report.exit_status == 6
        found = _elf(tmp_path / f"{cut}").pages
        assert 5 < len(found) < len(pages)
        assert all(pages[gpa // BLOCK] == page for gpa, page in found.items())
        lost = BLOCK * (len(pages) - len(found))
        assert any(f"{lost >> 10} KiB" in what for what in report.lacking)


def test_memory_without_data_is_no_memory_of_zeros(tmp_path: Path):
    loads = [Load(BLOCK, b"a" * BLOCK, memsz=4 * BLOCK), Load(16 * BLOCK, b"", memsz=BLOCK)]
    (tmp_path / "in").write_bytes(make_elf(loads, notes=_notes()))
    report = _convert(tmp_path / "in", tmp_path / "raw", "kdump-raw-zlib")
    assert set(_kdump(tmp_path / "raw").pages) == {BLOCK}
    bitmaps = (tmp_path / "raw").read_bytes()[2 * BLOCK : 4 * BLOCK]
    assert (bitmaps[0], bitmaps[2], bitmaps[BLOCK]) == (0b11110, 0, 0b10)
    assert any("0x2000-0x4fff" in line for line in report.lines())


def test_more_memory_than_any_guest_has_is_damage(tmp_path: Path):
    loads = [Load(BLOCK, b"a" * BLOCK, memsz=1 << 52)]
    (tmp_path / "in").write_bytes(make_elf(loads, notes=_notes()))
    with pytest.raises(CorruptDumpError, match="4096 TiB of memory"):
        _convert(tmp_path / "in", tmp_path / "raw", "kdump-raw-zlib")


def test_a_page_map_has_no_blocks_where_there_is_no_memory(tmp_path: Path):
    far = 1 << 45
    loads = [Load(BLOCK, b"a" * BLOCK), Load(far, b"b" * BLOCK)]
    (tmp_path / "in").write_bytes(make_elf(loads, notes=_notes()))
    _convert(tmp_path / "in", tmp_path / "raw", "kdump-raw-zlib")
    assert (tmp_path / "raw").stat().st_blocks * 512 < 1 << 20
    with open_dump(tmp_path / "raw") as dump:
        assert list(dump.memory_ranges()) == [(BLOCK, BLOCK), (far, BLOCK)]
        assert dump.read(far, BLOCK) == b"b" * BLOCK


def test_more_segments_than_e_phnum_counts(tmp_path: Path):
    count, size = 65_700, 64
    content = b"".join(number.to_bytes(8, "little") * (size // 8) for number in range(count))
    loads = [Load(at, content[at : at + size]) for at in range(0, len(content), size)]
    (tmp_path / "in").write_bytes(make_elf(loads, notes=_notes(), xnum=True, sections_first=False))
    _convert(tmp_path / "in", tmp_path / "elf")
    found = ELFFile(io.BytesIO((tmp_path / "elf").read_bytes()))
    (load,) = found.iter_segments("PT_LOAD")
    assert load.data() == content


def test_memory_that_is_mapped_twice_is_there_once(tmp_path: Path):
    twice, first = b"twice" * 2000, 0xFFFF888000000000
    loads = [
        Load(BLOCK, twice, vaddr=first, offset=None),
        Load(BLOCK, twice, vaddr=first + 0x1000000),
        Load(BLOCK + 100, twice[100:200], vaddr=0x400000),
    ]
    (tmp_path / "in").write_bytes(make_elf(loads, notes=_notes()))
    _convert(tmp_path / "in", tmp_path / "elf")
    (load,) = ELFFile(io.BytesIO((tmp_path / "elf").read_bytes())).iter_segments("PT_LOAD")
    assert (load["p_paddr"], load.data()) == (BLOCK, twice)
    _convert(tmp_path / "in", tmp_path / "kept", keep=True)
    kept = list(ELFFile(io.BytesIO((tmp_path / "kept").read_bytes())).iter_segments("PT_LOAD"))
    assert [load["p_vaddr"] for load in kept] == [first, first + 0x1000000, 0x400000]
    assert [load.data() for load in kept] == [twice, twice, twice[100:200]]


def test_notes_of_others_stay_as_they_are(tmp_path: Path):
    others = (
        note(b"CORE", 1, struct.pack("<32xI300x", 4711)),  # the pid of a task, and no QEMU note
        note(b"VBCPU", 0xB01, b"registers of another kind"),
        note(b"", 3, b""),
    )
    source = _write(tmp_path, {1: b"a" * BLOCK}, b"".join(others))
    report = _convert(source, tmp_path / "raw", "kdump-raw-zlib")
    assert report.exit_status == 0
    assert _kdump(tmp_path / "raw").notes == b"".join(others)
    _convert(tmp_path / "raw", tmp_path / "elf")
    assert _elf(tmp_path / "elf").notes == b"".join(others)


def test_a_dump_without_registers_is_incomplete(tmp_path: Path):
    source = _write(tmp_path, {1: b"a" * BLOCK}, note(b"VMCOREINFO", 0, b"A=1\n"))
    report = _convert(source, tmp_path / "elf")
    assert report.exit_status == 6
    assert report.lacking == ("the earlier dump has no registers",)
    assert _elf(tmp_path / "elf").notes == note(b"VMCOREINFO", 0, b"A=1\n")


def test_what_is_kept_is_not_mended(tmp_path: Path):
    image = make_kdump({1: b"a" * BLOCK}, vmcoreinfo=b"NUMBER(phys_base)=4096\nOSRELEASE=6\n")
    image.data[12 + 4 * 65 : 12 + 4 * 65 + 6] = b"x86_64"
    (tmp_path / "in").write_bytes(image.data)
    mended = _convert(tmp_path / "in", tmp_path / "mended", "kdump-raw-zlib")
    assert struct.unpack_from("<Q", (tmp_path / "mended").read_bytes(), BLOCK) == (4096,)
    assert any(line.startswith("phys_base: 0x1000, was 0x1000000") for line in mended.mended or ())
    assert any(line.startswith("release: '6', was ''") for line in mended.mended or ())
    kept = _convert(tmp_path / "in", tmp_path / "kept", "kdump-raw-zlib", keep=True)
    assert not kept.mended
    content = (tmp_path / "kept").read_bytes()
    assert struct.unpack_from("<Q", content, BLOCK) == (0x1000000,)
    assert content[12 : 12 + 6 * 65] == bytes(image.data[12 : 12 + 6 * 65])


def test_a_note_that_the_sub_header_does_not_know_of_is_found(tmp_path: Path):
    image = make_kdump({1: b"a" * BLOCK}, vmcoreinfo=b"OSRELEASE=6\n")
    struct.pack_into("<QQ", image.data, BLOCK + 32, 0, 0)
    image.data[12 + 4 * 65 : 12 + 4 * 65 + 6] = b"x86_64"
    (tmp_path / "in").write_bytes(image.data)
    report = _convert(tmp_path / "in", tmp_path / "raw", "kdump-raw-zlib")
    assert "VMCOREINFO: the sub-header did not know of its note" in (report.mended or ())
    content = (tmp_path / "raw").read_bytes()
    offset, size = struct.unpack_from("<QQ", content, BLOCK + 32)
    assert content[offset : offset + size] == b"OSRELEASE=6\n"


def _with_damaged_notes(tmp_path: Path) -> Path:
    source = tmp_path / "in"
    source.write_bytes(make_elf([Load(0, ram_with_kernel())], notes=prstatus(1) + b"\xff" * 40))
    return source


def test_damaged_notes_do_not_throw_the_memory_away(tmp_path: Path):
    report = _convert(_with_damaged_notes(tmp_path), tmp_path / "out")
    assert report.exit_status == 6
    assert "VMCOREINFO: the notes were damaged" in (report.mended or ())
    ram = ram_with_kernel()
    assert _elf(tmp_path / "out").pages == {
        start: ram[start : start + PAGE] for start in range(0, len(ram), PAGE)
    }


def test_damaged_notes_of_a_dump_that_does_not_tell_its_machine(tmp_path: Path):
    ram = ram_with_kernel()
    pages = {at // BLOCK: ram[at : at + BLOCK] for at in range(0, len(ram), BLOCK)}
    image = make_kdump(pages, vmcoreinfo=b"OSRELEASE=6\n").data
    struct.pack_into("<QQ", image, BLOCK + 32, 1 << 40, 100)
    image[12 + 4 * 65 : 12 + 4 * 65 + 8] = b"Unknown\0"
    (tmp_path / "in").write_bytes(image)
    assert _convert(tmp_path / "in", tmp_path / "out").exit_status in {0, 6}
    assert ELFFile(io.BytesIO((tmp_path / "out").read_bytes()))["e_machine"] == "EM_X86_64"


def test_a_dump_with_damaged_notes_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = str(_with_damaged_notes(tmp_path))
    assert main(["open", source, "--reader", "gdb", "--print"]) == 0
    assert source in capsys.readouterr().out


def test_notes_that_memory_is_full_of_are_looked_at_one_at_a_time(tmp_path: Path):
    memory = FlatMemory(4 * MIB)
    for at in range(0, 4 * MIB, BLOCK):
        memory.put(
            at, struct.pack("<III12s", 11, min(60_000, 4 * MIB - at - 24), 0, b"VMCOREINFO\0\0")
        )
        memory.put(at + 24, b"OSRELEASE=6\nPAGESIZE=4096\nSYMBOL(a)=1\n")
    (tmp_path / "in").write_bytes(make_lime({0: bytes(memory.data)}))
    with open_dump(tmp_path / "in") as dump:
        tracemalloc.start()
        with pytest.raises(UnsupportedTargetError, match="nothing tells"):
            StoredGuest(dump)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 24 * MIB


def test_a_range_of_a_dump(tmp_path: Path):
    pages = {pfn: bytes([pfn]) * BLOCK for pfn in range(1, 9)}
    options = DumpOptions(memory_range=MemoryRange(3 * BLOCK + 1, BLOCK))
    _convert(_write(tmp_path, pages), tmp_path / "raw", "kdump-raw-zlib", options)
    assert set(_kdump(tmp_path / "raw").pages) == {3 * BLOCK, 4 * BLOCK}


def test_a_damaged_page_ends_it(tmp_path: Path):
    image = make_kdump({pfn: bytes([pfn]) * BLOCK for pfn in range(1, 9)}).data
    image[12 + 4 * 65 : 12 + 4 * 65 + 6] = b"x86_64"
    image[-10] ^= 0xFF
    (tmp_path / "in").write_bytes(image)
    with pytest.raises(CorruptDumpError, match="0x8000"):
        _convert(tmp_path / "in", tmp_path / "raw", "kdump-raw-zlib")
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize(
    "options", [DumpOptions(exact=True), DumpOptions(snapshot=True), DumpOptions(max_pause=1.0)]
)
def test_what_is_for_guests_that_run_is_refused(tmp_path: Path, options: DumpOptions):
    source = _write(tmp_path, {1: b"a" * BLOCK})
    with pytest.raises(RequestError, match="is for guests that run"):
        _convert(source, tmp_path / "out", "elf", options)


def test_a_guest_of_no_known_target_is_refused(tmp_path: Path):
    source = _write(tmp_path, {1: b"a" * BLOCK})
    content = bytearray(source.read_bytes())
    struct.pack_into("<H", content, 18, 50)  # EM_IA_64
    source.write_bytes(content)
    with pytest.raises(RequestError, match="machine 50"):
        _convert(source, tmp_path / "out")


def _split(tmp_path: Path, pages: Mapping[int, bytes], borders: list[int]) -> list[Path]:
    """Write parts as makedumpfile --split does: all of the bitmaps, and the pages of a range."""
    whole = make_kdump(dict(pages))
    first = whole.bitmaps
    bitmaps = whole.data[first : first + 2 * whole.bitmap_size]
    paths = []
    for number, (start, end) in enumerate(pairwise(borders)):
        part = make_kdump(
            {pfn: page for pfn, page in pages.items() if start <= pfn < end},
            max_mapnr=max(pages) + 1,
        ).data
        part[first : first + 2 * whole.bitmap_size] = bitmaps
        struct.pack_into("<i", part, BLOCK + 12, 1)
        struct.pack_into("<QQ", part, BLOCK + 80, start, end)
        part[12 + 4 * 65 : 12 + 4 * 65 + 6] = b"x86_64"
        paths.append(tmp_path / f"part{number}")
        paths[-1].write_bytes(part)
    return paths


def test_parts_of_a_split_dump_are_one(tmp_path: Path):
    pages = {pfn: bytes([pfn % 251]) * BLOCK for pfn in (*range(1, 40), *range(300, 350))}
    paths = _split(tmp_path, pages, [0, 17, 20, 310, 350])
    with open_dump(paths[2], *paths[:2], paths[3]) as dump:
        assert dump.read(16 * BLOCK, 6 * BLOCK) == b"".join(pages[pfn] for pfn in range(16, 22))
    _convert(paths[2], tmp_path / "elf", parts=(*paths[:2], paths[3]))
    assert _elf(tmp_path / "elf").pages == {BLOCK * pfn: page for pfn, page in pages.items()}


def test_parts_that_do_not_fit_are_refused(tmp_path: Path):
    pages = {pfn: bytes([pfn]) * BLOCK for pfn in range(1, 40)}
    paths = _split(tmp_path, pages, [0, 17, 20, 40])
    whole = _write(tmp_path, pages)
    for parts, reason in (
        ((paths[0],), "is missing: that of the pages 0x11 to 0x27"),
        ((paths[0], paths[2]), "is missing: that of the pages 0x11 to 0x13"),
        ((paths[0], *paths), "two parts have the page 0x0"),
        ((paths[0], whole), "no part of a split kdump"),
        ((whole, whole), "no part of a split kdump"),
    ):
        with pytest.raises(RequestError, match=reason):
            open_dump(*parts)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = str(_write(tmp_path, {1: b"a" * BLOCK}))
    assert main(["convert", source, "-z", "zlib", "-R", str(tmp_path / "raw")]) == 0
    assert set(_kdump(tmp_path / "raw").pages) == {BLOCK}
    assert "kdump-raw-zlib" in capsys.readouterr().err
    assert main(["convert", "-z", source, str(tmp_path / "flat")]) == 0
    assert (tmp_path / "flat").stat().st_mode & 0o777 == 0o600
    assert main(["convert", source, str(tmp_path / "raw")]) == 2
    assert "exists" in capsys.readouterr().err
    before = Path(source).read_bytes()
    assert main(["convert", source, source, "--force", "--json"]) == 0
    assert '"mended": ["e_ehsize' in capsys.readouterr().out or before
    assert main(["verify", source]) == 0
    (tmp_path / "text").write_text("no dump")
    assert main(["convert", str(tmp_path / "text"), str(tmp_path / "x")]) == 5
    assert not (tmp_path / "x").exists()
