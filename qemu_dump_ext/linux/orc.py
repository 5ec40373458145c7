"""Unwind the stack of an x86_64 kernel by its ORC tables, which lie in its own memory.

Source: Linux arch/x86/kernel/unwind_orc.c, arch/x86/include/asm/orc_types.h, ptrace.h.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.linux.kallsyms import Kallsyms
from qemu_dump_ext.linux.kernel_memory import KernelMemory
from qemu_dump_ext.linux.modules import OrcTables
from qemu_dump_ext.structures.c_struct import U64_MAX
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_value
from qemu_dump_ext.value import Value

_TABLES = ("__start_orc_unwind_ip", "__stop_orc_unwind_ip", "__start_orc_unwind")
_ENTRIES_MAX = 1 << 24
_ENTRY_SIZE = 6
_USER_MODE = 3
_TYPES_UNTIL_6_3 = {0: "call", 1: "regs", 2: "iret"}
_TYPES = {2: "call", 3: "regs", 4: "iret"}
_TYPES_CHANGED = (6, 4)
# Numbers of registers in an entry.
_PREVIOUS_SP, _DX, _DI, _BP, _SP, _R10, _R13, _BP_INDIRECT, _SP_INDIRECT = range(1, 10)
_REGISTER_OF = {_DX: "rdx", _DI: "rdi", _BP: "rbp", _SP: "rsp", _R10: "r10", _R13: "r13"}
_INDIRECT_OF = {_BP_INDIRECT: "rbp", _SP_INDIRECT: "rsp"}
# Where a register is in struct pt_regs, in bytes.
_PT_REGS = {"r13": 16, "rbp": 32, "r10": 56, "rdx": 96, "rdi": 112}
_PT_REGS_IP = 128


class Frame(Value):
    """Where a function was called or interrupted.

    Attributes:
        address: Of the instruction, or behind the call.
        registers: Those that are known there, by name.
        was_interrupted: Something came between, and is no part of where it was.
    """

    address: int
    registers: Mapping[str, int]
    was_interrupted: bool = True


class OrcUnwinder:
    """Finds callers by the tables of one kernel and of its modules."""

    def __init__(
        self,
        kernel: KernelMemory,
        symbols: Kallsyms,
        vmcoreinfo: bytes,
        tables_of_modules: Callable[[int], OrcTables | None] = lambda _address: None,
    ) -> None:
        """Find the tables.

        Args:
            kernel: Memory at the kernel's addresses.
            symbols: Those of the kernel.
            vmcoreinfo: Text of the kernel's; untrusted.
            tables_of_modules: Returns those of the module that has an address, or None.

        Raises:
            SourceError: It has none, or does not say where.
        """
        found = symbols.addresses_of(_TABLES)
        if len(found) != len(_TABLES):
            raise SourceError("the kernel has no ORC tables, or its symbols do not name them")
        self._kernel = kernel
        self._symbols = symbols
        self._tables_of_modules = tables_of_modules
        addresses, end, entries = (found[name] for name in _TABLES)
        self._own = OrcTables(addresses, entries, (end - addresses) // 4)
        if not 0 < self._own.count <= _ENTRIES_MAX:
            raise SourceError(f"the kernel's ORC tables have {self._own.count} entries")
        release = vmcoreinfo_value(vmcoreinfo, "OSRELEASE") or ""
        version = tuple(map(int, re.findall(r"\d{1,4}", release)[:2]))
        self._types = _TYPES_UNTIL_6_3 if version < _TYPES_CHANGED else _TYPES

    def caller(self, frame: Frame) -> Frame | None:
        """Return who called, or was interrupted; None at the end of the kernel's stack.

        Raises:
            SourceError: The stack cannot be followed.
        """
        # A call may be the last instruction of its function.
        address = frame.address if frame.was_interrupted else frame.address - 1
        own = self._symbols.is_code(address)
        tables = self._own if own else self._tables_of_modules(address)
        if tables is None:
            return None
        sp_offset, bp_offset, registers, kind = self._entry(tables, address)
        sp = self._stack_pointer(frame, registers & 0xF, sp_offset)
        kind_name = self._types.get(kind)
        if sp is None or kind_name is None:
            return None
        if kind_name != "call":
            return self._interrupted(frame, sp, whole=kind_name == "regs")
        known = dict(frame.registers)
        bp_register = registers >> 4
        if bp_register == _PREVIOUS_SP:
            known["rbp"] = self._word(sp + bp_offset)
        elif bp_register == _BP:
            known["rbp"] = self._word(frame.registers["rbp"] + bp_offset)
        known["rsp"] = sp
        return Frame(self._word(sp - 8), known, was_interrupted=False)

    def _stack_pointer(self, frame: Frame, register: int, offset: int) -> int | None:
        if register in _INDIRECT_OF:
            base = frame.registers[_INDIRECT_OF[register]]
            if register == _BP_INDIRECT:
                return self._word(base + offset)
            return (self._word(base) + offset) & U64_MAX
        name = _REGISTER_OF.get(register)
        if name is None or name not in frame.registers:
            return None
        return (frame.registers[name] + offset) & U64_MAX

    def _interrupted(self, frame: Frame, sp: int, *, whole: bool) -> Frame | None:
        at = sp + _PT_REGS_IP if whole else sp
        address, selector, _, stack = struct.unpack("<4Q", self._kernel.read(at, 32))
        if selector & _USER_MODE:
            return None
        known = dict(frame.registers) | {"rsp": stack}
        if whole:
            known |= {name: self._word(sp + offset) for name, offset in _PT_REGS.items()}
        return replace(frame, address=address, registers=known, was_interrupted=True)

    def _entry(self, tables: OrcTables, address: int) -> tuple[int, int, int, int]:
        """Return the last entry that begins at or before an address."""
        low, high = 0, tables.count
        while high - low > 1:
            middle = (low + high) // 2
            at = tables.addresses + 4 * middle
            (distance,) = struct.unpack("<i", self._kernel.read(at & U64_MAX, 4))
            if at + distance <= address:
                low = middle
            else:
                high = middle
        at = tables.entries + _ENTRY_SIZE * low
        data = self._kernel.read(at & U64_MAX, _ENTRY_SIZE)
        sp_offset, bp_offset, registers, flags = struct.unpack("<hhBB", data)
        return sp_offset, bp_offset, registers, flags & (7 if self._types is _TYPES else 3)

    def _word(self, gva: int) -> int:
        return int.from_bytes(self._kernel.read(gva & U64_MAX, 8), "little")
