"""What readers of a dump cannot do without, whatever a guest's struct pages say of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

from qemu_dump_ext.architectures import Architecture
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest.model import Vcpu
from qemu_dump_ext.linux.kernel_log import log_places
from qemu_dump_ext.linux.kernel_memory import KernelMemory
from qemu_dump_ext.structures.c_struct import U64_MAX, ByteOrder
from qemu_dump_ext.structures.vmcoreinfo import VmcoreinfoNumbers

_STACK_SIZE = 1 << 14
"""Of a kernel's stack, which is aligned to it; most kernels have just this."""
_PER_CPU_SIZE = 1 << 19
_IMAGE_SIZE_MAX = 1 << 28
_VALUES_OF_POINTERS = frozenset(("mem_section", "vmemmap"))
"""Symbols of VMCOREINFO that are not where a variable is, but what it says."""

AddressRange = tuple[int, int]
"""A kernel address and a size in bytes."""


def needed_addresses(
    architecture: Architecture,
    vcpus: Sequence[Vcpu],
    vmcoreinfo: bytes,
    kernel: KernelMemory,
    byte_order: ByteOrder,
) -> list[AddressRange]:
    """Return the kernel addresses of what must be in a dump, beside what is mapped specially.

    That is the kernel's image as far as VMCOREINFO tells of it, its log, and what the registers of
    vCPUs point to: stacks, per-CPU areas, tables of interrupts.

    Args:
        architecture: Of the guest.
        vcpus: Of the guest, as far as they are known.
        vmcoreinfo: What the kernel says of itself; untrusted.
        kernel: Memory at the kernel's addresses.
        byte_order: Of the guest.
    """
    found = [*_image(vmcoreinfo), *_at_registers(architecture, vcpus)]
    with suppress(SourceError):  # such a log is read by nobody
        found += log_places(vmcoreinfo, kernel.read, byte_order, kernel.word_size)
    return found


def _image(vmcoreinfo: bytes) -> Iterator[AddressRange]:
    info = VmcoreinfoNumbers(vmcoreinfo)
    names = re.findall(rb"^SYMBOL\((\w{1,64})\)=", vmcoreinfo, re.MULTILINE)
    known = {name: info.get(f"SYMBOL({name})") for name in map(bytes.decode, names)}
    begin = known.get("_stext")
    if begin is None:
        return
    near = [
        address
        for name, address in known.items()
        if address is not None
        and name not in _VALUES_OF_POINTERS
        and begin <= address < begin + _IMAGE_SIZE_MAX
    ]
    yield begin, max(near) + 1 - begin


def _at_registers(architecture: Architecture, vcpus: Sequence[Vcpu]) -> Iterator[AddressRange]:
    stacks = {value & -_STACK_SIZE & U64_MAX for vcpu in vcpus for value in vcpu.registers.values()}
    for address in stacks:
        yield address, _STACK_SIZE
    if architecture.per_cpu_base is not None:
        for vcpu in vcpus:
            base = architecture.per_cpu_base(vcpu.registers)
            if base is not None:
                yield base, _PER_CPU_SIZE
