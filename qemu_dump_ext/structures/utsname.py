"""The six names of a kernel, as `struct new_utsname` has them."""

from __future__ import annotations

from qemu_dump_ext.value import Value

UTSNAME_SIZE = 65
"""The size of each of the six strings of struct new_utsname, terminating NUL included."""


UTSNAME_FIELDS = ("sysname", "nodename", "release", "version", "machine", "domainname")
UTSNAME_TOTAL_SIZE = UTSNAME_SIZE * len(UTSNAME_FIELDS)


class UtsName(Value):
    """What `uname` prints in the guest; each member at most 64 bytes."""

    sysname: str = ""
    nodename: str = ""
    release: str = ""
    version: str = ""
    machine: str = ""
    domainname: str = ""

    @property
    def names_linux(self) -> bool:
        """Whether libkdumpfile, and with it drgn, takes a header with these for that of Linux."""
        return bool(self.sysname and self.release and self.version)

    def encode(self) -> dict[str, bytes]:
        """Return the members as a kdump header holds them, by name."""
        return {name: getattr(self, name).encode()[: UTSNAME_SIZE - 1] for name in UTSNAME_FIELDS}


def parse_new_utsname(data: bytes) -> UtsName | None:
    """Parse struct new_utsname: six strings of 65 bytes.

    Returns:
        None where it is none: guest memory may hold anything.
    """
    if len(data) < UTSNAME_TOTAL_SIZE:
        return None
    strings = []
    for index in range(len(UTSNAME_FIELDS)):
        raw, terminator, _ = data[index * UTSNAME_SIZE :][:UTSNAME_SIZE].partition(b"\0")
        if not terminator or not raw.isascii():
            return None
        text = raw.decode()
        if text and not text.isprintable():
            return None
        strings.append(text)
    return UtsName(*strings)
