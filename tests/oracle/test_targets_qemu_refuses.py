"""Targets that QEMU itself refuses to dump: registers name themselves, and stand where Linux does.

Offsets are those of Linux's structures, written down here independently of the package.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.c_struct import ByteOrder
from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from tests.support.doors import child_environment, gdb_argv, run_cli, run_gdb
from tests.support.newer_qemu import newer_qemu_command
from tests.support.raw_gdbstub import RawGdbstub
from tests.support.raw_qmp import RawQmp

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

_REFUSED = "not currently supported|not supported on this target"
_BIOS_SIZE = 1 << 20
_INCOMPLETE = re.compile(r"^incomplete: vCPU \d+ has zero for (.*) in its note", re.MULTILINE)


def _names(prefix: str, count: int, first: int = 0) -> str:
    return " ".join(f"{prefix}{index}" for index in range(first, first + count))


@dataclass(frozen=True)
class Target:
    """One guest.

    Attributes:
        name: Of the architecture.
        arguments: Of QEMU.
        stub: Registers in the order of the stub's numbers; `-` is not planted, a trailing `=`
            is not either, but is compared.
        pr_reg: Registers in the order of Linux's pr_reg, by the stub's names; `-` is anything.
        e_machine: Of the ELF header.
        wide: ELFCLASS64.
        big: Byte order.
        pid: Offset of pr_pid.
        registers: Offset of pr_reg.
        size: Of struct elf_prstatus.
        e_flags: Of the ELF header.
        gdb: What gdb is told before it connects.
        shown: gdb's names of registers by those of the stub, where gdb takes cores of this target;
            empty where its BFD knows no such note.
        flags: Bits that are set in registers which are not planted.
        missing: Registers that no source gives.
        missing_by_qmp: Registers that only the stub gives.
        package: Which has a newer QEMU; empty: the machine's own.
        emulator: Behind qemu-system-, where it is not the name.
        stub_order: Byte order of the stub, where it is another one than the target's.
    """

    name: str
    arguments: tuple[str, ...]
    stub: str
    pr_reg: str
    e_machine: int
    wide: bool
    big: bool
    pid: int
    registers: int
    size: int
    gdb: tuple[str, ...]
    e_flags: int = 0
    shown: dict[str, str] = field(default_factory=dict)
    flags: dict[str, int] = field(default_factory=dict)
    missing: str = ""
    missing_by_qmp: str = ""
    package: str = ""
    emulator: str = ""
    stub_order: ByteOrder | None = None

    @property
    def word(self) -> int:
        return 8 if self.wide else 4

    @property
    def order(self) -> str:
        return ">" if self.big else "<"


_GPRS = _names("r", 32)
_FPRS = _names("f", 32)
_MIPS_STUB = f"- {_names('r', 31, first=1)} status= lo hi badvaddr cause= pc {_FPRS} fsr= fir="
_MIPS_CONTROL = "lo hi pc badvaddr status cause"
_MIPS_SHOWN = {name: name for name in f"{_names('r', 31, first=1)} lo hi pc cause".split()}
_MIPS_SHOWN |= {"status": "sr", "badvaddr": "bad"}
_CU1, _FR = 1 << 29, 1 << 26
_ALPHA = _names("r", 31)
_SH4 = _names("r", 16)
_SH4_STUB = f"{_SH4} pc pr gbr - mach macl sr="
_MICROBLAZE_STUB = f"{_GPRS} pc msr= ear esr fsr"
_HPPA = _names("gr", 31, first=1)
_HPPA_SPACES = _names("sr", 8)
_HPPA_TEMPORARY = _names("cr", 7, first=24)
_MALTA = ("-M", "malta", "-bios", "BIOS")


def _mips(name: str, cpu: str, *more: str, wide: bool, big: bool) -> Target:
    return Target(
        name,
        (*_MALTA, "-cpu", cpu, *more),
        stub=_MIPS_STUB,
        pr_reg=f"{_GPRS} {_MIPS_CONTROL}" if wide else f"{'- ' * 6} {_GPRS} {_MIPS_CONTROL}",
        e_machine=8,
        wide=wide,
        big=big,
        pid=32 if wide else 24,
        registers=112 if wide else 72,
        size=480 if wide else 256,
        gdb=(
            f"set architecture mips:isa{64 if wide else 32}r2",
            f"set endian {'big' if big else 'little'}",
        ),
        e_flags=0x80000000 if wide else 0x70001000,
        shown=_MIPS_SHOWN,
        flags={"status": _CU1 | (_FR if wide else 0)},  # lets the monitor show floating point
        missing_by_qmp="badvaddr",
    )


def _narrow(name: str, *arguments: str, big: bool = True, **facts: Any) -> Target:
    return Target(name, arguments, wide=False, big=big, **({"pid": 24, "registers": 72} | facts))


def _sh4(name: str, *arguments: str, big: bool) -> Target:
    return _narrow(
        name,
        *arguments,
        big=big,
        stub=_SH4_STUB,
        pr_reg=f"{_SH4} pc pr sr gbr mach macl",
        e_machine=42,
        size=168,
        gdb=("set architecture sh4", f"set endian {'big' if big else 'little'}"),
        shown={name: name for name in f"{_SH4} pc pr gbr mach macl".split()},
        missing_by_qmp="mach, macl",
    )


def _microblaze(name: str, *, big: bool) -> Target:
    return _narrow(
        name,
        "-M",
        "petalogix-s3adsp1800",
        big=big,
        stub=_MICROBLAZE_STUB,
        pr_reg=f"{_GPRS} pc msr ear esr fsr",
        e_machine=189,
        size=228,
        gdb=("set architecture sh4", f"set endian {'big' if big else 'little'}"),
    )


TARGETS = (
    _mips("mips64el", "5KEf", "-smp", "2", wide=True, big=False),
    _mips("mipsel", "24Kf", wide=False, big=False),
    _mips("mips64", "5KEf", wide=True, big=True),
    _mips("mips", "24Kf", "-smp", "2", wide=False, big=True),
    Target(
        "sparc64",
        ("-M", "sun4u"),
        stub=f"- {_names('g', 7, first=1)} {' '.join(_names(x, 8) for x in 'oli')} {'- ' * 32}"
        " pc npc state= - - y",
        pr_reg=f"{' '.join(_names(x, 8) for x in 'goli')} state pc npc y",
        e_machine=43,
        wide=True,
        big=True,
        pid=32,
        registers=112,
        size=408,
        gdb=("set architecture sparc:v9", "set endian big"),
        flags={"state": 0x5A << 32 | 0x80 << 24},  # CCR, ASI
    ),
    _narrow(
        "sparc",
        "-M",
        "SS-5",  # those of several vCPUs have a ROM beyond 4 GiB, so ELFCLASS64
        stub=f"- {_names('g', 7, first=1)} {' '.join(_names(x, 8) for x in 'oli')} {_FPRS}"
        " y psr= - - pc npc fsr",
        pr_reg=f"{' '.join(_names(x, 8) for x in 'goli')} psr pc npc y",
        e_machine=2,
        size=228,
        gdb=("set architecture sparc", "set endian big"),
    ),
    _narrow(
        "m68k",
        "-M",
        "none",
        "-cpu",
        "m68040",
        stub=f"{_names('d', 8)} {_names('a', 8)} sr= pc",
        pr_reg=f"{_names('d', 7, first=1)} {_names('a', 7)} d0 a7 - sr pc",
        e_machine=4,
        pid=22,
        registers=70,
        size=154,
        gdb=("set architecture m68k", "set endian big"),
        flags={"sr": 0x15},
        shown={name: name for name in f"{_names('d', 8)} {_names('a', 6)} pc".split()}
        | {"a6": "fp", "a7": "sp", "sr": "ps"},
    ),
    Target(
        "alpha",
        ("-M", "clipper", "-smp", "2"),
        stub=f"{_ALPHA} - {'- ' * 32} pc - unique",
        pr_reg=f"{_ALPHA} pc unique",
        e_machine=0x9026,
        wide=True,
        big=False,
        pid=32,
        registers=112,
        size=384,
        gdb=("set architecture alpha",),
        missing_by_qmp="unique",
    ),
    _sh4("sh4", "-M", "r2d", big=False),
    _sh4("sh4eb", "-M", "none", "-cpu", "sh7751r", big=True),
    _narrow(
        "or1k",
        "-M",
        "or1k-sim",
        "-smp",
        "2",
        stub=f"{_GPRS} - pc sr=",
        pr_reg=f"{_GPRS} pc sr",
        e_machine=92,
        size=212,
        gdb=("set architecture sh4", "set endian big"),
        missing_by_qmp="sr",
    ),
    _microblaze("microblaze", big=True),
    _microblaze("microblazeel", big=False),
    _narrow(
        "hppa",
        "-M",
        "hppa",
        "-smp",
        "2",
        stub=f"psw= {_HPPA} sar iaoq_f iasq_f iaoq_b iasq_b cr15 iir isr ior ipsw - sr4 sr0 sr1"
        f" sr2 sr3 sr5 sr6 sr7 cr0 cr8 cr9 cr10 cr12 cr13 {_HPPA_TEMPORARY}",
        pr_reg=f"psw {_HPPA} {_HPPA_SPACES} iaoq_f iaoq_b iasq_f iasq_b sar iir isr ior ipsw cr0"
        f" {_HPPA_TEMPORARY} - cr8 cr9 cr12 cr13 cr10 cr15",
        e_machine=15,
        size=396,
        gdb=("set architecture hppa1.0", "set endian big"),
        e_flags=0x210,
        shown={f"gr{index}": f"r{index}" for index in range(1, 32)}
        | {"iaoq_f": "pcoqh", "iasq_f": "pcsqh", "iaoq_b": "pcoqt", "iasq_b": "pcsqt", "sar": "sar"}
        | {"psw": "flags", "gr2": "rp", "gr27": "dp", "gr28": "ret0", "gr29": "ret1", "gr30": "sp"},
        missing="cr31",
        missing_by_qmp="cr0, cr10, cr12, cr13, cr15, cr24, cr25, cr26, cr27, cr28, cr29, cr30,"
        " cr31, cr8, cr9, iasq_b, iasq_f, ior, ipsw, isr, sar",
    ),
    _narrow(
        "xtensa",
        "-M",
        "sim",
        "-smp",
        "2",
        big=False,
        stub=f"pc {_names('ar', 32)}",
        pr_reg=f"pc {'- ' * 63} {_names('ar', 32)}",
        e_machine=94,
        size=588,
        gdb=("set architecture hppa1.0", "set endian little"),
    ),
    _narrow(
        "xtensaeb",
        "-M",
        "sim",
        "-cpu",
        "test_kc705_be",
        stub=f"pc {_names('ar', 32)}",
        pr_reg=f"pc {'- ' * 63} {_names('ar', 32)}",
        e_machine=94,
        size=588,
        gdb=(),  # none that Debian has can connect
    ),
)


_PACKAGES = dict.fromkeys(("mips", "mipsel", "mips64", "mips64el"), "qemu-system-mips")
_PACKAGES |= {"sparc": "qemu-system-sparc", "sparc64": "qemu-system-sparc"}
_OTHERWISE_IN_NEWER: dict[str, dict[str, Any]] = {
    # The monitor shows all control registers.
    "hppa": {"arguments": ("-M", "B160L", "-smp", "2"), "missing": "", "missing_by_qmp": ""},
    "microblazeel": {
        "arguments": ("-M", "petalogix-ml605"),
        "emulator": "microblaze",
        "stub_order": "big",
    },
}
NEWER_TARGETS = tuple(
    replace(
        target,
        package=_PACKAGES.get(target.name, "qemu-system-misc"),
        **_OTHERWISE_IN_NEWER.get(target.name, {}),
    )
    for target in TARGETS
)
ALL_TARGETS = (*TARGETS, *NEWER_TARGETS)


@dataclass(frozen=True)
class Taken:
    """What was dumped of a target, and how.

    Attributes:
        registers: Of each vCPU, as the stub showed them.
        said: What the doors wrote.
    """

    target: Target
    machine: QemuMachine
    folder: Path
    registers: list[dict[str, int]]
    said: dict[str, str]
    statuses: dict[str, int]


def _plant_memory(machine: QemuMachine) -> None:
    """Write what a newer QEMU needs to tell the byte order of some targets by QMP."""
    with RawQmp(machine.qmp_sockets[0]) as qmp:
        text = qmp.execute("human-monitor-command", **{"command-line": "info mtree -f"})
    first = re.search(r"([0-9a-f]{16})-[0-9a-f]{16} \(prio \d+, ram\)", text)
    assert first
    with RawGdbstub(machine.gdb_socket) as stub:
        assert stub.packet("Qqemu.PhyMemMode:1") == "OK"
        assert stub.packet(f"M{int(first[1], 16):x},4:01020304") == "OK"
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
                shown.append(_plant_one_by_one(stub, target, thread))
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


def _plant_one_by_one(stub: RawGdbstub, target: Target, thread: str) -> dict[str, int]:
    fields = _stub_fields(target)
    shown = {}
    for name, register, size in stub.described_registers():
        if name in fields:
            held = int(stub.packet(f"p{register:x}"), 16)
            value = hashlib.shake_128(f"{thread} {name}".encode()).digest(size)
            number = int.from_bytes(value, "big") & ~3
            if not fields[name][1]:
                number = held | target.flags.get(name, 0)
            assert stub.packet(f"P{register:x}={number:0{2 * size}x}") == "OK"
            shown[name] = int(stub.packet(f"p{register:x}"), 16)
    assert len(set(shown.values())) > len(fields) * 3 // 4
    return shown


def _stub_fields(target: Target) -> dict[str, tuple[int, bool]]:
    """Return offset in the `g` packet, and whether to plant, by name."""
    return {
        word.rstrip("="): (index * target.word, not word.endswith("="))
        for index, word in enumerate(target.stub.split())
        if word != "-"
    }


def _of(targets: Iterable[Target]) -> pytest.MarkDecorator:
    by_name = {f"{'newer-' * bool(target.package)}{target.name}": target for target in targets}
    return pytest.mark.parametrize(
        "taken", by_name.values(), ids=by_name, indirect=True, scope="module"
    )


of_all = _of(ALL_TARGETS)
of_those_of_the_machine = _of(TARGETS)
of_mips = _of(target for target in ALL_TARGETS if target.e_machine == 8)
of_sparc = _of(target for target in TARGETS if target.name == "sparc")
of_mipsel = _of(target for target in TARGETS if target.name == "mipsel")
of_those_gdb_takes = _of(target for target in ALL_TARGETS if target.shown)


@pytest.fixture(scope="module")
def taken(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Taken]:
    target: Target = request.param
    emulator = target.emulator or target.name
    command = [f"qemu-system-{emulator}"]
    if target.package:
        command = newer_qemu_command(emulator, target.package)
    if shutil.which(command[0]) is None or shutil.which("gdb-multiarch") is None:
        pytest.skip(f"{command[0]} or gdb-multiarch is not installed")
    folder = tmp_path_factory.mktemp(target.name)
    bios = folder / "bios"
    bios.write_bytes(bytes(_BIOS_SIZE))
    arguments = [str(bios) if word == "BIOS" else word for word in target.arguments]
    with stopped_machine(command, arguments) as machine:
        _plant_memory(machine)
        registers = _plant(target, machine)
        by_qmp = ["--qmp", str(machine.qmp_sockets[0])]
        doors = {"qmp": run_cli(*by_qmp, folder / "qmp")}
        if target.gdb:
            words = f"qemu-dump-guest-memory {folder / 'gdb'}"
            doors["gdb"] = run_gdb(machine, [words], "gdb-multiarch", before=target.gdb)
        if not target.package:
            doors["kdump"] = run_cli(*by_qmp, "-z", "-R", folder / "kdump")
            doors["exact"] = run_cli(*by_qmp, "--exact", folder / "exact")
        if target.gdb and not target.package:
            by_gdb = ["--gdb", str(machine.gdb_socket), *by_qmp]
            doors["cli-gdb"] = run_cli(*by_gdb, folder / "cli-gdb")
        said = {name: done.stdout + done.stderr for name, done in doors.items()}
        statuses = {name: done.returncode for name, done in doors.items()}
        yield Taken(target, machine, folder, registers, said, statuses)
    shutil.rmtree(folder)


def _notes(path: Path, target: Target) -> list[tuple[int, bytes]]:
    """Check the ELF header and return type and descriptor of each note."""
    data = path.read_bytes()
    order = target.order
    assert data[:6] == b"\x7fELF" + bytes((1 + target.wide, 1 + target.big))
    assert struct.unpack_from(f"{order}HH", data, 16) == (4, target.e_machine)
    assert struct.unpack_from(f"{order}I", data, 48 if target.wide else 36) == (target.e_flags,)
    word = "Q" if target.wide else "I"
    (phoff,) = struct.unpack_from(f"{order}{word}", data, 32 if target.wide else 28)
    assert struct.unpack_from(f"{order}I", data, phoff) == (4,)
    (offset,) = struct.unpack_from(f"{order}{word}", data, phoff + target.word)
    (size,) = struct.unpack_from(f"{order}{word}", data, phoff + 4 * target.word)
    notes, end = [], offset + size
    while offset < end:
        name_size, size, note_type = struct.unpack_from(f"{order}III", data, offset)
        assert data[offset + 12 :][:name_size] == b"CORE\0"
        start = offset + 12 + (name_size + 3) // 4 * 4
        notes.append((note_type, data[start : start + size]))
        offset = start + (size + 3) // 4 * 4
    return notes


def _doors(taken: Taken) -> list[str]:
    return [door for door in taken.said if door not in {"kdump", "exact"}]


def test_no_target_is_left_out():
    refused = {
        name for name, known in all_architectures().items() if not known.dumped_by_qemu_since
    }
    assert {target.name for target in TARGETS} == refused


@of_all
def test_qemu_itself_refuses(taken: Taken):
    with RawQmp(taken.machine.qmp_sockets[1]) as qmp, pytest.raises(RuntimeError, match=_REFUSED):
        qmp.execute("dump-guest-memory", paging=False, protocol="file:/dev/null")


@of_those_of_the_machine
def test_there_is_nothing_to_be_exact_to(taken: Taken):
    assert taken.statuses["exact"] == 2
    line = (
        rf"qemu-dump-guest-memory: --exact: QEMU \d+\.\d+\.\d+ itself does not dump"
        rf" {taken.target.name} guests \(without --exact, they are dumped as their Linux does it"
        r"\)\n"
    )
    assert re.fullmatch(line, taken.said["exact"])
    assert not (taken.folder / "exact").exists()


@of_all
def test_registers_stand_where_linux_has_them(taken: Taken):
    target = taken.target
    for door in _doors(taken):
        assert (taken.folder / door).exists(), taken.said[door]
        notes = _notes(taken.folder / door, target)
        missing = target.missing_by_qmp.split(", ") if door == "qmp" else []
        statuses = [note for kind, note in notes if kind == 1]
        assert len(statuses) == len(taken.registers)
        for index, (note, registers) in enumerate(zip(statuses, taken.registers, strict=True)):
            assert len(note) == target.size
            assert struct.unpack_from(f"{target.order}I", note, target.pid) == (index + 1,)
            for number, name in enumerate(target.pr_reg.split()):
                if name in registers:
                    at = target.registers + number * target.word
                    stored = note[at : at + target.word]
                    value = int.from_bytes(stored, "big" if target.big else "little")
                    assert value == (0 if name in missing else registers[name]), (door, name)


@of_mips
def test_floating_point_of_mips(taken: Taken):
    for door in _doors(taken):
        notes = [note for kind, note in _notes(taken.folder / door, taken.target) if kind == 2]
        for note, registers in zip(notes, taken.registers, strict=True):
            stored = struct.unpack(f"{taken.target.order}32Q2I", note)
            values = [registers[f"f{index}"] for index in range(32)]
            if not taken.target.wide:  # Status.FR is not set: pairs
                pairs = zip(values[::2], values[1::2], strict=True)
                values = [value for even, odd in pairs for value in (odd << 32 | even, 0)]
            control = [registers[name] & 0xFFFFFFFF for name in ("fsr", "fir")]
            assert stored == (*values, *control), door


@of_sparc
def test_floating_point_of_sparc(taken: Taken):
    for door in _doors(taken):
        notes = [note for kind, note in _notes(taken.folder / door, taken.target) if kind == 2]
        for note, registers in zip(notes, taken.registers, strict=True):
            stored = struct.unpack_from(">34I4B", note)
            names = [*(f"f{index}" for index in range(32)), "fsr"]
            assert stored[:32] + stored[33:34] == tuple(registers[name] for name in names), door
            assert stored[34:] == (0, 8, 1, 0)


@of_all
def test_what_is_missing_is_told(taken: Taken):
    for door in set(taken.said) - {"exact"}:
        text = taken.said[door]
        by_qmp = door in {"qmp", "kdump"} and taken.target.missing_by_qmp
        expected = by_qmp or taken.target.missing
        told = re.findall(
            r"^incomplete: vCPU \d+ has zero for (.*) in its note", text, re.MULTILINE
        )
        assert told == [expected] * len(taken.registers if expected else ()), (door, text)
        if door != "gdb":
            assert taken.statuses[door] == (6 if expected else 0), (door, text)


@of_all
def test_readelf_has_nothing_to_say(taken: Taken):
    for door in _doors(taken):
        words = ["readelf", "-hlnW", str(taken.folder / door)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert not done.stderr


@of_those_of_the_machine
def test_the_kdump_is_sound(taken: Taken):
    verify = "import sys; from qemu_dump_ext.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", verify, "verify", taken.folder / "kdump"],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr


@of_those_gdb_takes
def test_gdb_shows_the_registers_of_every_vcpu(taken: Taken):
    target = taken.target
    words = " ".join(f"{name}=%#lx" for name in target.shown)
    values = ", ".join(f"${name}" for name in target.shown.values())
    command = f'thread apply all -ascending printf "vcpu {words}\\n", {values}'
    done = subprocess.run(
        gdb_argv([f"core-file {taken.folder / 'gdb'}", command], "gdb-multiarch"),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = re.findall(r"^vcpu (.*)$", done.stdout, re.MULTILINE)
    assert len(lines) == len(taken.registers), done.stdout + done.stderr
    mask = (1 << 8 * target.word) - 1
    for line, registers in zip(lines, taken.registers, strict=True):
        pairs = (word.split("=") for word in line.split())
        seen = {name: int(value, 16) & mask for name, value in pairs}
        assert seen == {name: registers[name] for name in target.shown}


@of_mipsel
def test_gdb_that_was_told_nothing_is_explained(taken: Taken):
    done = run_cli("--gdb", taken.machine.gdb_socket, taken.folder / "unknown")
    assert done.returncode == 3
    assert "with --qmp SOCKET" in done.stderr
