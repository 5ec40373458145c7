"""SPARC of 32 bits.

Sources:
    Linux arch/sparc/include/asm/elf_32.h (order of pr_reg, elf_fpregset_t),
    arch/sparc/kernel/ptrace_32.c genregs32_get(), fpregs32_get() (WIM and TBR are zero, the
    queue of the floating-point unit is empty); QEMU target/sparc/gdbstub.c, target/sparc/cpu.c
    sparc_cpu_dump_state().
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qemu_dump_ext.architectures._declaration import Core, NoteLayout, Register
from qemu_dump_ext.architectures._linux_notes import numbered, prstatus
from qemu_dump_ext.architectures._undumped import g_packet, make_architecture
from qemu_dump_ext.structures.c_struct import U32_MAX, Field, StructLayout, fields_of
from qemu_dump_ext.structures.elf import EM_SPARC, NT_PRFPREG

_WINDOWED = " ".join(numbered(letter, 8) for letter in "goli")
_FPRS = numbered("f", 32)
_CONTROL = "psr pc npc y"
_QUEUE_ENTRY_SIZE = 8

_FPREGSET = StructLayout(
    "elf_fpregset_t",
    (
        *fields_of("u32", f"{_FPRS} pad_unused fsr"),
        *fields_of("u8", "pr_qcnt pr_q_entrysize pr_en pad_queue"),
        Field("pr_q", "bytes", 4 * 64),
    ),
)


def _parse_monitor(text: str) -> Mapping[str, int]:
    """Read `%o0-7: value …`, `%f08: pair …` and `psr: value`."""
    values: dict[str, int] = {}
    for letter, row in re.findall(r"^%([goli])0-7:((?: +[0-9a-f]{8})+) *$", text, re.MULTILINE):
        values |= {f"{letter}{index}": int(word, 16) for index, word in enumerate(row.split())}
    for first, row in re.findall(r"^%f(\d\d):((?: +[0-9a-f]{16})+) *$", text, re.MULTILINE):
        for index, pair in enumerate(row.split()):
            even = int(first) + 2 * index
            values |= {f"f{even}": int(pair, 16) >> 32, f"f{even + 1}": int(pair, 16) & U32_MAX}
    for name, value in re.findall(r"\b(psr|pc|npc|y|fsr): ([0-9a-f]{8})\b", text):
        values[name] = int(value, 16)
    return values


ARCHITECTURE = make_architecture(
    "sparc",
    Core(
        e_machine=EM_SPARC,
        byte_order="big",
        word_size=4,
        notes=(
            prstatus(
                "SPARC",
                "u32",
                fields_of("u32", f"{_WINDOWED} {_CONTROL} zero_wim zero_tbr"),
                constants={"pr_fpvalid": 1},
            ),
            NoteLayout(
                "CORE",
                NT_PRFPREG,
                _FPREGSET,
                max_align=4,
                constants={"pr_q_entrysize": _QUEUE_ENTRY_SIZE, "pr_en": 1},
            ),
        ),
        uname_machine="sparc",
    ),
    tuple(Register(name, gdb=name) for name in f"{_WINDOWED} {_FPRS} {_CONTROL} fsr".split()),
    "pc",
    cpu_type_suffix="-sparc-cpu",
    g_packet=g_packet((4, f"{_WINDOWED} {_FPRS} y psr wim tbr pc npc fsr csr")),
    parse_monitor=_parse_monitor,
    gdb_settings=("set architecture sparc", "set endian big"),
)
