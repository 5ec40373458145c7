"""i386: the same facts as x86-64, in a QEMU that knows no long mode.

Sources:
    As of x86_64.py; QEMU target/i386/arch_dump.c leaves the registers that only x86-64 has in
    the note `QEMU` zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qemu_dump_ext.architectures import x86_64
from qemu_dump_ext.architectures._declaration import VcpuReadings
from qemu_dump_ext.architectures._page_tables import PageTableRoot
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_number, vmcoreinfo_value

_PAGE_OFFSET = 0xC0000000
"""Where kernels map the start of memory, whether KASLR moved them or not."""
_LONG_MODE_ONLY = ("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "kernel_gs_base")
_GDB_NAMES = {
    name: f"e{name[1:]}" for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "rip")
}


def _reconcile(readings: VcpuReadings) -> Mapping[str, int]:
    # What the processor does not have is zero, and not missing.
    return {**x86_64.reconcile(readings), **dict.fromkeys(_LONG_MODE_ONLY, 0)}


def _kernel_page_tables(vmcoreinfo: bytes, _phys_base: int | None) -> Sequence[PageTableRoot]:
    table = vmcoreinfo_number(vmcoreinfo, "SYMBOL(swapper_pg_dir)", 16)
    if table is None or not _PAGE_OFFSET <= table < 1 << 32:
        return ()
    pae = vmcoreinfo_value(vmcoreinfo, "CONFIG_X86_PAE") == "y"
    tables = x86_64.pae_tables(native=False) if pae else x86_64.legacy_tables(large_pages=True)
    return (PageTableRoot(tables, table - _PAGE_OFFSET),)


ARCHITECTURE = replace(
    x86_64.ARCHITECTURE,
    name="i386",
    cpu_type_suffix="-i386-cpu",
    qemu_uname_machine="i686",
    gdb_name="i386",
    registers=tuple(
        replace(register, gdb=_GDB_NAMES.get(register.name, register.gdb))
        for register in x86_64.ARCHITECTURE.registers
    ),
    cores=(x86_64.LEGACY_64, x86_64.LEGACY_32),
    phys_base_key=None,
    reconcile=_reconcile,
    guessed_by_reconcile=x86_64.guessed_flags,
    kernel_page_tables=_kernel_page_tables,
    migrated=x86_64.migrated_cpu(4),
    windows_by_qemu=False,
)
