"""The modules of a running kernel: which function has an address, and how its callers are found.

Source: Linux include/linux/module.h, kernel/module/kallsyms.c, arch/x86/include/asm/module.h.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.linux.btf import Btf
from qemu_dump_ext.linux.kallsyms import TEXT_TYPES, Kallsyms
from qemu_dump_ext.linux.kernel_memory import KernelMemory
from qemu_dump_ext.structures.c_struct import U64_MAX, ByteOrder
from qemu_dump_ext.value import Value

_MODULES = "modules"
_MODULES_MAX = 1024
_TEXT_MAX = 1 << 30
_SYMBOLS_MAX = 1 << 20
"""Of all modules in which vCPUs are."""
_NAME_MAX = 512
_SYMBOL = "IBBHQQ"  # Elf64_Sym
_SYMBOL_SIZE = 24
_WORD = 8


class OrcTables(Value):
    """Where ORC tables are.

    Attributes:
        addresses: Of the code that the entries are of, each counted from its own place.
        entries: The entries.
        count: How many.
    """

    addresses: int
    entries: int
    count: int


class _Layout(Value):
    # Of struct module, and of what is in it: offsets in bytes.
    module: Mapping[str, int]
    kallsyms: Mapping[str, int]
    text: Mapping[str, int]
    orc: Mapping[str, int]


class Modules:
    """The modules of one kernel of 64 bits."""

    def __init__(self, kernel: KernelMemory, symbols: Kallsyms, byte_order: ByteOrder) -> None:
        """Find them.

        Args:
            kernel: Memory at the kernel's addresses.
            symbols: Those of the kernel.
            byte_order: Of the guest.

        Raises:
            SourceError: The kernel does not say where they are, or how they look.
        """
        head = symbols.addresses_of({_MODULES}).get(_MODULES)
        if head is None or kernel.word_size != _WORD:
            raise SourceError("the kernel's symbols do not name its modules")
        self._kernel = kernel
        self._order = byte_order
        self._head = head
        self._layout = _layout_of(Btf(kernel, symbols, byte_order))
        self._functions: dict[int, tuple[int, Sequence[tuple[int, int]]]] = {}
        self._symbols_left = _SYMBOLS_MAX

    def function_at(self, address: int) -> str | None:
        """Return the function of a module that has this address; None: none has.

        Raises:
            SourceError: What the module says of itself leads nowhere.
        """
        module = self._module_at(address)
        return None if module is None else self._function(module, address)

    def orc_at(self, address: int) -> OrcTables | None:
        """Return the ORC tables of the module that has this address; None: there are none.

        Raises:
            SourceError: As above.
        """
        module = self._module_at(address)
        if module is None or not self._layout.orc:
            return None
        at = module + self._layout.module["arch"]
        tables = OrcTables(
            self._word(at + self._layout.orc["orc_unwind_ip"]),
            self._word(at + self._layout.orc["orc_unwind"]),
            self._number(at + self._layout.orc["num_orcs"], 4),
        )
        return tables if 0 < tables.count <= _SYMBOLS_MAX else None

    def _module_at(self, address: int) -> int | None:
        return next((m for first, end, m in self._texts if first <= address < end), None)

    @cached_property
    def _texts(self) -> Sequence[tuple[int, int, int]]:
        """First address and end of the code of each module, and where its structure is.

        Those behind one that is damaged are not known.
        """
        found: list[tuple[int, int, int]] = []
        is_array = "mem" in self._layout.module
        text_name, size_name = ("mem", "size") if is_array else ("core_layout", "text_size")
        try:
            entry = self._word(self._head)
            while entry != self._head and len(found) < _MODULES_MAX:
                module = entry - self._layout.module["list"]
                text = module + self._layout.module[text_name]
                first = self._word(text + self._layout.text["base"])
                size = self._number(text + self._layout.text[size_name], 4)
                found.append((first, first + min(size, _TEXT_MAX), module))
                entry = self._word(entry)
        except SourceError:
            pass
        return found

    def _function(self, module: int, address: int) -> str | None:
        if module not in self._functions:
            self._functions[module] = self._functions_of(module)
        strtab, functions = self._functions[module]
        index = bisect_right(functions, (address, U64_MAX)) - 1
        return (self._text(strtab + functions[index][1]) or None) if index >= 0 else None

    def _functions_of(self, module: int) -> tuple[int, Sequence[tuple[int, int]]]:
        """Return where a module has its names, and the address and the name of each function."""
        at = self._word(module + self._layout.module["kallsyms"])
        symtab, strtab, typetab = (
            self._word(at + self._layout.kallsyms[name]) for name in ("symtab", "strtab", "typetab")
        )
        count = self._number(at + self._layout.kallsyms["num_symtab"], 4)
        self._symbols_left -= count
        if self._symbols_left < 0:
            raise SourceError(f"a module has {count} symbols, too many with those of others")
        data = self._kernel.read(symtab & U64_MAX, _SYMBOL_SIZE * count)
        types = self._kernel.read(typetab & U64_MAX, count).decode("latin-1")
        symbols = struct.iter_unpack(f"{'<' if self._order == 'little' else '>'}{_SYMBOL}", data)
        functions = sorted(
            (value, name)
            for (name, _, _, section, value, _), kind in zip(symbols, types, strict=True)
            if name and section and kind in TEXT_TYPES
        )
        return strtab, functions

    def _text(self, gva: int) -> str:
        piece = bytearray(_NAME_MAX)
        missing = self._kernel.read_known(gva & U64_MAX, memoryview(piece))
        known = piece[: missing[0][0]] if missing else piece
        return known.partition(b"\0")[0].decode("ascii", "replace")

    def _word(self, gva: int) -> int:
        return self._number(gva, _WORD)

    def _number(self, gva: int, size: int) -> int:
        return int.from_bytes(self._kernel.read(gva & U64_MAX, size), self._order)


def _layout_of(btf: Btf) -> _Layout:
    module = btf.members("module", ("list", "kallsyms", "arch"), ("core_layout", "mem"))
    kallsyms = btf.members("mod_kallsyms", ("symtab", "num_symtab", "strtab", "typetab"))
    # Since v6.4 an array, of which the first has the code.
    if "mem" in module:
        text = btf.members("module_memory", ("base", "size"))
    elif "core_layout" in module:
        text = btf.members("module_layout", ("base", "text_size"))
    else:
        raise SourceError("the kernel's modules do not look as they are known")
    try:
        orc = btf.members("mod_arch_specific", ("num_orcs", "orc_unwind_ip", "orc_unwind"))
    except SourceError:  # as of every other processor
        orc = {}
    return _Layout(module, kallsyms, text, orc)
