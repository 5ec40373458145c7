"""Where a guest has its RAM, by QEMU's command line and address space, where nobody can be asked.

The command line says which machine it is and how much RAM that has; QEMU's process has mapped as
much in one piece, between pages that nobody may touch. What is no main memory (firmware, cards,
plugged memory) is not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from qemu_dump_ext.architectures import Architecture, MachineRam, all_architectures
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.guest.silent import LocatedGuest
from qemu_dump_ext.qemu.process import MemoryMapping, read_mappings
from qemu_dump_ext.qemu.qemu_processes import QemuProcess

HINT = "'qemu-dump info --save FILE', while the guest answers, writes down where its RAM is"
PLUGGED = re.compile(r"(?:pc-dimm|nvdimm|virtio-mem|virtio-pmem|cxl-type3)\b")
"""Devices on a command line that are memory."""

_MIB = 1 << 20
_BIOS_END = 1 << 20
"""Of a PC's, the first gpa behind it."""
_DEFAULT_SIZE = 128 << 20
"""QEMU's own, of every machine that is known here: hw/core/machine.c, default_ram_size."""
_SIZE_MAX = 1 << 39
"""Of more, machines move a part out of the way of what a processor keeps for itself, in bytes."""
_ELSEWHERE = re.compile(r"max-ram-below-4g|\bmemdev=|sgx-epc")
"""Words on a command line with which the RAM lies in another way."""
_DEFAULT_MACHINES = {"x86_64": "pc", "i386": "pc", "s390x": "s390-ccw-virtio", "ppc64": "pseries"}
_ALIASES = {"pc": "pc-i440fx", "s390-ccw": "s390-ccw-virtio"}


def ram_by_evidence(process: QemuProcess) -> LocatedGuest:
    """Return what a guest seems to be.

    Args:
        process: Its QEMU, of which nothing is asked.

    Raises:
        SourceError: Too little is known, or it does not fit together; or the process must not be
            looked at.
    """
    line = process.command_line
    architecture = all_architectures().get(process.target)
    size = line.memory or _DEFAULT_SIZE
    if line.configurations or any(map(_ELSEWHERE.search, process.words)) or size > _SIZE_MAX:
        raise SourceError("QEMU's command line does not tell where its RAM is", hint=HINT)
    if architecture is None:
        raise SourceError(f"{process.target} guests are not known", hint=HINT)
    machine = _machine(architecture, line.machine, size)
    hva = _address_of(read_mappings(process.pid), size)
    blocks = {
        block: hva + block.region_offset
        for gpa, offset, part in machine.windows_of(size)
        for block in _seen_by_guest(RamBlock(gpa, part, "RAM", offset), machine)
    }
    return LocatedGuest(architecture.name, 0, machine.machine, (0, 0, 0), line.vcpus or 1, blocks)


def _seen_by_guest(block: RamBlock, machine: MachineRam) -> Iterator[RamBlock]:
    """Yield what of main memory a guest sees whatever else is there: a screen, a BIOS behind it."""
    first = machine.screen[0]
    hidden = (first, _BIOS_END) if first else (0, 0)
    for low, high in (
        (block.gpa, min(block.end, hidden[0])),
        (max(block.gpa, hidden[1]), block.end),
    ):
        if low < high:
            yield block.part(low, high)


def _machine(architecture: Architecture, told: str, size: int) -> MachineRam:
    name = told or _DEFAULT_MACHINES.get(architecture.name, "")
    name = _ALIASES.get(name, name)
    fitting = [one for one in architecture.machines if name in one.names or _is_version(name, one)]
    if not fitting:
        raise SourceError(
            f"where {name or 'no machine'} of {architecture.name} has its RAM is not known",
            hint=HINT,
        )
    return next((one for one in fitting if size >= one.size_min), fitting[-1])


def _is_version(name: str, machine: MachineRam) -> bool:
    """Tell whether a name is of a machine as some version of QEMU had it, as `pc-q35-7.2`."""
    beginning = machine.machine.rstrip("-")
    return re.fullmatch(rf"{re.escape(beginning)}-(?:rhel)?\d[\w.]*", name) is not None


def _address_of(mappings: Sequence[MemoryMapping], size: int) -> int:
    # QEMU has a page behind each piece that nobody may touch; what is before it may touch it.
    found = [
        mapping.start
        for run in _runs(mappings)
        for mapping in run
        if run[-1].end - mapping.start == size
    ]
    if len(found) == 1:
        return found[0]
    how_many = f"{len(found)} pieces" if found else "no piece"
    raise SourceError(
        f"QEMU has {how_many} of memory of {size // _MIB} MiB, which its command line tells",
        hint=HINT,
    )


def _runs(mappings: Sequence[MemoryMapping]) -> Iterator[Sequence[MemoryMapping]]:
    """Yield mappings that can be written to and go on with each other."""
    run: list[MemoryMapping] = []
    for mapping in mappings:
        if run and not (mapping.writable and _goes_on(run[-1], mapping)):
            yield run
            run = []
        if mapping.writable:
            run.append(mapping)
    if run:
        yield run


def _goes_on(last: MemoryMapping, mapping: MemoryMapping) -> bool:
    same = (last.shared, last.inode, last.path) == (mapping.shared, mapping.inode, mapping.path)
    is_next = not last.inode or mapping.offset - last.offset == last.end - last.start
    return last.end == mapping.start and same and is_next
