"""Registers from the sections of vCPUs in QEMU's migration stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from qemu_dump_ext.architectures import Architecture, VcpuReadings, all_architectures
from qemu_dump_ext.errors import CorruptDumpError, UnsupportedTargetError
from qemu_dump_ext.guest.model import Vcpu
from qemu_dump_ext.registers.merge import merge_readings
from qemu_dump_ext.structures.migration import MigrationStream

_SECTION = "cpu"


def architecture_of_stream(stream: MigrationStream) -> Architecture:
    """Return the architecture of the guest in a stream.

    Raises:
        UnsupportedTargetError: None knows its vCPUs.
        CorruptDumpError: The description of a vCPU does not fit, or the stream is damaged or cut
            before its vCPUs.
    """
    for device in stream.find(_SECTION)[:1]:
        for architecture in all_architectures().values():
            if architecture.migrated and architecture.migrated.recognize(device.fields):
                return architecture
    machine = f"machine {stream.machine or 'of no name'}"
    if stream.problem is not None:
        raise CorruptDumpError(
            f"{machine}: {stream.problem}; what is before it does not tell of what target it is"
        )
    known = ", ".join(one.name for one in all_architectures().values() if one.migrated)
    raise UnsupportedTargetError(
        f"{machine}: {stream.undescribed or 'unknown vCPUs'}",
        hint=f"known in a migration stream: {known}",
    )


def vcpus_of_stream(
    stream: MigrationStream,
    architecture: Architecture,
    properties: Mapping[str, int] = MappingProxyType({}),
) -> Sequence[Vcpu]:
    """Return the vCPUs in a stream, in its order, which is that of their making.

    Args:
        stream: Of the guest.
        architecture: Of the guest.
        properties: Of the CPU object, by our names of registers: a stream has none.

    Raises:
        CorruptDumpError: The description of a vCPU does not fit.
    """
    if architecture.migrated is None:
        return ()
    vcpus = []
    for device in stream.find(_SECTION):
        # One source, which is as good as all of the others together.
        values = architecture.migrated.registers(device.fields)
        readings = VcpuReadings(
            gdb=values, monitor={}, native=values, hardware_segments=True, qom=properties
        )
        vcpus.append(Vcpu(device.instance, merge_readings(architecture, readings)))
    return vcpus


def registers_without_note(
    stream: MigrationStream, architecture: Architecture, vcpus: Sequence[Vcpu]
) -> Mapping[str, Sequence[str]]:
    """Return what keeps parts of vCPUs' sections out of the notes, by the number of the vCPU."""
    if architecture.migrated is None:
        return {}
    return {
        f"vCPU {vcpu.index}": absent
        for device, vcpu in zip(stream.find(_SECTION), vcpus, strict=True)
        if (
            absent := [
                register
                for part, register in architecture.migrated.needed_for.items()
                if register not in vcpu.registers and device.fields.has_part(part)
            ]
        )
    }
