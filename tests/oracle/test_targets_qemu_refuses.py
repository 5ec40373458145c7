"""Targets that QEMU itself refuses to dump: registers name themselves, and stand where Linux does.

Each is dumped in every way. What memory holds, QEMU's `pmemsave` tells.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.cli import main as qemu_dump
from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from qemu_dump_ext.memory_sources import AUTO
from qemu_dump_ext.structures.c_struct import ByteOrder
from tests.support.doors import gdb_argv, run_cli
from tests.support.newer_qemu import newer_qemu_command, own_qemu_version
from tests.support.raw_gdbstub import RawGdbstub
from tests.support.raw_qmp import RawQmp
from tests.support.refused_targets import NEWER_TARGETS, TARGETS, Target
from tests.support.sample_kdump import read_kdump, unflatten
from tests.support.side_by_side import SideBySide, made_side_by_side
from tests.support.ways import Outcome, Way, every_way, half_of, take_dumps

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

_REFUSED = "not currently supported|not supported on this target"
_BIOS_SIZE = 1 << 20
_MIB = 2
_ALL_TARGETS = (*TARGETS, *NEWER_TARGETS)
_SOURCES = ("backing_file", "process", "pmemsave", "gdbstub")


def _ways(target: Target) -> tuple[Way, ...]:
    """Return of each door and source the way to one format, which the next target turns around.

    By a newer QEMU, memory comes from the source that is taken by itself, into both formats.
    """
    if target.package:
        ways = every_way(sources=(AUTO,))
    else:
        ways = every_way(sources=_SOURCES if target.is_backed else _SOURCES[1:])
        if target.has_kdump:
            return half_of(ways, TARGETS.index(target))
    return tuple(way for way in ways if target.has_kdump or way.dump_format == "elf")


@dataclass(frozen=True)
class Taken:
    """What was dumped of a target, and how.

    Attributes:
        folder: Has the dumps, each under the name of its way.
        registers: Of each vCPU, as the stub showed them.
        outcomes: Of the dumps.
        memory: What QEMU's pmemsave wrote of each range that is in the dumps, by gpa.
        refusal: What QEMU says when it is to dump.
        exact: What we say to `--exact`.
        native_stream: What we say when memory is to come from QEMU's own dumps.
    """

    target: Target
    folder: Path
    registers: list[dict[str, int]]
    outcomes: Mapping[Way, Outcome]
    memory: Mapping[int, bytes]
    refusal: str
    exact: subprocess.CompletedProcess[str]
    native_stream: subprocess.CompletedProcess[str]

    def elf_cores(self) -> Iterator[tuple[Way, Path]]:
        for way in self.outcomes:
            if way.dump_format == "elf":
                yield way, self.folder / str(way)

    def missing(self, way: Way) -> list[str]:
        by_qmp = "" if way.has_stub else self.target.missing_by_qmp
        told = by_qmp or self.target.missing
        return told.split(", ") if told else []


def _plant_memory(machine: QemuMachine) -> None:
    """Write content, which a newer QEMU needs to tell the byte order of some targets by QMP."""
    with RawQmp(machine.qmp_sockets[0]) as qmp:
        text = qmp.execute("human-monitor-command", **{"command-line": "info mtree -f"})
    found = re.search(r"([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ram\)", text)
    assert found
    first, last = (int(address, 16) for address in found.groups())
    with RawGdbstub(machine.gdb_socket) as stub:
        assert stub.packet("Qqemu.PhyMemMode:1") == "OK"
        assert stub.packet(f"M{first:x},4:01020304") == "OK"
        for address in (first + 3 * 4096 - 500, last + 1 - 1000):
            content = hashlib.shake_128(str(address).encode()).hexdigest(1000)
            assert stub.packet(f"M{address:x},{1000:x}:{content}") == "OK"
        assert stub.packet("Qqemu.PhyMemMode:0") == "OK"


def _plant(target: Target, machine: QemuMachine) -> list[dict[str, int]]:
    order: ByteOrder = target.stub_order or ("big" if target.big else "little")
    shown = []
    with RawGdbstub(machine.gdb_socket) as stub:
        threads = []
        answer = stub.packet("qfThreadInfo")
        while answer.startswith("m"):
            threads += answer[1:].split(",")
            answer = stub.packet("qsThreadInfo")
        for thread in threads:
            stub.packet(f"Hg{thread}")
            fields = _stub_fields(target)
            end = max(offset for offset, _ in fields.values()) + target.word
            data = bytearray.fromhex(stub.packet("g"))
            if len(data) < end:
                shown.append(_plant_one_by_one(stub, target, thread, order))
                continue
            for name, (offset, planted) in fields.items():
                if planted:
                    value = hashlib.shake_128(f"{thread} {name}".encode()).digest(target.word)
                    number = int.from_bytes(value, "big") & ~3
                else:
                    held = data[offset : offset + target.word]
                    number = int.from_bytes(held, order) | target.flags.get(name, 0)
                data[offset : offset + target.word] = number.to_bytes(target.word, order)
            # What follows may be another name of the same registers.
            assert stub.packet(f"G{data[:end].hex()}") == "OK"
            data = bytearray.fromhex(stub.packet("g"))
            values = {
                name: int.from_bytes(data[offset : offset + target.word], order)
                for name, (offset, _) in fields.items()
            }
            assert len(set(values.values())) > len(values) * 3 // 4
            assert all(values[name] & bits == bits for name, bits in target.flags.items())
            shown.append(values)
    return shown


def _plant_one_by_one(
    stub: RawGdbstub, target: Target, thread: str, order: ByteOrder
) -> dict[str, int]:
    fields = _stub_fields(target)
    shown = {}
    for name, register, size in stub.described_registers():
        if name in fields:
            held = int.from_bytes(bytes.fromhex(stub.packet(f"p{register:x}")), order)
            value = hashlib.shake_128(f"{thread} {name}".encode()).digest(size)
            number = int.from_bytes(value, "big") & ~3
            if not fields[name][1]:
                number = held | target.flags.get(name, 0)
            assert stub.packet(f"P{register:x}={number.to_bytes(size, order).hex()}") == "OK"
            shown[name] = int.from_bytes(bytes.fromhex(stub.packet(f"p{register:x}")), order)
    assert len(set(shown.values())) > len(fields) * 3 // 4
    return shown


def _stub_fields(target: Target) -> dict[str, tuple[int, bool]]:
    """Return offset in the `g` packet, and whether to plant, by name."""
    return {
        word.rstrip("="): (index * target.word, not word.endswith("="))
        for index, word in enumerate(target.stub.split())
        if word != "-"
    }


def _save_memory(machine: QemuMachine, path: Path, gpa: int, size: int) -> bytes:
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute("pmemsave", val=gpa, size=size, filename=str(path))
    return path.read_bytes()


def _refusal(machine: QemuMachine) -> str:
    with RawQmp(machine.qmp_sockets[1]) as qmp, pytest.raises(RuntimeError) as refused:
        qmp.execute("dump-guest-memory", paging=False, protocol="file:/dev/null")
    return str(refused.value)


def _take(target: Target, folder: Path) -> Taken:
    emulator = target.emulator or target.architecture
    command = [f"qemu-system-{emulator}"]
    if target.package:
        command = newer_qemu_command(emulator, target.package)
    if shutil.which(command[0]) is None or shutil.which("gdb-multiarch") is None:
        pytest.skip(f"{command[0]} or gdb-multiarch is not installed")
    bios = folder / "bios"
    bios.write_bytes(bytes(_BIOS_SIZE))
    option, machine_type, *more = (
        str(bios) if word == "BIOS" else word for word in target.arguments
    )
    arguments = [option, f"{machine_type},memory-backend=ram", *more, "-m", f"{_MIB}M"]
    arguments += ["-object", f"memory-backend-memfd,id=ram,size={_MIB}M,share=on"]
    with stopped_machine(command, arguments) as machine:
        _plant_memory(machine)
        registers = _plant(target, machine)
        outcomes = take_dumps(machine, folder, _ways(target), before=target.gdb)
        loads = _elf(next(folder.glob("*.elf")), target).loads
        memory = {
            gpa: _save_memory(machine, folder / "memory", gpa, len(content))
            for gpa, content in loads.items()
        }
        by_qmp = ["--qmp", str(machine.qmp_sockets[0])]
        return Taken(
            target,
            folder,
            registers,
            outcomes,
            memory,
            _refusal(machine),
            run_cli(*by_qmp, "--exact", folder / "exact"),
            run_cli(*by_qmp, "--memory", "native_stream", folder / "native_stream"),
        )


@dataclass(frozen=True)
class _Elf:
    """An ELF core: the bytes of its notes, and memory by gpa."""

    notes: bytes
    loads: Mapping[int, bytes]


def _elf(path: Path, target: Target) -> _Elf:
    """Check the ELF header and return what is in the file."""
    data = path.read_bytes()
    order = target.order
    wide = target.header_word == 8
    assert data[:6] == b"\x7fELF" + bytes((1 + wide, 1 + target.big))
    assert struct.unpack_from(f"{order}HH", data, 16) == (4, target.e_machine)
    assert struct.unpack_from(f"{order}I", data, 48 if wide else 36) == (target.e_flags,)
    word = "Q" if wide else "I"
    (phoff,) = struct.unpack_from(f"{order}{word}", data, 32 if wide else 28)
    size, count = struct.unpack_from(f"{order}HH", data, 54 if wide else 42)
    notes, loads = b"", {}
    for at in range(phoff, phoff + size * count, size):
        (kind,) = struct.unpack_from(f"{order}I", data, at)
        offset, _, paddr, length = struct.unpack_from(
            f"{order}4{word}", data, at + target.header_word
        )
        if kind == 4:
            notes = data[offset : offset + length]
        else:
            loads[paddr] = data[offset : offset + length]
    return _Elf(notes, loads)


def _notes(data: bytes, target: Target) -> list[tuple[int, bytes]]:
    """Return type and descriptor of each note."""
    notes, offset = [], 0
    while offset < len(data):
        name_size, size, note_type = struct.unpack_from(f"{target.order}III", data, offset)
        assert data[offset + 12 :][:name_size] == b"CORE\0"
        start = offset + 12 + (name_size + 3) // 4 * 4
        notes.append((note_type, data[start : start + size]))
        offset = start + (size + 3) // 4 * 4
    return notes


def _of(targets: Iterable[Target]) -> pytest.MarkDecorator:
    by_name = {target.name: target for target in targets}
    return pytest.mark.parametrize(
        "taken", by_name.values(), ids=by_name, indirect=True, scope="module"
    )


of_all = _of(_ALL_TARGETS)
of_those_of_the_machine = _of(TARGETS)
of_those_with_kdump = _of(target for target in _ALL_TARGETS if target.has_kdump)
of_mips = _of(target for target in _ALL_TARGETS if target.e_machine == 8)
of_sparc = _of(target for target in _ALL_TARGETS if target.architecture == "sparc")
of_those_with_floating_point = _of(target for target in _ALL_TARGETS if target.fp_reg)
of_those_gdb_takes = _of(target for target in _ALL_TARGETS if target.shown)


@pytest.fixture(scope="module")
def all_taken(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SideBySide[Target, Taken]]:
    with made_side_by_side(request, tmp_path_factory, "taken", _take) as taken:
        yield taken


@pytest.fixture(scope="module")
def taken(request: pytest.FixtureRequest, all_taken: SideBySide[Target, Taken]) -> Taken:
    return all_taken.result(request.param)


def test_no_target_is_left_out():
    refused = {
        name
        for name, known in all_architectures().items()
        if not known.dumped_by_qemu_since or known.dumped_by_qemu_since > own_qemu_version()
    }
    assert {target.name for target in TARGETS} == refused


@of_all
def test_qemu_itself_refuses(taken: Taken):
    assert re.search(_REFUSED, taken.refusal)


@of_all
def test_there_is_nothing_to_be_exact_to(taken: Taken):
    assert taken.exact.returncode == 2
    line = (
        r"qemu-dump-guest-memory: --exact: QEMU \d+\.\d+\.\d+ itself does not dump"
        rf" {taken.target.architecture} guests \(without --exact, they are dumped as their Linux"
        r" does it\)\n"
    )
    assert re.fullmatch(line, taken.exact.stderr)
    assert not (taken.folder / "exact").exists()


@of_all
def test_memory_does_not_come_from_dumps_of_qemus_own(taken: Taken):
    assert taken.native_stream.returncode == 3
    line = r"qemu-dump-guest-memory: guest memory cannot be read: native_stream: .*\n"
    assert re.fullmatch(line, taken.native_stream.stderr)
    assert re.search(_REFUSED, taken.native_stream.stderr)
    assert not (taken.folder / "native_stream").exists()


@of_all
def test_registers_stand_where_linux_has_them(taken: Taken):
    target = taken.target
    for way, path in taken.elf_cores():
        notes = _notes(_elf(path, target).notes, target)
        statuses = [note for kind, note in notes if kind == 1]
        assert len(statuses) == len(taken.registers)
        for index, (note, registers) in enumerate(zip(statuses, taken.registers, strict=True)):
            assert len(note) == target.size
            assert struct.unpack_from(f"{target.order}I", note, target.pid) == (index + 1,)
            _check_words(taken, way, note[target.registers :], target.pr_reg, registers)


@of_those_with_floating_point
def test_floating_point_stands_where_linux_has_it(taken: Taken):
    target = taken.target
    for way, path in taken.elf_cores():
        notes = _notes(_elf(path, target).notes, target)
        floating_point = [note for kind, note in notes if kind == 2]
        for note, registers in zip(floating_point, taken.registers, strict=True):
            assert len(note) == target.word * len(target.fp_reg.split())
            _check_words(taken, way, note, target.fp_reg, registers)
        statuses = [note for kind, note in notes if kind == 1]
        for note in statuses:
            at = target.registers + target.word * len(target.pr_reg.split())
            assert 1 in struct.unpack(f"{target.order}{len(note[at:]) // 4}I", note[at:])


def _check_words(taken: Taken, way: Way, data: bytes, names: str, registers: dict[str, int]):
    target = taken.target
    for number, name in enumerate(names.split()):
        if name in registers:
            stored = data[number * target.word : (number + 1) * target.word]
            value = int.from_bytes(stored, "big" if target.big else "little")
            is_missing = name.partition(".")[0] in taken.missing(way)
            expected = 0 if is_missing else registers[name]
            assert value == expected, (str(way), name)


@of_mips
def test_floating_point_of_mips(taken: Taken):
    target = taken.target
    for way, path in taken.elf_cores():
        notes = [note for kind, note in _notes(_elf(path, target).notes, target) if kind == 2]
        for note, registers in zip(notes, taken.registers, strict=True):
            stored = struct.unpack(f"{target.order}32Q2I", note)
            values = [registers[f"f{index}"] for index in range(32)]
            if not target.wide:  # Status.FR is not set: pairs
                pairs = zip(values[::2], values[1::2], strict=True)
                values = [value for even, odd in pairs for value in (odd << 32 | even, 0)]
            control = [registers[name] & 0xFFFFFFFF for name in ("fsr", "fir")]
            assert stored == (*values, *control), str(way)


@of_sparc
def test_floating_point_of_sparc(taken: Taken):
    target = taken.target
    for way, path in taken.elf_cores():
        notes = [note for kind, note in _notes(_elf(path, target).notes, target) if kind == 2]
        for note, registers in zip(notes, taken.registers, strict=True):
            stored = struct.unpack_from(">34I4B", note)
            names = [*(f"f{index}" for index in range(32)), "fsr"]
            assert stored[:32] + stored[33:34] == tuple(registers[name] for name in names), way
            assert stored[34:] == (0, 8, 1, 0)


@of_all
def test_what_is_missing_is_told(taken: Taken):
    for way, outcome in taken.outcomes.items():
        expected = taken.missing(way)
        told = re.findall(
            r"^incomplete: vCPU \d+ has zero for (.*) in its note", outcome.said, re.MULTILINE
        )
        lines = [", ".join(expected)] * len(taken.registers) if expected else []
        assert told == lines, (str(way), outcome.said)
        assert outcome.status == (6 if expected else 0), (str(way), outcome.said)


@of_all
def test_memory_is_what_qemu_saves(taken: Taken):
    assert any(content.strip(b"\0") for content in taken.memory.values())
    for way, path in taken.elf_cores():
        assert _elf(path, taken.target).loads == taken.memory, str(way)
        if way.source != AUTO:
            used = re.search(r"memory by ([\w+]+)", taken.outcomes[way].said)
            assert used
            # A boot ROM is in no file.
            assert set(used[1].split("+")) - {"process"} == {way.source} - {"process"}


@of_those_with_kdump
def test_the_kdump_has_the_notes_and_the_memory_of_the_elf_core(taken: Taken):
    target = taken.target
    notes = {way.has_stub: _elf(path, target).notes for way, path in taken.elf_cores()}
    for way in taken.outcomes:
        if way.dump_format != "elf":
            image = bytes(unflatten((taken.folder / str(way)).read_bytes()))
            assert notes[way.has_stub] in image[: 1 << 20], str(way)
            pages = dict(read_kdump(image, target.order, target.word))
            size = len(next(iter(pages.values())))
            expected: set[int] = set()
            for gpa, content in taken.memory.items():
                places = range(gpa - gpa % size, gpa + len(content), size)
                stored = b"".join(pages[place] for place in places)
                assert stored[gpa % size :].startswith(content), way
                expected.update(places)
            assert pages.keys() == expected


@of_all
def test_readelf_has_nothing_to_say(taken: Taken):
    words = ["readelf", "-hlnW", *(str(path) for _, path in taken.elf_cores())]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert not done.stderr


@of_those_with_kdump
def test_the_kdump_is_sound(taken: Taken, capsys: pytest.CaptureFixture[str]):
    way = next(way for way in taken.outcomes if way.dump_format != "elf")
    status = qemu_dump(["verify", str(taken.folder / str(way))])
    assert status == 0, "".join(capsys.readouterr())


@of_those_gdb_takes
def test_gdb_shows_the_registers_of_every_vcpu(taken: Taken):
    target = taken.target
    core = next(path for way, path in taken.elf_cores() if way.has_stub)
    words = " ".join(f"{name}=%#lx" for name in target.shown)
    values = ", ".join(f"${name}" for name in target.shown.values())
    commands = [f"set gnutarget {target.bfd}"] if target.bfd else []
    commands += [f"core-file {core}"]
    commands += [f'thread apply all -ascending printf "vcpu {words}\\n", {values}']
    if target.fp_shown:
        names = " ".join(target.fp_shown.values())
        commands += [f"thread apply all -ascending info registers {names}"]
    done = subprocess.run(
        gdb_argv(commands, "gdb-multiarch"), capture_output=True, text=True, check=False
    )
    lines = re.findall(r"^vcpu (.*)$", done.stdout, re.MULTILINE)
    assert len(lines) == len(taken.registers), done.stdout + done.stderr
    mask = (1 << 8 * target.word) - 1
    raw = [int(value, 16) for value in re.findall(r"\(raw (0x[0-9a-f]+)\)", done.stdout)]
    for line, registers in zip(lines, taken.registers, strict=True):
        pairs = (word.split("=") for word in line.split())
        seen = {name: int(value, 16) & mask for name, value in pairs}
        assert seen == {name: registers[name] for name in target.shown}
        floating_point, raw = raw[: len(target.fp_shown)], raw[len(target.fp_shown) :]
        assert floating_point == [registers[name] for name in target.fp_shown]
    assert not raw


def test_gdb_that_was_told_nothing_is_explained(tmp_path: Path):
    if shutil.which("qemu-system-mipsel") is None:
        pytest.skip("qemu-system-mipsel is not installed")
    with (
        stopped_machine(["qemu-system-mipsel"], ["-M", "none", "-cpu", "24Kf"]) as machine,
        RawQmp(machine.qmp_sockets[0]),  # no monitor is free to be asked
        RawQmp(machine.qmp_sockets[1]),
    ):
        done = run_cli("--gdb", machine.gdb_socket, tmp_path / "unknown")
    assert done.returncode == 3
    assert "with --qmp SOCKET" in done.stderr


def test_a_processor_that_gdb_cannot_be_told_is_left_to_qmp(tmp_path: Path):
    if shutil.which("qemu-system-xtensa") is None:
        pytest.skip("qemu-system-xtensa is not installed")
    with stopped_machine(["qemu-system-xtensa"], ["-M", "none", "-cpu", "dsp3400"]) as machine:
        by_qmp = ["--qmp", machine.qmp_sockets[0]]
        by_gdb = run_cli("--gdb", machine.gdb_socket, *by_qmp, tmp_path / "by-gdb")
        on_line = run_cli(*by_qmp, tmp_path / "by-qmp")
    assert by_gdb.returncode == 3
    assert "--qmp SOCKET without --gdb" in by_gdb.stderr
    assert len(by_gdb.stderr) < 400  # without the packet that gdb does not understand
    assert on_line.returncode == 0, on_line.stderr
