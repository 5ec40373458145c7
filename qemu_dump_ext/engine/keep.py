"""Write down what a guest is while it answers, for a dump of it when it does not any more."""

from __future__ import annotations

from qemu_dump_ext.architectures import VcpuReadings
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest.model import Vcpu
from qemu_dump_ext.guest.silent import LocatedGuest
from qemu_dump_ext.host_limits import refused_as
from qemu_dump_ext.memory_sources.process import host_addresses
from qemu_dump_ext.qemu.monitor_queries import read_register_texts
from qemu_dump_ext.qemu.probe import probe_running_guest
from qemu_dump_ext.qemu.qemu_processes import QemuProcess
from qemu_dump_ext.qemu.saved_guest import keep, saved_now
from qemu_dump_ext.registers.merge import merge_readings, parse_monitor_registers
from qemu_dump_ext.structures.dialect import MENDED


def keep_guest(access: GuestAccess, process: QemuProcess) -> None:
    """Write a guest down where every dump of this host looks; it need not be stopped.

    Args:
        access: The ways to it.
        process: Its QEMU.

    Raises:
        SourceError: QEMU does not tell, or nothing can be written.
        UnsupportedTargetError: No architecture file describes the guest.
    """
    probed = probe_running_guest(access)
    architecture = probed.architecture
    # In which mode it is now says in which byte order it will be.
    shown = parse_monitor_registers(architecture, read_register_texts(access.monitor))
    vcpus = [
        Vcpu(index, merge_readings(architecture, VcpuReadings({}, values, {}, False)))
        for index, values in shown.items()
    ]
    core = architecture.select_core(vcpus, probed.ram_blocks, MENDED, probed.machine)
    located = LocatedGuest(
        architecture.name,
        architecture.cores.index(core),
        probed.machine,
        probed.version,
        len(vcpus),
        host_addresses(access.source_context(probed.ram_blocks, None)),
    )
    with refused_as(SourceError, "write down where the guest has its RAM"):
        keep(saved_now(process, located))
