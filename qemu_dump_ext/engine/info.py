"""What would be dumped: for people, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from qemu_dump_ext.engine.guest_view import Vmcoreinfo
from qemu_dump_ext.engine.stopped_guest import StoppedGuest, stopped_guest
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest.memory import is_sparse
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.memory_sources import AUTO
from qemu_dump_ext.plan.plan import GuestSnapshot, make_plan
from qemu_dump_ext.qemu.saved_guest import SavedGuest, saved_now
from qemu_dump_ext.structures.dialect import MENDED
from qemu_dump_ext.structures.utsname import UtsName
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_value
from qemu_dump_ext.value import Value

_MIB = 1 << 20


class VcpuLine(Value):
    """One vCPU: where it is, and what no source tells about it."""

    index: int
    pc: int | None
    missing: Sequence[str]


class GuestDescription(Value):
    """What `qemu-info-guest` shows.

    Attributes:
        qemu_version: As a string.
        architecture: Name of the architecture file.
        osrelease: Kernel release as VMCOREINFO has it, or None.
        ram_blocks: What would be dumped.
        vcpus: By ascending cpu_index.
        memory_sources: Name, and why it cannot be used or None; the fastest first.
        vmcoreinfo: Where the kernel's VMCOREINFO is, or why there is none.
        left_out: What of its memory does not go into a dump.
        doubts: What could not be found out.
        remarks: What is to be said of the way to it.
    """

    qemu_version: str
    architecture: str
    osrelease: str | None
    ram_blocks: Sequence[RamBlock]
    vcpus: Sequence[VcpuLine]
    memory_sources: Sequence[tuple[str, str | None]]
    vmcoreinfo: Sequence[str]
    left_out: Sequence[str] = ()
    doubts: Sequence[str] = ()
    remarks: Sequence[str] = ()

    def lines(self) -> list[str]:
        """Say it in words."""
        total = sum(block.size for block in self.ram_blocks)
        lines = [
            f"QEMU {self.qemu_version}, {self.architecture}, kernel {self.osrelease or 'unknown'}",
            f"{len(self.ram_blocks)} RAM blocks, {total / _MIB:.1f} MiB:",
        ]
        lines += [
            f"  {block.gpa:#018x}-{block.end - 1:#018x} {block.size / _MIB:10.2f} MiB  {block.name}"
            for block in self.ram_blocks
        ]
        lines += self.left_out
        lines += [f"uncertain: {doubt}" for doubt in self.doubts]
        lines.append(f"{len(self.vcpus)} vCPUs:")
        for vcpu in self.vcpus:
            where = "unknown" if vcpu.pc is None else f"{vcpu.pc:#x}"
            missing = f"  missing: {', '.join(vcpu.missing)}" if vcpu.missing else ""
            lines.append(f"  {vcpu.index}: pc {where}{missing}")
        lines += self.vmcoreinfo
        lines.append("memory sources, the fastest first:")
        lines += [f"  {name}: {reason or 'usable'}" for name, reason in self.memory_sources]
        lines += self.remarks
        return lines

    def to_json(self) -> str:
        """Say it to a machine: one line; keys are the attributes."""
        return json.dumps(asdict(self))


def saved_guest(guest: StoppedGuest) -> SavedGuest:
    """Return what a dump of a guest needs when its monitor does not answer any more.

    Raises:
        SourceError: QEMU's process is not found on this host, or the monitor does not tell.
    """
    return saved_now(guest.find_process(), guest.located())


def describe_guest(
    access: GuestAccess, save: Callable[[bytes], object] | None = None
) -> GuestDescription:
    """Ask a guest what would be dumped of it; it is stopped meanwhile.

    Args:
        access: The ways to it.
        save: Gets what a dump needs when the monitor does not answer any more.

    Raises:
        SourceError: It cannot be reached; or is to be saved, and its QEMU's process is not found.
    """
    with stopped_guest(access, AUTO) as guest:
        if save is not None:
            save(saved_guest(guest).to_json().encode())
        return describe(guest)


def describe(guest: StoppedGuest) -> GuestDescription:
    """Say what would be dumped of a guest that stands still.

    Raises:
        SourceError: It cannot be reached.
    """
    vmcoreinfo, where = _find_vmcoreinfo(guest)
    plan = make_plan(
        GuestSnapshot(
            guest.architecture,
            guest.ram_blocks,
            guest.vcpus,
            vmcoreinfo.note,
            UtsName(),
            guest.probed.machine,
        ),
        MENDED,
    )
    missing: dict[int, set[str]] = {}
    for (_, index), names in plan.missing.items():
        missing.setdefault(index, set()).update(names)
    program_counter = guest.architecture.program_counter
    return GuestDescription(
        qemu_version="{}.{}.{}".format(*guest.probed.version),
        architecture=guest.architecture.name,
        osrelease=vmcoreinfo_value(vmcoreinfo.text, "OSRELEASE"),
        ram_blocks=tuple(guest.ram_blocks),
        vcpus=tuple(
            VcpuLine(
                vcpu.index, vcpu.registers.get(program_counter), sorted(missing.get(vcpu.index, ()))
            )
            for vcpu in sorted(guest.vcpus, key=lambda vcpu: vcpu.index)
        ),
        memory_sources=guest.memory_source_states(),
        vmcoreinfo=where,
        left_out=guest.probed.left_out,
        doubts=guest.probed.doubts,
        remarks=guest.remarks,
    )


def _find_vmcoreinfo(guest: StoppedGuest) -> tuple[Vmcoreinfo, Sequence[str]]:
    """Return the note as a dump would have it, and where it is."""
    try:
        # Where it is not known what is populated, reading makes QEMU's memory grow.
        found = guest.find_vmcoreinfo(everywhere=is_sparse(guest.memory))
    except SourceError as error:
        return Vmcoreinfo(), (f"VMCOREINFO was not looked for: {error}",)
    return found, found.remarks or ("VMCOREINFO is known to QEMU, by its vmcoreinfo device",)
