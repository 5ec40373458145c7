"""Cores of guests as VirtualBox and Xen write them, by offsets alone, apart from the package.

The offsets are those that a compiler gives the structures in VirtualBox's dbgfcorefmt.h and in the
public headers of Xen, arch-x86/xen.h and xen-x86_64.h.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from struct import pack, pack_into

from tests.support.sample_elf import Load, make_elf
from tests.support.sample_kdump import note

PAGE = 4096
_VIRTUALBOX_GPRS = "rax rbx rcx rdx rsi rdi r8 r9 r10 r11 r12 r13 r14 r15 rip rsp rbp eflags"
_VIRTUALBOX_SELECTORS = {"cs": 144, "ds": 168, "es": 192, "fs": 216, "gs": 240, "ss": 264}
_VIRTUALBOX_SELECTORS |= {"ldt": 416, "tr": 440}
_VIRTUALBOX_WORDS = {
    **{name: 8 * place for place, name in enumerate(_VIRTUALBOX_GPRS.split())},
    "cr0": 288,
    "cr2": 296,
    "cr3": 304,
    "cr4": 312,
    **{f"dr{number}": 320 + 8 * number for number in (0, 1, 2, 3, 6, 7)},
    "gdt_base": 384,
    "idt_base": 400,
    "efer": 488,
    "kernel_gs_base": 536,
    **{f"{name}_base": place for name, place in _VIRTUALBOX_SELECTORS.items()},
}
_VIRTUALBOX_LIMITS = {f"{name}_limit": place + 8 for name, place in _VIRTUALBOX_SELECTORS.items()}
_VIRTUALBOX_LIMITS |= {"gdt_limit": 392, "idt_limit": 408}
_VIRTUALBOX_XSAVE = 584
_XEN_GPRS = "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi"
_XEN_WORDS = {
    **{name: 520 + 8 * place for place, name in enumerate(_XEN_GPRS.split())},
    "rip": 648,
    "eflags": 664,
    "rsp": 672,
    "cr0": 4984,
    "cr2": 5000,
    "cr3": 5008,
    "cr4": 5016,
    **{f"dr{number}": 5048 + 8 * number for number in (0, 1, 2, 3, 6, 7)},
    "fs_base": 5144,
    "gs_base_kernel": 5152,
    "gs_base_user": 5160,
}
_XEN_SELECTORS = {"cs": 656, "ss": 680, "es": 688, "ds": 696, "fs": 704, "gs": 712}
XEN_CONTEXT_SIZE = 5168


def fxsave(*, fcw: int, fsw: int, ftw: int, mxcsr: int, st: bytes, xmm: bytes) -> bytes:
    """Return what FXSAVE stores; `st` has the top of the stack, `xmm` the first registers."""
    area = pack("<4H16xII", fcw, fsw, ftw, 0, mxcsr, 0xFFFF) + st.ljust(128, b"\0") + xmm
    return area.ljust(512, b"\0")


def virtualbox_state(
    registers: Mapping[str, int],
    attributes: int = 0xA09B,
    *,
    xsave: bytes = b"",
    xsave_at: int = _VIRTUALBOX_XSAVE,
    xsave_size: int = 8192,
) -> bytes:
    """Return DBGFCORECPU of registers by our names; selectors have these attributes."""
    data = bytearray(xsave_at + xsave_size)
    data[xsave_at : xsave_at + len(xsave)] = xsave
    for name, place in _VIRTUALBOX_WORDS.items():
        pack_into("<Q", data, place, registers.get(name, 0))
    for name, place in _VIRTUALBOX_LIMITS.items():
        pack_into("<I", data, place, registers.get(name, 0))
    for name, place in _VIRTUALBOX_SELECTORS.items():
        pack_into("<IH", data, place + 12, attributes, registers.get(f"{name}_selector", 0))
    return bytes(data)


def virtualbox_notes(
    states: Sequence[bytes], *, magic: int = 0xC01AC0DE, version: int = 0x10006, count: int = -1
) -> bytes:
    """Return the notes of a core of VirtualBox."""
    count = len(states) if count < 0 else count
    core = pack("<6I", magic, version, 24, 7 << 16, 1234, count)
    return note(b"VBCORE", 0xB00, core) + b"".join(note(b"VBCPU", 0xB01, state) for state in states)


def make_virtualbox(blocks: Mapping[int, bytes], notes: bytes) -> bytes:
    """Return a core of VirtualBox: memory by gpa, and the memory of a device, which it has not."""
    loads = [Load(gpa, data, vaddr=0) for gpa, data in blocks.items()]
    loads.append(Load(0xE0000000, b"", memsz=1 << 20, vaddr=0))
    return bytes(make_elf(loads, notes=notes, sections_first=False))


def xen_context(registers: Mapping[str, int], fpu: bytes = b"") -> bytes:
    """Return vcpu_guest_context of x86_64; the kernel's and the program's base of gs by these."""
    data = bytearray(XEN_CONTEXT_SIZE)
    if fpu:
        data[:512] = fpu
        pack_into("<Q", data, 512, 1)  # VGCF_i387_valid
    for name, place in _XEN_WORDS.items():
        pack_into("<Q", data, place, registers.get(name, 0))
    for name, place in _XEN_SELECTORS.items():
        pack_into("<H", data, place, registers.get(f"{name}_selector", 0))
    return bytes(data)


def make_xen(
    frames: Sequence[tuple[int, bytes]],
    contexts: Sequence[bytes] = (),
    *,
    magic: int = 0xF00FEBEE,
    page_size: int = PAGE,
    count: int = -1,
    machine: int = 62,
    without: str = "",
    translated: bool = True,
) -> bytes:
    """Return a core of Xen.

    Args:
        frames: Number and content of each page, in the order of the file.
        contexts: Of the vCPUs.
        magic: Of the kind of domain.
        page_size: That it says to have.
        count: Of pages, that it says to have.
        machine: EM_*.
        without: Name of a section that it does not have.
        translated: Whether Xen translates the domain's frames.
    """
    count = len(frames) if count < 0 else count
    header = pack("<4Q", magic, len(contexts), count, page_size)
    sections = {
        ".shstrtab": b"",
        ".note.Xen": note(b"Xen", 0x2000000, b"") + note(b"Xen", 0x2000001, header),
        ".xen_prstatus": b"".join(contexts),
        ".xen_pfn": b"".join(pack("<Q", frame) for frame, _ in frames),
        ".xen_pages": b"".join(content for _, content in frames),
    }
    if not translated:
        numbers = sections.pop(".xen_pfn")
        pairs = (numbers[at : at + 8] * 2 for at in range(0, len(numbers), 8))
        sections[".xen_p2m"] = b"".join(pairs)
    sections.pop(without, None)
    names = b"\0" + b"".join(name.encode() + b"\0" for name in sections)
    sections[".shstrtab"] = names
    place = 64 + 64 * (len(sections) + 1)
    table, data = bytes(64), b""
    for name, content in sections.items():
        at = place + len(data)
        name_at = names.index(b"\0" + name.encode() + b"\0") + 1
        table += pack("<IIQQQQIIQQ", name_at, 1, 0, 0, at, len(content), 0, 0, 1, 0)
        data += content
    ident = b"\x7fELF\2\1\1" + bytes(9)
    ehdr = ident + pack("<HHIQQQI", 4, machine, 1, 0, 0, 64, 0)
    return ehdr + pack("<6H", 64, 56, 0, 64, len(sections) + 1, 1) + table + data
