"""SPARC V9.

Sources:
    Linux arch/sparc/kernel/ptrace_64.c genregs64_get() (order of pr_reg: g, o, l, i, then
    tstate, tpc, tnpc, y); QEMU target/sparc/gdbstub.c, target/sparc/cpu.c
    sparc_cpu_dump_state().
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qemu_dump_ext.architectures._declaration import Core, Register
from qemu_dump_ext.architectures._linux_notes import numbered, prstatus
from qemu_dump_ext.architectures._undumped import g_packet, make_architecture
from qemu_dump_ext.c_struct import fields_of
from qemu_dump_ext.elf_structs import EM_SPARCV9

_WINDOWED = " ".join(numbered(letter, 8) for letter in "goli")
_EVEN_DOUBLES = " ".join(f"f{index}" for index in range(32, 64, 2))
_CONTROL = {"tstate": "state", "tpc": "pc", "tnpc": "npc", "y": "y"}


def _parse_monitor(text: str) -> Mapping[str, int]:
    """Read `%o4-7: value value value value` and `pc: …`, and put TSTATE together.

    TSTATE is CCR, ASI, PSTATE and CWP as a trap would store them.
    """
    values: dict[str, int] = {}
    for letter, first, row in re.findall(
        r"^%([goli])(\d)-\d:((?: +[0-9a-f]{16})+) *$", text, re.MULTILINE
    ):
        for index, value in enumerate(row.split(), int(first)):
            values[f"{letter}{index}"] = int(value, 16)
    for name, ours in (("pc", "tpc"), ("npc", "tnpc"), ("y", "y")):
        if match := re.search(rf"\b{name}: ([0-9a-f]+)\b", text):
            values[ours] = int(match[1], 16)
    parts = [re.search(rf"\b{name}: ([0-9a-f]+)\b", text) for name in ("ccr", "asi", "pstate")]
    window = re.search(r"\bcwp: (\d+)\b", text)
    if window and all(parts):
        ccr, asi, pstate = (int(part[1], 16) for part in parts if part)
        values["tstate"] = ccr << 32 | asi << 24 | (pstate & 0xFFF) << 8 | int(window[1])
    return values


ARCHITECTURE = make_architecture(
    "sparc64",
    Core(
        e_machine=EM_SPARCV9,
        byte_order="big",
        word_size=8,
        notes=(prstatus("SPARC64", "u64", fields_of("u64", f"{_WINDOWED} {' '.join(_CONTROL)}")),),
        uname_machine="sparc64",
    ),
    (
        *(Register(name, gdb=name) for name in _WINDOWED.split()),
        *(Register(name, gdb=theirs) for name, theirs in _CONTROL.items()),
    ),
    "tpc",
    cpu_type_suffix="-sparc64-cpu",
    page_size=8192,
    g_packet=g_packet(
        (8, _WINDOWED),
        (4, numbered("f", 32)),
        (8, f"{_EVEN_DOUBLES} pc npc state fsr fprs y"),
    ),
    parse_monitor=_parse_monitor,
    gdb_settings=("set architecture sparc:v9", "set endian big"),
)
