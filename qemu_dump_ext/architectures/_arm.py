"""What 32-bit and 64-bit Arm have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qemu_dump_ext.architectures._declaration import Register, VcpuReadings

if TYPE_CHECKING:
    from qemu_dump_ext.structures.migration import DeviceFields

BIG_ENDIAN = "big_endian"
"""No register: 1 where exceptions are taken in big-endian order, so that the kernel is such."""
_SCTLR_EE = 1 << 25

BYTE_ORDER_REGISTERS = (
    Register("sctlr", gdb="SCTLR"),
    Register("sctlr_el1", gdb="SCTLR_EL1"),  # its name since QEMU 8
)


def byte_order(readings: VcpuReadings) -> Mapping[str, int]:
    """Return BIG_ENDIAN where a source tells it."""
    for name in ("sctlr_el1", "sctlr"):
        if name in readings.gdb:
            return {BIG_ENDIAN: int(readings.gdb[name] & _SCTLR_EE != 0)}
    if readings.native_byte_order is not None:
        return {BIG_ENDIAN: int(readings.native_byte_order == "big")}
    return {}


_AARCH64_REGISTER = 0x6030000000130000
_NON_SECURE = 1 << 29
_PSTATE_NRW = 1 << 4


def runs_aarch64(section: DeviceFields) -> bool | None:
    """Tell of a vCPU's section whether it runs 64-bit code; None where it is none of Arm."""
    state = section.integer("cpsr")
    if state is None or "env.xregs[0]" not in section:
        return None
    return not state & _PSTATE_NRW


def system_register(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """Return the number of a system register of 64-bit code in a migration stream."""
    return _AARCH64_REGISTER | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2


def coprocessor_register(crn: int, crm: int, opc1: int = 0, opc2: int = 0, *, wide: bool) -> int:
    """Return the number of a register of coprocessor 15 in a migration stream."""
    size = 0x4030000000000000 if wide else 0x4020000000000000
    return size | 15 << 16 | crn << 11 | crm << 7 | opc1 << 3 | opc2


def numbered_registers(section: DeviceFields, wanted: Mapping[str, int]) -> dict[str, int]:
    """Return the system registers in a vCPU's section of a migration stream by our names.

    Args:
        section: Of a vCPU.
        wanted: Their numbers; those of the non-secure world come first.
    """
    numbers = section.integers("cpreg_vmstate_indexes")
    values = dict(zip(numbers, section.integers("cpreg_vmstate_values"), strict=False))
    found = {}
    for name, number in wanted.items():
        for candidate in (number | _NON_SECURE, number):
            if candidate in values:
                found[name] = values[candidate]
                break
    return found
