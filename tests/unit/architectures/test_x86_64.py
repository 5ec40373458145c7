from __future__ import annotations

import struct

import pytest

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.architectures._declaration import VcpuReadings
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.registers.merge import merge_readings
from qemu_dump_ext.structures.dialect import MENDED, qemu_dialect

X86_64 = all_architectures()["x86_64"]
LOW = [RamBlock(0, 1 << 20, "ram", 0)]
LMA = 1 << 10


def readings(**sources: dict[str, int]) -> VcpuReadings:
    empty: dict[str, int] = {}
    return VcpuReadings(
        gdb=sources.get("gdb", empty),
        monitor=sources.get("monitor", empty),
        native=sources.get("native", empty),
        hardware_segments=False,
    )


def segment(name: str, selector: int, base: int, flags: int) -> dict[str, int]:
    return {f"{name}_selector": selector, f"{name}_base": base, f"{name}_flags": flags}


PROTECTED = {"cr0": 1, "efer": LMA, "eflags": 2} | segment("cs", 0x10, 0, 0xAF9B00)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # A task register that was loaded from a descriptor: bits of its base, as QEMU's TCG has.
        (PROTECTED | segment("tr", 0x40, 0xFFFFFE0000003000, 0x8B00), 0x8B00),
        (PROTECTED | segment("tr", 0x40, 0x12345678, 0x8B00), 0x12008B34),
        # A null selector, and a base that does not fit a descriptor: the base came by an MSR.
        (PROTECTED | segment("fs", 0, 0x12345678, 0), 0),
        (PROTECTED | segment("gs", 0x23, 1 << 40, 0xCFF300), 0xCFF300),
        (PROTECTED | segment("ds", 0x23, 0x12345678, 0xCF9300), 0x12CF9334),
        # Real mode has no descriptors.
        ({"cr0": 0} | segment("cs", 0xF000, 0xFFFF0000, 0x9B00), 0x9B00),
    ],
)
def test_hidden_bits_of_segment_flags(values: dict[str, int], expected: int):
    name = next(key for key in reversed(values) if key.endswith("_flags"))
    assert merge_readings(X86_64, readings(monitor=values))[name] == expected


def test_qemus_own_note_settles_hidden_bits():
    values = PROTECTED | segment("fs", 0x33, 0x12345678, 0xCFF300)
    merged = merge_readings(X86_64, readings(monitor=values, native={"fs_flags": 0xCFF300}))
    assert merged["fs_flags"] == 0xCFF300


def test_what_32_bit_code_hides_is_missing_rather_than_cut():
    cut = {"cr0": 1, "efer": LMA, "rax": 0x55667788, "r9": 0} | segment("cs", 0x23, 0, 0xCF9B00)
    assert not {"rax", "r9"} & merge_readings(X86_64, readings(gdb=cut)).keys()
    native = {"rax": 0x1122334455667788, "r9": 9}
    merged = merge_readings(X86_64, readings(gdb=cut, native=native))
    assert (merged["rax"], merged["r9"]) == (0x1122334455667788, 9)


def test_the_stub_comes_before_the_monitor_and_both_before_qemus_note():
    merged = merge_readings(
        X86_64, readings(gdb={"rax": 1}, monitor={"rax": 2, "rbx": 2}, native={"rbx": 3, "rcx": 3})
    )
    assert (merged["rax"], merged["rbx"], merged["rcx"]) == (1, 2, 3)


def test_one_vcpu_in_long_mode_makes_a_64_bit_dump():
    vcpus = [Vcpu(0, {"efer": 0}), Vcpu(1, {"efer": LMA})]
    assert X86_64.select_core(vcpus, LOW, MENDED, "").e_machine == 62
    # QEMU looks at the first one only.
    assert X86_64.select_core(vcpus, LOW, qemu_dialect((7, 2, 0)), "").e_machine == 3


def test_a_guest_in_32_bit_mode_needs_elf64_when_memory_reaches_4_gib():
    vcpus = [Vcpu(0, {"efer": 0})]
    assert X86_64.select_core(vcpus, LOW, MENDED, "").word_size == 4
    high = [*LOW, RamBlock(0xFFFC0000, 0x40000, "bios", 0)]
    assert X86_64.select_core(vcpus, high, MENDED, "").word_size == 8


def test_descriptor_lines_of_the_monitor():
    text = (
        "ES =0018 0000000000000000 ffffffff 00cf9300 DPL=0 DS   [-WA]\n"
        "GDT=     fffffe0000001000 0000007f\n"
    )
    assert X86_64.parse_monitor is not None
    assert X86_64.parse_monitor(text) == {
        "es_selector": 0x18,
        "es_base": 0,
        "es_limit": 0xFFFFFFFF,
        "es_flags": 0xCF9300,
        "gdt_selector": 0,
        "gdt_base": 0xFFFFFE0000001000,
        "gdt_limit": 0x7F,
        "gdt_flags": 0,
    }


def test_user_regs_struct_has_linux_order():
    order = (
        "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs_selector eflags"
        " rsp ss_selector fs_base gs_base ds_selector es_selector fs_selector gs_selector"
    ).split()
    note = X86_64.select_core([Vcpu(0, {"efer": LMA})], LOW, MENDED, "").notes[0]
    structure = note.bind("little")
    values = {name: number for number, name in enumerate(order, 1)}
    packed = structure.pack(pr_pid=7, **values)
    assert struct.unpack_from("<27Q", packed, 112) == tuple(range(1, 28))
    assert struct.unpack_from("<I", packed, 32) == (7,)
    assert len(packed) == 336
