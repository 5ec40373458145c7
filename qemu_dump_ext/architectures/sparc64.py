"""SPARC V9.

Sources:
    Linux arch/sparc/kernel/ptrace_64.c genregs64_get() (order of pr_reg: g, o, l, i, then
    tstate, tpc, tnpc, y), arch/sparc/include/asm/elf_64.h (elf_fpregset_t); QEMU
    target/sparc/gdbstub.c, target/sparc/cpu.c sparc_cpu_dump_state().
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qemu_dump_ext.architectures._declaration import Core, Register
from qemu_dump_ext.architectures._linux_notes import fpregset, numbered, prstatus
from qemu_dump_ext.architectures._undumped import g_packet, make_architecture
from qemu_dump_ext.structures.c_struct import fields_of
from qemu_dump_ext.structures.elf import EM_SPARCV9

_WINDOWED = " ".join(numbered(letter, 8) for letter in "goli")
_DOUBLES = " ".join(f"d{index}" for index in range(0, 64, 2))
_FP_CONTROL = "fsr gsr fprs"
_MONITOR_NAMES = {"pc": "tpc", "npc": "tnpc", "y": "y", "fsr": "fsr", "fprs": "fprs"}
_CONTROL = {"tstate": "state", "tpc": "pc", "tnpc": "npc", "y": "y"}


def _parse_monitor(text: str) -> Mapping[str, int]:
    """Read `%o4-7: value …`, `%f08: double …` and `pc: …`, and put TSTATE together.

    TSTATE is CCR, ASI, PSTATE and CWP as a trap would store them.
    """
    values: dict[str, int] = {}
    for letter, first, row in re.findall(
        r"^%([goli])(\d)-\d:((?: +[0-9a-f]{16})+) *$", text, re.MULTILINE
    ):
        for index, value in enumerate(row.split(), int(first)):
            values[f"{letter}{index}"] = int(value, 16)
    for first, row in re.findall(r"^%f(\d\d):((?: +[0-9a-f]{16})+) *$", text, re.MULTILINE):
        for index, value in enumerate(row.split()):
            values[f"d{int(first) + 2 * index}"] = int(value, 16)
    for name, ours in _MONITOR_NAMES.items():
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
        notes=(
            prstatus(
                "SPARC64",
                "u64",
                fields_of("u64", f"{_WINDOWED} {' '.join(_CONTROL)}"),
                constants={"pr_fpvalid": 1},
            ),
            fpregset("u64", f"{_DOUBLES} {_FP_CONTROL}"),
        ),
        uname_machine="sparc64",
    ),
    (
        *(Register(name, gdb=name) for name in f"{_WINDOWED} {_DOUBLES} fsr fprs".split()),
        *(Register(name, gdb=theirs) for name, theirs in _CONTROL.items()),
        Register("gsr"),
    ),
    "tpc",
    cpu_type_suffix="-sparc64-cpu",
    page_size=8192,
    g_packet=g_packet(
        (8, f"{_WINDOWED} {_DOUBLES} pc npc state fsr fprs y"),  # singles follow each other
    ),
    parse_monitor=_parse_monitor,
    gdb_settings=("set architecture sparc:v9", "set endian big"),
)
