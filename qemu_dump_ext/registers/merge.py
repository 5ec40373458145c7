"""Registers of vCPUs from all their sources, made one."""

from __future__ import annotations

from collections.abc import Mapping

from qemu_dump_ext.architectures import Architecture, Register, VcpuReadings, parse_named_values
from qemu_dump_ext.guest.access import Stub
from qemu_dump_ext.registers.from_stub import read_stub_registers


def merge_readings(architecture: Architecture, readings: VcpuReadings) -> Mapping[str, int]:
    """Merge what the sources say: the stub before the monitor before QEMU's own notes."""
    if architecture.reconcile is not None:
        return architecture.reconcile(readings)
    return {**readings.native, **readings.monitor, **readings.gdb}


def read_stub(architecture: Architecture, stub: Stub) -> dict[int, dict[str, int]]:
    """Return the stub's registers by cpu_index and our names."""
    names = {register.gdb for register in architecture.registers if register.gdb}
    vcpus: dict[int, dict[str, int]] = {}
    for vcpu in read_stub_registers(stub, names, architecture.g_packet):
        sent = vcpu.registers
        if architecture.correct_stub is not None:
            sent = architecture.correct_stub(sent)
        order = architecture.cores[0].byte_order
        if architecture.stub_byte_order is not None:
            order = architecture.stub_byte_order(sent)
        vcpus[vcpu.index] = {
            register.name: int.from_bytes(sent[register.gdb], order)
            for register in architecture.registers
            if register.gdb is not None and register.gdb in sent
        }
    return vcpus


def parse_monitor_registers(
    architecture: Architecture, texts: Mapping[int, str]
) -> dict[int, dict[str, int]]:
    """Return the registers that the monitor shows, by cpu_index and our names."""
    return {index: _parse_registers(architecture, text) for index, text in texts.items()}


def _parse_registers(architecture: Architecture, text: str) -> dict[str, int]:
    named = parse_named_values(text)
    values = {
        register.name: named[name]
        for register in architecture.registers
        if (name := _first_known(register, named)) is not None
    }
    if architecture.parse_monitor is not None:
        values |= architecture.parse_monitor(text)
    return values


def _first_known(register: Register, named: Mapping[str, int]) -> str | None:
    return next((name for name in register.monitor if name in named), None)
