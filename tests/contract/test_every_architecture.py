"""What every file in architectures/ promises, against numbers that did not come from it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import qemu_dump_ext.architectures as package
from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.architectures._declaration import Architecture, Core, NoteLayout
from qemu_dump_ext.dump_formats.kdump import lay_out
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.page_codecs import UNCOMPRESSED
from qemu_dump_ext.plan.plan import GuestSnapshot, make_plan
from qemu_dump_ext.registers.notes import decode_vcpu_registers, encode_vcpu_notes
from qemu_dump_ext.structures.dialect import MENDED, Dialect, qemu_dialect
from qemu_dump_ext.structures.elf_notes import parse_notes
from qemu_dump_ext.structures.utsname import UtsName

_QEMU_7_2 = qemu_dialect((7, 2, 22))
_S390X = [
    (1, 336),
    (2, 136),
    (0x305, 4),
    (0x304, 128),
    (0x301, 8),
    (0x302, 8),
    (0x303, 4),
    (0x309, 128),
    (0x30A, 256),
    (0x30B, 32),
]
# Type and size of each note: measured in dumps of QEMU 7.2 (LoongArch: 11.1), and the structures
# of Linux.
_MIPS64 = [(1, 480), (2, 264)]
_MIPS32 = [(1, 256), (2, 264)]
BY_QEMU = {
    "aarch64": [(1, 392), (2, 528)],
    "arm": [(1, 148), (0x400, 260)],
    "i386": [(1, 144), (0, 440)],
    "loongarch64": [(1, 480), (2, 268)],
    "ppc": [(1, 328), (2, 260), (0x100, 544), (0x102, 256), (0x101, 140)],
    "ppc64": [(1, 504), (2, 264), (0x100, 544), (0x102, 256), (0x101, 140)],
    "riscv32": [(1, 204)],
    "riscv64": [(1, 376)],
    "s390x": _S390X,
    "x86_64": [(1, 336), (0, 440)],
}
# These QEMU refuses to dump.
ONLY_BY_LINUX = {
    "alpha": [(1, 384), (2, 256)],
    "hppa": [(1, 396), (2, 256)],
    "m68k": [(1, 154), (2, 108)],
    "microblaze": [(1, 228)],
    "microblazeel": [(1, 228)],
    "mips": _MIPS32,
    "mips64": _MIPS64,
    "mips64el": _MIPS64,
    "mipsel": _MIPS32,
    "or1k": [(1, 212)],
    "sh4": [(1, 168), (2, 136)],
    "sh4eb": [(1, 168), (2, 136)],
    "sparc": [(1, 228), (2, 396)],
    "sparc64": [(1, 408), (2, 280)],
    "xtensa": [(1, 588)],
    "xtensaeb": [(1, 588)],
}
BY_QEMU |= ONLY_BY_LINUX
BY_LINUX = BY_QEMU | {
    "loongarch64": [(1, 480), (2, 272)],
    "ppc": [(1, 268), (2, 264), (0x100, 544), (0x102, 256), (0x101, 140)],
}
E_MACHINE = {
    "aarch64": 183,
    "alpha": 0x9026,
    "hppa": 15,
    "m68k": 4,
    "microblaze": 189,
    "microblazeel": 189,
    "mips": 8,
    "mips64": 8,
    "mips64el": 8,
    "mipsel": 8,
    "or1k": 92,
    "sh4": 42,
    "sh4eb": 42,
    "sparc": 2,
    "sparc64": 43,
    "xtensa": 94,
    "xtensaeb": 94,
    "arm": 40,
    "i386": 3,
    "loongarch64": 258,
    "ppc": 20,
    "ppc64": 21,
    "riscv32": 243,
    "riscv64": 243,
    "s390x": 22,
    "x86_64": 62,
}
# Where pr_pid and the first register of pr_reg are.
PID_AND_REGISTERS = {4: (24, 72), 8: (32, 112)}
# Six words for arguments; integers aligned to 2 bytes.
ELSEWHERE = {"mips": (24, 96), "mipsel": (24, 96), "m68k": (22, 70)}
LOW = [RamBlock(0x8000, 0x10000, "ram", 0)]

architectures = pytest.mark.parametrize("name", sorted(all_architectures()))
dialects = pytest.mark.parametrize("dialect", [MENDED, _QEMU_7_2], ids=["mended", "exact"])


def _core(architecture: Architecture, dialect: Dialect, **registers: int) -> Core:
    return architecture.select_core([Vcpu(0, registers)], LOW, dialect, "")


def _self_naming(architecture: Architecture, index: int) -> Vcpu:
    def value(name: str) -> int:
        return int.from_bytes(hashlib.shake_128(f"{index} {name}".encode()).digest(256), "big")

    registers = {register.name: value(register.name) for register in architecture.registers}
    selectors = {"sve_vl": 64, "efer": 1 << 10, "big_endian": 0, "lpcr": 0, "mstatus": 0}
    return Vcpu(index, registers | {k: v for k, v in selectors.items() if k in registers})


def test_the_tables_name_every_file():
    folder = Path(package.__file__).parent
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert files == set(all_architectures()) == set(BY_QEMU) == set(BY_LINUX) == set(E_MACHINE)


@architectures
@dialects
def test_notes_have_the_sizes_that_were_measured(name: str, dialect: Dialect):
    architecture = all_architectures()[name]
    core = _core(architecture, dialect, efer=1 << 10 if name == "x86_64" else 0)
    usual = [note for note in core.notes if note.type != 0x405 and note.layout.name != "fxsave"]
    sizes = [(note.type, note.bind(core.byte_order).size) for note in usual]
    assert sizes == (BY_QEMU if dialect is _QEMU_7_2 else BY_LINUX)[name]
    assert core.e_machine == E_MACHINE[name]


@architectures
def test_pid_and_registers_are_where_linux_has_them(name: str):
    architecture = all_architectures()[name]
    core = _core(architecture, MENDED, efer=1 << 10 if name == "x86_64" else 0)
    word_size = 4 if name == "i386" else core.word_size
    offsets = core.notes[0].bind(core.byte_order).offsets
    known = {register.name for register in architecture.registers}
    first = min(offsets[member] for member in offsets.keys() & known)
    expected = ELSEWHERE.get(name, PID_AND_REGISTERS[word_size])
    assert (offsets["pr_pid"], first) == expected


@pytest.mark.parametrize(("bits", "size"), [(128, 592), (2048, 8768)])
def test_the_sve_note_has_the_size_that_was_measured(bits: int, size: int):
    core = _core(all_architectures()["aarch64"], MENDED)
    (sve,) = (note for note in core.notes if note.type == 0x405)
    structure = sve.bind_for({"sve_vl": bits // 8}, "little")
    assert structure is not None
    assert structure.size == size


@architectures
@dialects
def test_registers_survive_a_round_trip(name: str, dialect: Dialect):
    architecture = all_architectures()[name]
    vcpus = [_self_naming(architecture, index) for index in range(2)]
    core = architecture.select_core(vcpus, LOW, dialect, "")
    encoded = encode_vcpu_notes(architecture, core, vcpus)
    assert not encoded.missing
    notes = list(parse_notes(encoded.data, core.byte_order))
    decoded = decode_vcpu_registers(architecture, core, notes, len(vcpus))
    assert decoded is not None
    assert decoded.count == len(notes)
    for vcpu, registers in zip(vcpus, decoded.vcpus, strict=True):
        assert registers
        for register, value in registers.items():
            planted = vcpu.registers[register]
            bits = max(value.bit_length(), 1)
            # Cut to the widest member that holds it, and never another one's value.
            assert value == planted or value == planted & (1 << -(-bits // 8) * 8) - 1


@architectures
@dialects
def test_a_register_that_no_source_gives_is_missing(name: str, dialect: Dialect):
    architecture = all_architectures()[name]
    vcpu = _self_naming(architecture, 0)
    core = architecture.select_core([vcpu], LOW, dialect, "")
    registers = {**vcpu.registers}
    del registers[architecture.program_counter]
    encoded = encode_vcpu_notes(architecture, core, [Vcpu(0, registers)])
    held = any(architecture.program_counter in _members(note) for note in core.notes)
    named = any(architecture.program_counter in names for names in encoded.missing.values())
    assert named == held


def _members(note: NoteLayout) -> set[str]:
    return {field.name for field in note.layout.fields}


@architectures
def test_alternatives_of_a_note_can_be_told_apart_by_size(name: str):
    for core in all_architectures()[name].cores:
        for note in core.notes:
            layouts = (note.layout, *note.alternatives)
            sizes = [note.bind(core.byte_order, layout).size for layout in layouts]
            assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize(
    ("name", "dialect", "size", "offset_note_at"),
    [
        ("i386", MENDED, 80, 32),
        ("arm", _QEMU_7_2, 80, 32),
        ("arm", MENDED, 96, 40),
        ("ppc", MENDED, 96, 40),
        ("riscv32", MENDED, 96, 40),
        ("riscv64", MENDED, 104, 48),
    ],
)
def test_the_sub_header_is_that_of_the_target(
    name: str, dialect: Dialect, size: int, offset_note_at: int
):
    plan = make_plan(_snapshot(name, LOW), dialect)
    layout = lay_out(plan, UNCOMPRESSED)
    assert len(layout.sub_header) == size
    stored = layout.sub_header[offset_note_at : offset_note_at + 8]
    assert int.from_bytes(stored, plan.core.byte_order) == plan.page_size + size


def _snapshot(
    name: str, blocks: list[RamBlock], *, machine: str = "", note: bytes = b""
) -> GuestSnapshot:
    architecture = all_architectures()[name]
    vcpu = Vcpu(0, {"efer": 0})
    return GuestSnapshot(architecture, blocks, [vcpu], note, UtsName(), machine)


def test_a_page_map_that_would_reach_too_far_is_refused():
    high = [RamBlock(0xFFFFFFF0F0000000, 0x100000, "firmware", 0)]
    architecture = all_architectures()["hppa"]
    snapshot = GuestSnapshot(architecture, [*LOW, *high], [Vcpu(0, {})], b"", UtsName())
    with pytest.raises(RequestError, match="does not reach guest memory at 0xfffffff0f0000000"):
        lay_out(make_plan(snapshot, MENDED), UNCOMPRESSED)


def test_page_frames_of_arm_count_from_phys_base_where_readers_do():
    blocks = [RamBlock(0x40000000, 0x100000, "ram", 0)]
    ours, exact = (make_plan(_snapshot("arm", blocks), d) for d in (MENDED, _QEMU_7_2))
    assert (ours.phys_base, ours.pfn_base) == (0x40000000, 0x40000)
    assert (exact.phys_base, exact.pfn_base) == (0x40000000, 0)
    max_mapnr = [
        int.from_bytes(lay_out(p, UNCOMPRESSED).header[428:432], "little") for p in (ours, exact)
    ]
    assert max_mapnr == [0x100, 0x40100]


def _vmcoreinfo(text: bytes) -> bytes:
    words = [size.to_bytes(4, "little") for size in (11, len(text), 0)]
    return b"".join(words) + b"VMCOREINFO\0\0" + text + b"\0" * (-len(text) % 4)


@pytest.mark.parametrize(
    ("line", "expected"),
    [(b"PAGESIZE=4096", 4096), (b"PAGESIZE=16384", 16384), (b"PAGESIZE=3", 65536), (b"", 65536)],
)
def test_the_block_size_is_the_page_size_of_the_kernel(line: bytes, expected: int):
    note = _vmcoreinfo(b"OSRELEASE=6.1\n" + line + b"\n")
    assert make_plan(_snapshot("aarch64", LOW, note=note), MENDED).page_size == expected
    assert make_plan(_snapshot("aarch64", LOW, note=note), _QEMU_7_2).page_size == 65536


@pytest.mark.parametrize(
    ("machine", "expected"), [("pseries-7.2-machine", 65536), ("powernv9-machine", 4096)]
)
def test_the_block_size_of_ppc64_is_that_of_its_machine(machine: str, expected: int):
    assert make_plan(_snapshot("ppc64", LOW, machine=machine), _QEMU_7_2).page_size == expected


@pytest.mark.parametrize(
    ("dialect", "machine", "registers", "expected"),
    [
        (MENDED, "pseries-7.2-machine", {"lpcr": 1 << 25}, "little"),
        (_QEMU_7_2, "pseries-7.2-machine", {"lpcr": 1 << 25}, "big"),
        (qemu_dialect((8, 1, 0)), "pseries-8.1-machine", {"lpcr": 1 << 25}, "little"),
        (MENDED, "powernv9-machine", {"lpcr": 0, "hid0": 1 << 59, "pvr": 0x4E1202}, "little"),
        (MENDED, "powernv8-machine", {"lpcr": 0, "hid0": 1 << 44, "pvr": 0x4D0200}, "little"),
        (MENDED, "powernv9-machine", {"lpcr": 0, "hid0": 1 << 44, "pvr": 0x4E1202}, "big"),
        (MENDED, "mac99-machine", {"msr": 1 << 16}, "little"),
        (MENDED, "mac99-machine", {"msr": 0}, "big"),
    ],
)
def test_the_byte_order_of_ppc64(
    dialect: Dialect, machine: str, registers: dict[str, int], expected: str
):
    vcpus = [Vcpu(0, registers)]
    select_core = all_architectures()["ppc64"].select_core
    assert select_core(vcpus, LOW, dialect, machine).byte_order == expected
