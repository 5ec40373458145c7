"""Which architecture a guest is given whose CPUs have the type of several."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qemu_dump_ext.architectures import all_architectures, architecture_for_cpu_types
from qemu_dump_ext.architectures._declaration import TargetClues, VcpuReadings
from qemu_dump_ext.errors import UnsupportedTargetError
from qemu_dump_ext.guest.model import Vcpu
from qemu_dump_ext.registers.merge import merge_readings
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.structures.dialect import MENDED

_SH4_TEXT = "pc=0xa0000000 sr=0x700000f0 pr=0x00000000 fpscr=0x00040001\n"
_PC_OFFSET = 16 * 4


def _clues(text: str, target: str | None = None, packet: bytes = b"") -> TargetClues:
    return TargetClues(text, lambda _: None, lambda: target, g_packet=lambda: packet)


@pytest.mark.parametrize(
    ("kind", "config0", "expected"),
    [
        ("24Kc-mips-cpu", 0x80008482, "mips"),
        ("24Kc-mips-cpu", 0x80000482, "mipsel"),
        ("5KEc-mips64-cpu", 0x8000C482, "mips64"),
        ("5KEc-mips64-cpu", 0x80004482, "mips64el"),
    ],
)
def test_config0_tells_the_byte_order_of_mips(kind: str, config0: int, expected: str):
    text = f"    Config0 {config0:#010x} Config1 0xbe61309a LLAddr 0x0000000000000000\n"
    assert architecture_for_cpu_types({kind}, _clues(text)).name == expected


@pytest.mark.parametrize(("config0", "word_size"), [(0x80000482, 4), (0x80004482, 8)])
def test_a_processor_of_32_bits_has_a_core_of_32_bits(config0: int, word_size: int):
    architecture = all_architectures()["mips64el"]
    vcpus = [Vcpu(0, {"config0": config0})]
    assert architecture.select_core(vcpus, [], MENDED, "").word_size == word_size


@pytest.mark.parametrize("name", ["sh4", "sh4eb"])
def test_qemus_name_of_the_target_decides(name: str):
    clues = _clues(_SH4_TEXT, target=name)
    assert architecture_for_cpu_types({"sh7751r-superh-cpu"}, clues).name == name


@pytest.mark.parametrize(("pc", "expected"), [("000000a0", "sh4"), ("a0000000", "sh4eb")])
def test_a_number_in_two_sources_tells_the_byte_order(pc: str, expected: str):
    packet = bytes(_PC_OFFSET) + bytes.fromhex(pc) + bytes(168)
    clues = _clues(_SH4_TEXT, packet=packet)
    assert architecture_for_cpu_types({"sh7751r-superh-cpu"}, clues).name == expected


@pytest.mark.parametrize(("order", "expected"), [("little", "sh4"), ("big", "sh4eb")])
def test_memory_tells_where_qemu_has_one_name_for_both(order: ByteOrder, expected: str):
    clues = replace(_clues(_SH4_TEXT), memory_byte_order=lambda: order)
    assert architecture_for_cpu_types({"sh7751r-superh-cpu"}, clues).name == expected


@pytest.mark.parametrize("text", [_SH4_TEXT, "pc=0x00000000\n"])
def test_what_tells_nothing_is_refused(text: str):
    with pytest.raises(UnsupportedTargetError, match="sh4 or sh4eb") as caught:
        architecture_for_cpu_types({"sh7751r-superh-cpu"}, _clues(text, packet=bytes(236)))
    assert caught.value.hint is not None
    assert "--qmp" in caught.value.hint


@pytest.mark.parametrize(("shown", "stored"), [("80", 0xFFFFFFFF_80000000), ("00", 0)])
def test_mips_of_64_bits_has_sign_extended_status(shown: str, stored: int):
    text = f"CP0 Status  0x{shown}000000 Cause   0x{shown}000000 EPC    0x0000000000000000\n"
    architecture = all_architectures()["mips64el"]
    assert architecture.parse_monitor is not None
    readings = VcpuReadings({}, architecture.parse_monitor(text), {}, hardware_segments=False)
    values = merge_readings(architecture, readings)
    assert (values["status"], values["cause"]) == (stored, stored)
