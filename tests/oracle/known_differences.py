"""Where our default dump differs from QEMU 7.2's, and why. Anything else that differs fails."""

from __future__ import annotations

_PROGRAM_HEADERS_FIRST = (
    "makedumpfile, and crash before 7.2.9, want the program headers right behind the ELF header;"
    " QEMU puts section headers, which no reader of an unpaged core needs, in between"
)

ELF = {
    "e_phoff": _PROGRAM_HEADERS_FIRST,
    "e_shoff": _PROGRAM_HEADERS_FIRST,
    "e_shnum": _PROGRAM_HEADERS_FIRST,
    "e_shentsize": _PROGRAM_HEADERS_FIRST,
    "e_shstrndx": _PROGRAM_HEADERS_FIRST,
    "gap": "guest memory begins at a page of the file, so that it can be mapped",
    "tail": "the string table of those section headers",
    "e_ehsize": "QEMU writes the size of a pointer instead of the size of the ELF header",
}
_UTSNAME = "libkdumpfile, and with it drgn, refuses a header that does not name the kernel"
KDUMP = {
    "sysname": _UTSNAME,
    "release": _UTSNAME,
    "version": _UTSNAME,
    "rest": "pages of equal content share their data, as pages of zeros do in every kdump",
}
_FASTER = "ISA-L packs pages three times as fast, into other bytes of the same format"
KDUMP_ZLIB = {"rest": _FASTER}
WINDOWS = {
    "RequiredDumpSpace": "QEMU cuts the size of a dump with 32-bit pointers to 32 bits",
    "x87 and SSE": "QEMU says that a processor's context has them, and leaves them zero",
    "behind CONTEXT": "QEMU overwrites 4 bytes behind the registers of each 32-bit processor",
}
KDUMP_LINUX = {
    "nodename": _UTSNAME,
    "domainname": _UTSNAME,
    "phys_base": "QEMU reads the decimal NUMBER(phys_base) of VMCOREINFO as hexadecimal",
}
KDUMP_LINUX_NEWER = {
    "machine": "QEMU says Unknown since 9.2",
}
