"""A program of drgn whose memory is that of a guest."""

from __future__ import annotations

from functools import partial

import drgn

from qemu_dump_ext.engine.guest_view import GuestView
from qemu_dump_ext.errors import RequestError, SourceError


def program_of(view: GuestView) -> drgn.Program:
    """Return it; without symbols.

    Raises:
        RequestError: drgn knows no such processor.
        SourceError: The kernel does not tell about itself.
    """
    vmcoreinfo = view.find_vmcoreinfo()
    if not vmcoreinfo.text:
        raise SourceError("; ".join(vmcoreinfo.remarks), hint="is it a Linux guest?")
    program = drgn.Program(_platform(view))
    for block in view.ram_blocks:
        program.add_memory_segment(block.gpa, block.size, partial(_read, view), physical=True)
    program.set_linux_kernel_custom(vmcoreinfo.text, is_live=False)
    return program


def _platform(view: GuestView) -> drgn.Platform:
    # It has the names of QEMU's targets in capitals.
    name = view.architecture.name
    architecture = getattr(drgn.Architecture, name.upper(), None)
    if architecture is None:
        raise RequestError(f"drgn knows no {name}")
    flags = drgn.PlatformFlags(0)
    if view.core.word_size == 8:
        flags |= drgn.PlatformFlags.IS_64_BIT
    if view.core.byte_order == "little":
        flags |= drgn.PlatformFlags.IS_LITTLE_ENDIAN
    return drgn.Platform(architecture, flags)


def _read(view: GuestView, gpa: int, size: int, _offset: int, _physical: bool) -> bytes:
    return view.read(gpa, size)
