"""Where the vCPUs of a Linux guest are in the kernel, by nothing but the guest itself.

Names are those that the kernel keeps; callers are found by its ORC tables, or by the chain of frame
records that its compiler makes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from qemu_dump_ext.architectures import Architecture, FrameRecord
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest.model import Vcpu
from qemu_dump_ext.linux.kallsyms import Kallsyms
from qemu_dump_ext.linux.kernel_memory import KernelMemory
from qemu_dump_ext.linux.modules import Modules, OrcTables
from qemu_dump_ext.linux.orc import Frame, OrcUnwinder
from qemu_dump_ext.structures.c_struct import U64_MAX, ByteOrder
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_number
from qemu_dump_ext.value import Value

_FRAMES_MAX = 64
_VCPUS_MAX = 64
_VA_BITS = 48
_KERNEL_HALF = 1 << 63
# Where a CPU is that has nothing to do.
_IDLE = re.compile(
    r"do_idle|cpu_startup_entry|(?:default|poll|mwait)_idle\w*|\w*safe_halt|arch_cpu_idle|cpu_do_idle"
)


class _Code:
    """The functions of a kernel and of its modules, which are looked for when they are needed."""

    def __init__(self, kernel: KernelMemory, symbols: Kallsyms, byte_order: ByteOrder) -> None:
        self.kernel = kernel
        self.symbols = symbols
        self.byte_order = byte_order

    @cached_property
    def _modules(self) -> Modules | None:
        try:
            return Modules(self.kernel, self.symbols, self.byte_order)
        except SourceError:
            return None

    def function_at(self, address: int) -> str | None:
        """Return the function that has an address; None: none has, as in a program."""
        name = self.symbols.function_at(address)
        if name is not None or not address & _KERNEL_HALF or self._modules is None:
            return name
        return self._modules.function_at(address)

    def orc_of_module(self, address: int) -> OrcTables | None:
        return None if self._modules is None else self._modules.orc_at(address)


class _Chain(Value):
    # Each frame record has the address of the caller's, and where that goes on.
    kernel: KernelMemory
    record: FrameRecord
    byte_order: ByteOrder
    address_bits: int

    def caller(self, frame: Frame) -> Frame | None:
        pointer = frame.registers[self.record.pointer]
        if not pointer:
            return None
        known = {self.record.pointer: self._word(pointer + self.record.caller)}
        address = self._word(pointer + self.record.returns_to)
        if not address:
            return None
        # Pointers may be signed, in the bits above the address.
        address |= U64_MAX << self.address_bits & U64_MAX
        return Frame(address, known, was_interrupted=False)

    def _word(self, gva: int) -> int:
        return int.from_bytes(self.kernel.read(gva & U64_MAX, 8), self.byte_order)


def functions_of_vcpus(
    architecture: Architecture,
    vcpus: Sequence[Vcpu],
    kernel: KernelMemory,
    vmcoreinfo: bytes,
    byte_order: ByteOrder,
) -> Sequence[str]:
    """Return the functions in which the vCPUs are, innermost first, one vCPU behind the other.

    A vCPU that has nothing to do, or is in a program, has none.

    Args:
        architecture: Of the guest.
        vcpus: Their registers.
        kernel: Memory at the kernel's addresses.
        vmcoreinfo: Text of the kernel's; untrusted.
        byte_order: Of the guest.

    Raises:
        SourceError: The kernel does not say where it keeps the names of its functions.
    """
    code = _Code(kernel, Kallsyms(kernel, vmcoreinfo, byte_order), byte_order)
    unwinder = _unwinder(architecture, code, vmcoreinfo)
    found: list[str] = []
    for vcpu in vcpus[:_VCPUS_MAX]:
        start = vcpu.registers.get(architecture.program_counter)
        if start is not None:
            names = _functions(code, unwinder, Frame(start, vcpu.registers), architecture)
            if not any(_IDLE.fullmatch(name) for name in names):
                found += names
    return found


def _unwinder(
    architecture: Architecture, code: _Code, vmcoreinfo: bytes
) -> OrcUnwinder | _Chain | None:
    if architecture.has_orc:
        try:
            return OrcUnwinder(code.kernel, code.symbols, vmcoreinfo, code.orc_of_module)
        except SourceError:
            return None
    if architecture.frame_record is None:
        return None
    bits = vmcoreinfo_number(vmcoreinfo, "NUMBER(VA_BITS)") or _VA_BITS
    bits = min(max(bits, 32), 63)
    return _Chain(code.kernel, architecture.frame_record, code.byte_order, bits)


def _functions(
    code: _Code,
    unwinder: OrcUnwinder | _Chain | None,
    frame: Frame,
    architecture: Architecture,
) -> Sequence[str]:
    entries = architecture.frame_record.entries if architecture.frame_record else None
    found: list[str] = []
    try:
        for depth in range(_FRAMES_MAX):
            name = code.function_at(frame.address - (not frame.was_interrupted))
            if name is None:
                break
            if depth and frame.was_interrupted:
                found.clear()  # what interrupted it is not where it was
            found.append(name)
            if entries and re.fullmatch(entries, name):
                found.clear()
            following = unwinder.caller(frame) if unwinder else None
            if following is None:
                break
            frame = following
    except (SourceError, KeyError):  # what was found is right all the same
        pass
    return found
