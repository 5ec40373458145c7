"""Motorola 68000 and ColdFire.

Sources:
    Linux arch/m68k/include/asm/elf.h ELF_CORE_COPY_REGS (order of pr_reg), asm/user.h
    (user_m68kfp_struct), whose integers are aligned to 2 bytes; QEMU gdb-xml/m68k-core.xml,
    target/m68k/translate.c m68k_cpu_dump_state().
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qemu_dump_ext.architectures._declaration import Core, NoteLayout, Register, VcpuReadings
from qemu_dump_ext.architectures._linux_notes import numbered, prstatus, wide_fields
from qemu_dump_ext.architectures._undumped import make_architecture
from qemu_dump_ext.structures.c_struct import StructLayout, fields_of
from qemu_dump_ext.structures.elf import ELFOSABI_LINUX, EM_68K, NT_PRFPREG

_DATA = numbered("d", 8)
_ADDRESS = numbered("a", 8)
_FPRS = numbered("fp", 8)
# a7 stands where Linux has the user's: the stack that the vCPU uses.
_PR_REG = f"{numbered('d', 7, first=1)} {numbered('a', 7)} d0 a7 orig_d0 sr pc format_vector"
_STUB_NAMES = {"a6": "fp", "a7": "sp", "sr": "ps"}
_ALIGN = 2


def _parse_monitor(text: str) -> Mapping[str, int]:
    """Read `F0 = 7fff ffffffffffffffff`, `FPSR = …`, `FPCR = …`."""
    values = {
        # Sign and exponent, 16 bits of nothing, mantissa.
        f"fp{index}": int(exponent, 16) << 80 | int(mantissa, 16)
        for index, exponent, mantissa in re.findall(
            r"\bF([0-7]) = ([0-9a-f]{4}) ([0-9a-f]{16})\b", text
        )
    }
    for name in ("FPSR", "FPCR"):
        if match := re.search(rf"\b{name} = +([0-9a-f]+)\b", text):
            values[name.lower()] = int(match[1], 16)
    return values


def _reconcile(readings: VcpuReadings) -> Mapping[str, int]:
    return {**readings.monitor, **readings.gdb, "fpiar": 0}  # which QEMU does not have


ARCHITECTURE = make_architecture(
    "m68k",
    Core(
        e_machine=EM_68K,
        byte_order="big",
        word_size=4,
        notes=(
            prstatus(
                "m68k",
                "u32",
                fields_of("u32", _PR_REG),
                constants={"pr_fpvalid": 1},
                max_align=_ALIGN,
            ),
            NoteLayout(
                "CORE",
                NT_PRFPREG,
                StructLayout(
                    "user_m68kfp_struct",
                    (*wide_fields(_FPRS, 12), *fields_of("u32", "fpcr fpsr fpiar")),
                ),
                max_align=_ALIGN,
            ),
        ),
        uname_machine="m68k",
        os_abi=ELFOSABI_LINUX,
        u64_align=_ALIGN,
    ),
    (
        *(
            Register(name, gdb=_STUB_NAMES.get(name, name), monitor=(name.upper(),))
            for name in f"{_DATA} {_ADDRESS} sr pc".split()
        ),
        *(Register(name) for name in f"{_FPRS} fpcr fpsr fpiar".split()),
    ),
    "pc",
    cpu_type_suffix="-m68k-cpu",
    parse_monitor=_parse_monitor,
    reconcile=_reconcile,
    gdb_settings=("set architecture m68k", "set endian big"),
)
