"""Where a kernel has the members of its structures, by the BTF that it has in its own memory.

Source: Linux Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.linux.kallsyms import Kallsyms
from qemu_dump_ext.linux.kernel_memory import KernelMemory
from qemu_dump_ext.structures.c_struct import ByteOrder

_SYMBOLS = ("__start_BTF", "__stop_BTF")
_SIZE_MAX = 32 << 20
_CANDIDATES_MAX = 256
_MEMBERS_MAX = 1024
_NAME_MAX = 64
_MAGIC = 0xEB9F
_HEADER = "HBBIIIII"
_KIND_STRUCT = 4
_BITFIELDS = 1 << 31
_BIT_OFFSET = 0xFFFFFF
_MEMBER_SIZE = 12


class Btf:
    """The types of one kernel."""

    def __init__(self, kernel: KernelMemory, symbols: Kallsyms, byte_order: ByteOrder) -> None:
        """Read them.

        Args:
            kernel: Memory at the kernel's addresses.
            symbols: Those of the kernel.
            byte_order: Of the guest.

        Raises:
            SourceError: It has none, or its symbols do not name them.
        """
        found = symbols.addresses_of(_SYMBOLS)
        if len(found) != len(_SYMBOLS):
            raise SourceError("the kernel has no BTF, or its symbols do not name it")
        start, stop = (found[name] for name in _SYMBOLS)
        self._prefix = "<" if byte_order == "little" else ">"
        size = stop - start
        header_size = struct.calcsize(f"{self._prefix}{_HEADER}")
        if not header_size <= size <= _SIZE_MAX:
            raise SourceError(f"the kernel's BTF has {size} bytes")
        data = kernel.read(start, size)
        magic, _, _, length, *places = struct.unpack_from(f"{self._prefix}{_HEADER}", data)
        if magic != _MAGIC:
            raise SourceError("the kernel's BTF begins with something else")
        types, types_size, strings, strings_size = places
        self._types = data[length + types :][:types_size]
        self._strings = data[length + strings :][:strings_size]

    def members(
        self, name: str, wanted: Collection[str], optional: Collection[str] = ()
    ) -> Mapping[str, int]:
        """Return where members of a structure begin, in bytes.

        It is looked for by its name, for to read all types takes a hundred times as long.

        Args:
            name: Of the structure.
            wanted: Names of members that it must have.
            optional: Names of others, which are left out where it does not have them.

        Raises:
            SourceError: There is no such structure.
        """
        # The first string is empty, so that one stands before each of the others.
        place = self._strings.find(b"\0" + name.encode() + b"\0") + 1
        pattern = struct.pack(f"{self._prefix}I", place)
        at = self._types.find(pattern) if place else -1
        for _ in range(_CANDIDATES_MAX):
            if at < 0:
                break
            if at % 4 == 0:
                found = self._members_at(at, frozenset((*wanted, *optional)))
                if found.keys() >= set(wanted):
                    return found
            at = self._types.find(pattern, at + 1)
        raise SourceError(f"the kernel's BTF has no structure {name} as it is known")

    def _members_at(self, at: int, wanted: Collection[str]) -> Mapping[str, int]:
        head = self._types[at : at + _MEMBER_SIZE]
        if len(head) < _MEMBER_SIZE:
            return {}
        _, info, size = struct.unpack(f"{self._prefix}III", head)
        count = info & 0xFFFF
        if info >> 24 & 0x1F != _KIND_STRUCT or count > _MEMBERS_MAX:
            return {}
        found = {}
        behind = at + _MEMBER_SIZE
        members = self._types[behind : behind + _MEMBER_SIZE * count]
        whole = len(members) // _MEMBER_SIZE * _MEMBER_SIZE
        for name_at, _, bits in struct.iter_unpack(f"{self._prefix}III", members[:whole]):
            place = (bits & _BIT_OFFSET if info & _BITFIELDS else bits) // 8
            name = self._strings[name_at : name_at + _NAME_MAX].partition(b"\0")[0]
            word = name.decode("ascii", "replace")
            if word in wanted and place < size:
                found[word] = place
        return found
