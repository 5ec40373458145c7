"""What 32-bit and 64-bit Arm have in common."""

from __future__ import annotations

from collections.abc import Mapping

from qemu_dump_ext.architectures._declaration import Register, VcpuReadings

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
