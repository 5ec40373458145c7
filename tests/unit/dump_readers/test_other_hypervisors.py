"""Cores that VirtualBox and Xen write: memory and registers, as an independent writer put them."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from volatility3.framework.layers import xen

from qemu_dump_ext.cli import main
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.stored_guest import StoredGuest
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import CorruptDumpError, DumpError, UnsupportedTargetError
from tests.support.doors import gdb_argv
from tests.support.sample_cores import (
    PAGE,
    fxsave,
    make_virtualbox,
    make_xen,
    virtualbox_notes,
    virtualbox_state,
    xen_context,
)
from tests.support.volatility import volatility_layer

_GPRS = "rax rbx rcx rdx rsi rdi rsp rbp rip r8 r9 r10 r11 r12 r13 r14 r15".split()
_SEGMENTS = "cs ds es fs gs ss".split()
_PRSTATUS = "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi".split()
_FRAMES = [(5, b"five" * 1024), (6, b"six!" * 1024), (3, b"tree" * 1024), (300, b"last" * 1024)]


def _registers(vcpu: int) -> dict[str, int]:
    """A value of its own for each register."""
    names = [*_GPRS, "eflags", "cr0", "cr2", "cr3", "cr4", "dr0", "dr1", "dr2", "dr3", "dr6", "dr7"]
    values = {name: 0x1111000000000000 * (vcpu + 1) + n for n, name in enumerate(names)}
    for number, name in enumerate((*_SEGMENTS, "ldt", "tr")):
        values |= {
            f"{name}_selector": 0x100 * (vcpu + 1) + 4 * number,
            f"{name}_base": number << 40,
        }
        values[f"{name}_limit"] = 0xF000 + number
    values |= {"gdt_base": 7 << 44, "gdt_limit": 0x77, "idt_base": 8 << 44, "idt_limit": 0x88}
    return values | {"kernel_gs_base": 0xFFFF888000000000 + vcpu, "efer": 0xD01}


def _gpr_of_note(descriptor: bytes, name: str) -> int:
    """The register in struct elf_prstatus, whose array of registers begins at 112."""
    return int(struct.unpack_from("<Q", descriptor, 112 + 8 * _PRSTATUS.index(name))[0])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "core"


def test_core_of_virtualbox_has_memory_and_registers(path: Path, tmp_path: Path):
    vcpus = [_registers(number) for number in range(2)]
    notes = virtualbox_notes([virtualbox_state(values) for values in vcpus])
    path.write_bytes(make_virtualbox({0: b"a" * PAGE, 0x100000: b"b" * PAGE}, notes))
    with open_dump(path) as dump:
        assert (dump.reader, dump.format) == ("virtualbox", "virtualbox")
        assert dump.read(0x100000, PAGE) == b"b" * PAGE
        guest = StoredGuest(dump)
        assert guest.architecture.name == "x86_64"
        assert [(block.gpa, block.size) for block in guest.ram_blocks] == [
            (0, PAGE),
            (0x100000, PAGE),
        ]
        assert not guest.lacking
        for vcpu, values in zip(guest.vcpus, vcpus, strict=True):
            assert {name: vcpu.registers[name] for name in values} == values
            # 64-bit code, present, in units of pages: as in the upper half of a descriptor.
            assert vcpu.registers["cs_flags"] == 0xA09B00
            assert vcpu.registers["gdt_flags"] == 0
        prstatus = [note.descriptor for note in dump.notes if note.is_prstatus]
        for descriptor, values in zip(prstatus, vcpus, strict=True):
            for name in _PRSTATUS:
                assert _gpr_of_note(descriptor, name) == values[name]
        report = verify_dump(dump)
        assert not report.problems
        assert report.memory_bytes == 2 * PAGE
    assert main(["convert", str(path), str(tmp_path / "out")]) == 0
    with open_dump(tmp_path / "out") as ours:
        again = StoredGuest(ours).vcpus
        for vcpu, values in zip(again, vcpus, strict=True):
            kept = {name: value for name, value in values.items() if name in vcpu.registers}
            assert {name: vcpu.registers[name] for name in kept} == kept
            assert {*_GPRS, "cr3", "cs_base", "kernel_gs_base"} <= kept.keys()


@pytest.mark.parametrize(
    ("notes", "words"),
    [
        (virtualbox_notes([virtualbox_state({})], magic=1), "magic 0x1"),
        (virtualbox_notes([virtualbox_state({})], count=2), "of 2 vCPUs has 1"),
        (virtualbox_notes([bytes(500)]), "VBCPU has 500 bytes"),
    ],
)
def test_core_of_virtualbox_that_cannot_be_is_refused(path: Path, notes: bytes, words: str):
    path.write_bytes(make_virtualbox({0: bytes(PAGE)}, notes))
    with pytest.raises(CorruptDumpError, match=words):
        open_dump(path)


def _xen_registers(vcpu: int, **values: int) -> Mapping[str, int]:
    told = _registers(vcpu) | {"gs_base_kernel": 0xFFFF << 48 | vcpu, "gs_base_user": 0x7F << 40}
    return told | values


def _fxsave(vcpu: int) -> bytes:
    """One and a half, plus the number of the vCPU, on top of the stack, which is register 5."""
    st = struct.pack("<QH", (3 + 2 * vcpu) << 62 - vcpu, 0x3FFF + vcpu)
    xmm = b"".join(bytes((16 * vcpu + n,)) * 16 for n in range(16))
    return fxsave(fcw=0x37F, fsw=5 << 11, ftw=1 << 5, mxcsr=0x1F80 + vcpu, st=st, xmm=xmm)


def _of_virtualbox(place: int) -> bytes:
    states = [
        virtualbox_state(_registers(number), xsave=_fxsave(number), xsave_at=place)
        for number in range(2)
    ]
    return make_virtualbox({0: b"a" * PAGE}, virtualbox_notes(states))


def _of_xen() -> bytes:
    contexts = [xen_context(_xen_registers(number), _fxsave(number)) for number in range(2)]
    return make_xen(_FRAMES, contexts)


@pytest.mark.parametrize(
    "core",
    [*(_of_virtualbox(place) for place in (568, 576, 584, 592)), _of_xen()],
    ids=["568", "576", "584", "592", "xen"],
)
def test_floating_point_is_kept_and_gdb_shows_it(core: bytes, path: Path, tmp_path: Path):
    path.write_bytes(core)
    status = main(["convert", str(path), str(tmp_path / "kdump"), "--format", "kdump-raw-zlib"])
    assert status == (6 if b"VBCPU" not in core else 0)
    assert main(["convert", str(tmp_path / "kdump"), str(tmp_path / "elf")]) == 0
    for file in (path, tmp_path / "elf"):
        with open_dump(file) as dump:
            notes = [(note.name, note.type, note.descriptor) for note in dump.notes]
            areas = [one for one in notes if one[:2] in {("CORE", 2), ("LINUX", 0x46E62B7F)}]
            assert [one[2] for one in areas] == [_fxsave(0), _fxsave(1)]
            assert [notes.index(one) for one in areas] == [1, 3]  # behind those of their vCPUs
            first, second = (vcpu.registers for vcpu in StoredGuest(dump).vcpus)
            assert first["fxsave"] == int.from_bytes(_fxsave(0), "little")
    with open_dump(path) as dump:
        first, second = (vcpu.registers for vcpu in dump.vcpus)
    assert (first["fcw"], first["ftw"], second["mxcsr"]) == (0x37F, 1 << 5, 0x1F81)
    assert first["fpr5"] == 0x3FFF << 64 | 3 << 62
    assert second["xmm3"] == int.from_bytes(b"\x13" * 16, "big")
    shown = ("p $st0", "p/x $xmm3.uint128", "p/x $mxcsr")
    commands = [f"core-file {tmp_path / 'elf'}"]
    for thread in (1, 2):
        commands += [f"thread {thread}", *shown]
    done = subprocess.run(gdb_argv(commands), capture_output=True, text=True, check=False)
    told = re.findall(r"^\$\d+ = (.*)$", done.stdout, re.MULTILINE)
    expected = [("1.5", "3" + "03" * 15, "1f80"), ("2.5", "13" * 16, "1f81")]
    assert told == [word for st0, *more in expected for word in (st0, *(f"0x{n}" for n in more))]


def test_floating_point_that_is_not_found_is_named(path: Path, tmp_path: Path):
    states = [virtualbox_state(_registers(0), xsave_at=800)]
    path.write_bytes(make_virtualbox({0: b"a" * PAGE}, virtualbox_notes(states)))
    with open_dump(path) as dump:
        assert list(dump.lacking) == ["vCPU 0: the core does not have its floating point"]
    assert main(["convert", str(path), str(tmp_path / "out")]) == 6


@pytest.mark.parametrize("version", [0x10000, 0x10003, 0x10007])
def test_registers_of_another_version_of_virtualbox_are_none(path: Path, version: int):
    notes = virtualbox_notes([virtualbox_state(_registers(0))], version=version)
    path.write_bytes(make_virtualbox({0: b"a" * PAGE}, notes))
    with open_dump(path) as dump:
        assert (dump.reader, dump.vcpus, dump.notes) == ("virtualbox", (), ())
        assert dump.read(0, PAGE) == b"a" * PAGE
        assert "the earlier dump has no registers" in StoredGuest(dump).lacking


def test_core_of_xen_has_its_pages_in_any_order(path: Path):
    path.write_bytes(make_xen([*_FRAMES, ((1 << 64) - 1, bytes(PAGE))], [xen_context({})]))
    with open_dump(path) as dump:
        assert (dump.reader, dump.format) == ("xen", "xen")
        assert list(dump.memory_ranges()) == [
            (3 * PAGE, PAGE),
            (5 * PAGE, 2 * PAGE),
            (300 * PAGE, PAGE),
        ]
        for frame, content in _FRAMES:
            assert dump.read(frame * PAGE, PAGE) == content
        report = verify_dump(dump)
        assert not report.problems
        assert report.memory_bytes == 4 * PAGE


def test_core_of_xen_has_the_pages_that_volatility_finds(path: Path):
    # Volatility takes frames in order alone, and none without a number.
    path.write_bytes(make_xen(sorted(_FRAMES), [xen_context({})]))
    with open_dump(path) as dump, volatility_layer(path, xen.XenCoreDumpLayer) as layer:
        for frame, _ in _FRAMES:
            assert layer.read(frame * PAGE, PAGE) == dump.read(frame * PAGE, PAGE)


def _tables(rip: int, frame: int) -> list[tuple[int, bytes]]:
    """Frames with the tables of long mode, from `frame` on, that lead from `rip` to frame 3."""
    found = []
    for level, shift in enumerate((39, 30, 21, 12)):
        table = bytearray(PAGE)
        entry = (3 if level == 3 else frame + level + 1) * PAGE | 3
        struct.pack_into("<Q", table, 8 * (rip >> shift & 511), entry)
        found.append((frame + level, bytes(table)))
    return found


def test_core_of_xen_has_registers_and_their_mode(path: Path, tmp_path: Path):
    rip = 0xFFFFFFFF81000123
    paging = {"cr0": 0x80050033, "cr3": 16 * PAGE, "cr4": 0x6F0, "rip": rip}
    kernel = _xen_registers(0, cs_selector=0x10, **paging)
    program = _xen_registers(1, cs_selector=0x33, **paging)
    contexts_of_both = [xen_context(kernel), xen_context(program)]
    path.write_bytes(make_xen([*_FRAMES, *_tables(rip, 16)], contexts_of_both))
    with open_dump(path) as dump:
        guest = StoredGuest(dump)
        first, second = (vcpu.registers for vcpu in guest.vcpus)
        for registers, told in ((first, kernel), (second, program)):
            names = [*_GPRS, "cr3", "dr7", "fs_base", *(f"{name}_selector" for name in _SEGMENTS)]
            assert {name: registers[name] for name in names} == {n: told[n] for n in names}
            assert registers["efer"] == 0x500
        bases = kernel["gs_base_kernel"], kernel["gs_base_user"]
        assert (first["gs_base"], first["kernel_gs_base"]) == bases
        assert second["kernel_gs_base"] == program["gs_base_kernel"]
        assert second["gs_base"] == program["gs_base_user"]
        assert "gdt_base" not in first
        assert any("does not have" in words and "gdt_base" in words for words in guest.lacking)
        prstatus = [note.descriptor for note in dump.notes if note.is_prstatus]
        assert [_gpr_of_note(one, "r13") for one in prstatus] == [kernel["r13"], program["r13"]]
    # What Xen does not tell is named, and so the status is that of a dump with less in it.
    assert main(["convert", str(path), str(tmp_path / "out")]) == 6


def test_of_a_vcpu_whose_tables_lead_nowhere_no_mode_is_told(path: Path):
    told = _xen_registers(0, cr0=0x80050033, cr3=16 * PAGE, cr4=0x6F0, rip=0x1234)
    path.write_bytes(make_xen([*_FRAMES, *_tables(0x400000, 16)], [xen_context(told)]))
    with open_dump(path) as dump:
        assert "efer" not in dump.vcpus[0].registers


@pytest.mark.parametrize(
    ("context", "machine", "magic"),
    [(bytes(2800), 62, 0xF00FEBEE), (xen_context({}), 183, 0xF00FEBED)],
    ids=["32 bits", "aarch64"],
)
def test_registers_of_another_form_are_none(path: Path, context: bytes, machine: int, magic: int):
    path.write_bytes(make_xen(_FRAMES, [context], machine=machine, magic=magic))
    with open_dump(path) as dump:
        assert (dump.vcpus, dump.notes) == ((), ())
        assert "the earlier dump has no registers" in StoredGuest(dump).lacking


@pytest.mark.parametrize(
    ("core", "error", "words"),
    [
        (make_xen(_FRAMES, translated=False), UnsupportedTargetError, "paravirtualized"),
        (make_xen(_FRAMES, magic=1), CorruptDumpError, "damaged"),
        (make_xen(_FRAMES, page_size=100), CorruptDumpError, "damaged"),
        (make_xen(_FRAMES, count=1 << 60), CorruptDumpError, "bytes of their numbers"),
        (make_xen(_FRAMES, without=".xen_pfn"), CorruptDumpError, "0x0 bytes of their numbers"),
        (make_xen(_FRAMES, without=".xen_pages"), CorruptDumpError, "0x0 bytes of pages"),
        (make_xen([(1 << 60, bytes(PAGE))]), CorruptDumpError, "of frame 0x1000000000000000"),
    ],
)
def test_core_of_xen_that_is_not_read_is_refused_by_its_name(
    path: Path, core: bytes, error: type[DumpError], words: str
):
    path.write_bytes(core)
    with pytest.raises(error, match=words):
        open_dump(path)
