"""What x86 processors store of the floating point: the first 512 bytes of FXSAVE and XSAVE.

Source: Intel SDM volume 1, "FXSAVE Area"; it is also the descriptor of Linux's notes NT_PRFPREG of
64-bit processes and NT_PRXFPREG of 32-bit ones.
"""

from __future__ import annotations

from collections.abc import Mapping

from qemu_dump_ext.structures.c_struct import Abi, Field, StructLayout, fields_of

FXSAVE_SIZE = 512

_AREA = StructLayout(
    "fxsave",
    (
        *fields_of("u16", "fcw fsw ftw fop"),
        *fields_of("u64", "fip fdp"),
        *fields_of("u32", "mxcsr mxcsr_mask"),
        *(
            member
            for number in range(8)
            for member in (Field(f"st{number}", "wide", 10), Field(f"pad_st{number}", "bytes", 6))
        ),
        *(Field(f"xmm{number}", "wide", 16) for number in range(16)),
    ),
).bind(Abi("little", word_size=8, max_align=8))
_ALIKE = ("fcw", "fsw", "ftw", "mxcsr", *(f"xmm{number}" for number in range(16)))
_TOP = 11
"""Where in the status word the number of the register is that is the top of the stack."""


def registers_of_fxsave(area: bytes) -> Mapping[str, int]:
    """Return the registers in such an area by our names, with the area itself as `fxsave`."""
    values = _AREA.unpack_integers(area)
    top = values["fsw"] >> _TOP & 7
    stack = {f"fpr{(top + number) % 8}": values[f"st{number}"] for number in range(8)}
    alike = {name: values[name] for name in _ALIKE}
    return {**alike, **stack, "fxsave": int.from_bytes(area[:FXSAVE_SIZE], "little")}
