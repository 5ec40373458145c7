"""What the notes of Linux have in common on every architecture.

Source: Linux include/linux/elfcore.h struct elf_prstatus_common, include/uapi/linux/elfcore.h.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qemu_dump_ext.architectures._declaration import NoteLayout
from qemu_dump_ext.structures.c_struct import Field, StructLayout, fields_of
from qemu_dump_ext.structures.elf import NT_PRFPREG, NT_PRSTATUS

_WORD_SIZES = {"u32": 4, "u64": 8}
_PID = Field("pr_pid", "u32")
_FPVALID = Field("pr_fpvalid", "u32")


def numbered(prefix: str, count: int, first: int = 0) -> str:
    """Return names like `r0 r1 r2`."""
    return " ".join(f"{prefix}{index}" for index in range(first, first + count))


def prstatus_layout(
    name: str,
    word: str,
    registers: Iterable[Field],
    *,
    pid: Field = _PID,
    fpvalid: Field = _FPVALID,
) -> StructLayout:
    """Declare struct elf_prstatus.

    Args:
        name: The name of the architecture, for messages.
        word: Kind of `unsigned long`.
        registers: pr_reg.
        pid: Another member in the place of pr_pid.
        fpvalid: Another member in the place of pr_fpvalid.
    """
    return StructLayout(
        f"elf_prstatus ({name})",
        (
            *fields_of("u32", "si_signo si_code si_errno"),
            Field("pr_cursig", "u16"),
            *fields_of(word, "pr_sigpend pr_sighold"),
            pid,
            *fields_of("u32", "pr_ppid pr_pgrp pr_sid"),
            Field("pr_times", "bytes", 4 * 2 * _WORD_SIZES[word]),  # four struct timeval
            *registers,
            fpvalid,
        ),
    )


def prstatus(
    name: str,
    word: str,
    registers: Iterable[Field],
    *,
    pid: Field = _PID,
    constants: Mapping[str, int] | None = None,
    max_align: int | None = None,
) -> NoteLayout:
    """Declare NT_PRSTATUS; the arguments are those of `prstatus_layout` and of NoteLayout."""
    layout = prstatus_layout(name, word, registers, pid=pid)
    return NoteLayout(
        "CORE",
        NT_PRSTATUS,
        layout,
        max_align=max_align or _WORD_SIZES[word],
        constants=constants or {},
    )


def fpregset(word: str, names: str) -> NoteLayout:
    """Declare NT_PRFPREG of registers that all are of one kind."""
    layout = StructLayout("elf_fpregset_t", fields_of(word, names))
    return NoteLayout("CORE", NT_PRFPREG, layout, max_align=_WORD_SIZES[word])


def wide_fields(names: str, size: int, kind: str = "wide") -> tuple[Field, ...]:
    """Declare consecutive integers of `size` bytes each."""
    return tuple(Field(name, kind, size) for name in names.split())
