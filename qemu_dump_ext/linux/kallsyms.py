"""Names of a running kernel's functions, by the table that it keeps of them in its own memory.

Source: Linux kernel/kallsyms.c, scripts/kallsyms.c; VMCOREINFO tells where the table is since v6.0.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from functools import cached_property

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.linux.kernel_memory import KernelMemory
from qemu_dump_ext.structures.c_struct import U64_MAX, ByteOrder
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_number

_SYMBOLS_MAX = 2_000_000
_NAME_BYTES_MEAN_MAX = 32
"""More than any kernel's; bounds what is read."""
_TOKENS = 256
_TOKEN_TABLE_MAX = 16 << 10
_TOKEN_MAX = 1024
_NAME_MAX = 1024
_SAME_ADDRESS_MAX = 64
"""More names than any kernel has at one address; bounds the search for one of code."""
_LONG = 0x80
"""Since v6.1: the length of a name has a second byte."""
_PIECE = 64 << 10
TEXT_TYPES = frozenset("tTwW")
"""Letters of symbols that are of code, as `nm` has them."""


class Kallsyms:
    """The table of one kernel."""

    def __init__(self, kernel: KernelMemory, vmcoreinfo: bytes, byte_order: ByteOrder) -> None:
        """Read it.

        Args:
            kernel: Memory at the kernel's addresses.
            vmcoreinfo: Text of the kernel's; untrusted.
            byte_order: Of the guest.

        Raises:
            SourceError: VMCOREINFO does not say where the table is, as before v6.0 and where the
                kernel has none; or what it says leads nowhere.
        """
        self._kernel = kernel
        self._text = vmcoreinfo
        self._order = byte_order
        self._count = self._number(self._symbol("kallsyms_num_syms"), 4)
        if not 0 < self._count <= _SYMBOLS_MAX:
            raise SourceError(f"the kernel's table of symbols has {self._count} of them")
        self._tokens = self._read_tokens()
        self._addresses = self._read_addresses()

    def is_code(self, address: int) -> bool:
        """Tell whether the kernel itself has code there."""
        return self._bounds.get("_stext", 0) <= address < self._bounds.get("_etext", 0)

    def function_at(self, address: int) -> str | None:
        """Return the function of the kernel itself that has this address; None: none has."""
        if not self.is_code(address):
            return None
        index = bisect_right(self._sorted, (address, self._count)) - 1
        # Of several names at one address the first that is of code.
        for at in range(index, max(index - _SAME_ADDRESS_MAX, -1), -1):
            symbol = self._sorted[at][1]
            if self._kind(symbol) in TEXT_TYPES:
                return self._name(symbol)
        return None

    def addresses_of(self, names: Collection[str]) -> dict[str, int]:
        """Return the addresses of these symbols, as far as the table has them."""
        wanted = frozenset(names)
        ends = self._tokens_that(lambda token: any(name.endswith(token) for name in wanted))
        longest = 1 + max(map(len, wanted), default=0)  # tokens: no less than a letter each
        found = {}
        for index, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            if 0 < end - start <= longest and self._names[end - 1] in ends:
                name = self._name(index)
                if name in wanted:
                    found[name] = self._addresses[index]
        return found

    @cached_property
    def _bounds(self) -> dict[str, int]:
        return {"_stext": self._symbol("_stext")} | self.addresses_of({"_stext", "_etext"})

    @cached_property
    def _sorted(self) -> Sequence[tuple[int, int]]:
        return sorted((address, index) for index, address in enumerate(self._addresses))

    def _tokens_that(self, test: Callable[[str], bool]) -> frozenset[int]:
        return frozenset(byte for byte, token in enumerate(self._tokens) if test(token))

    def _packed(self, index: int, most: int) -> bytes:
        """Return the tokens of a symbol, at most so many: a hostile one has 32 KiB."""
        start = self._starts[index]
        return self._names[start : min(self._ends[index], start + most)]

    def _kind(self, index: int) -> str:
        """Return the letter with which a symbol begins, as `nm` has it; empty: it has none."""
        return "".join([self._tokens[byte] for byte in self._packed(index, 1)])[:1]

    def _name(self, index: int) -> str:
        """Return what is behind that letter, cut where it is longer than any kernel's."""
        packed = self._packed(index, _NAME_MAX + 1)
        return "".join([self._tokens[byte] for byte in packed])[1 : _NAME_MAX + 1]

    def _symbol(self, name: str) -> int:
        address = vmcoreinfo_number(self._text, f"SYMBOL({name})", 16)
        if address is None:
            raise SourceError(f"VMCOREINFO lacks SYMBOL({name})")
        return address

    def _number(self, gva: int, size: int) -> int:
        return int.from_bytes(self._kernel.read(gva, size), self._order)

    def _read_tokens(self) -> Sequence[str]:
        table = self._available(self._symbol("kallsyms_token_table"), _TOKEN_TABLE_MAX)
        index = self._kernel.read(self._symbol("kallsyms_token_index"), 2 * _TOKENS)
        starts = struct.unpack(f"{_prefix(self._order)}{_TOKENS}H", index)
        return [
            table[start : start + _TOKEN_MAX].partition(b"\0")[0].decode("ascii", "replace")
            for start in starts
        ]

    @cached_property
    def _names(self) -> bytes:
        most = min(self._count * _NAME_BYTES_MEAN_MAX, _SYMBOLS_MAX * _NAME_BYTES_MEAN_MAX)
        return self._available(self._symbol("kallsyms_names"), most)

    def _available(self, gva: int, most: int) -> bytes:
        """Return what is mapped from an address on, at most so much."""
        data = bytearray()
        while len(data) < most:
            size = min(_PIECE - (gva + len(data)) % _PIECE, most - len(data))
            piece = bytearray(size)
            missing = self._kernel.read_known((gva + len(data)) & U64_MAX, memoryview(piece))
            if missing:
                return bytes(data + piece[: missing[0][0]])
            data += piece
        return bytes(data)

    @cached_property
    def _spans(self) -> tuple[array[int], array[int]]:
        starts, ends = array("L"), array("L")
        names, position = self._names, 0
        try:
            for _ in range(self._count):
                length = names[position]
                position += 1
                if length & _LONG:
                    length = length & ~_LONG | names[position] << 7
                    position += 1
                starts.append(position)
                position += length
                ends.append(position)
        except IndexError as error:
            raise SourceError("the kernel's table of symbols has no end") from error
        return starts, ends

    @property
    def _starts(self) -> array[int]:
        return self._spans[0]

    @property
    def _ends(self) -> array[int]:
        return self._spans[1]

    def _read_addresses(self) -> Sequence[int]:
        word = self._kernel.word_size
        if vmcoreinfo_number(self._text, "SYMBOL(kallsyms_offsets)", 16) is None:
            data = self._kernel.read(self._symbol("kallsyms_addresses"), word * self._count)
            code = "I" if word == 4 else "Q"
            return struct.unpack(f"{_prefix(self._order)}{self._count}{code}", data)
        place = self._symbol("kallsyms_offsets")
        data = self._kernel.read(place, 4 * self._count)
        offsets = struct.unpack(f"{_prefix(self._order)}{self._count}i", data)
        mask = (1 << 8 * word) - 1
        if vmcoreinfo_number(self._text, "SYMBOL(kallsyms_relative_base)", 16) is None:
            # As in v7.2: each counts from its own place.
            return [(place + 4 * at + offset) & mask for at, offset in enumerate(offsets)]
        base = self._number(self._symbol("kallsyms_relative_base"), word)
        if min(offsets) >= 0:
            return [(base + offset) & mask for offset in offsets]
        # Until v6.15, where the addresses of per-CPU symbols are small numbers by themselves.
        return [offset if offset >= 0 else (base - 1 - offset) & mask for offset in offsets]


def _prefix(order: ByteOrder) -> str:
    return "<" if order == "little" else ">"
