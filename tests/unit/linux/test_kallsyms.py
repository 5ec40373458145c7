"""Tables as scripts/kallsyms.c writes them; those of real kernels are in tests/guest."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import cast

import pytest

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.linux.kallsyms import Kallsyms
from qemu_dump_ext.linux.kernel_memory import KernelMemory

TEXT = 0xFFFFFFFF81000000
TABLES = 0xFFFFFFFF82000000
SYMBOLS = (
    ("A", "fixed_percpu_data", 0),
    ("T", "_text", TEXT),
    ("T", "_stext", TEXT),
    ("T", "start_kernel", TEXT + 0x100),
    ("t", "a" * 130, TEXT + 0x200),  # has a length of two bytes
    ("d", "no_code", TEXT + 0x300),
    ("T", "_etext", TEXT + 0x400),
    ("R", "__start_orc_unwind", TEXT + 0x500),
)


class Tables:
    """Memory that has nothing but the tables."""

    word_size = 8

    def __init__(self, symbols: Sequence[tuple[str, str, int]], *, until_v6_15: bool) -> None:
        tokens = [chr(byte) if byte else "" for byte in range(128)] + ["start_", "_", *[""] * 126]
        names, offsets = b"", []
        for kind, name, address in symbols:
            packed = (kind + name).replace("start_", "\x80").encode("latin-1")
            size = len(packed)
            names += bytes((size,) if size < 128 else (size & 127 | 128, size >> 7)) + packed
            plain = max(0, address - TEXT)
            offsets.append(TEXT - 1 - address if until_v6_15 and address else plain)
        starts, table = [], b""
        for token in tokens:
            starts.append(len(table))
            table += token.encode("latin-1") + b"\0"
        self.parts = {
            "num_syms": struct.pack("<I", len(symbols)),
            "names": names,
            "token_table": table,
            "token_index": struct.pack("<256H", *starts),
            "offsets": struct.pack(f"<{len(symbols)}i", *offsets),
            "relative_base": struct.pack("<Q", TEXT),
        }
        self.at = {name: TABLES + (number << 16) for number, name in enumerate(self.parts)}

    def read_known(self, gva: int, view: memoryview) -> list[tuple[int, int]]:
        for name, start in self.at.items():
            if start <= gva < start + (1 << 16):
                content = self.parts[name][gva - start :][: len(view)]
                view[: len(content)] = content
                return [(len(content), len(view))] if len(content) < len(view) else []
        return [(0, len(view))]

    def read(self, gva: int, size: int) -> bytes:
        data = bytearray(size)
        if self.read_known(gva, memoryview(data)):
            raise SourceError(f"kernel address {gva:#x} is not mapped")
        return bytes(data)

    def note(self) -> bytes:
        lines = [f"SYMBOL(kallsyms_{name})={address:x}" for name, address in self.at.items()]
        return "\n".join(["OSRELEASE=6.1.0", f"SYMBOL(_stext)={TEXT:x}", *lines, ""]).encode()

    def kallsyms(self) -> Kallsyms:
        return Kallsyms(cast(KernelMemory, self), self.note(), "little")


@pytest.mark.parametrize("until_v6_15", [True, False])
def test_functions_are_named_and_what_is_none_is_not(until_v6_15):
    symbols = Tables(SYMBOLS, until_v6_15=until_v6_15).kallsyms()
    assert symbols.function_at(TEXT + 0x100) == "start_kernel"
    assert symbols.function_at(TEXT + 0x1FF) == "start_kernel"
    assert symbols.function_at(TEXT + 0x210) == "a" * 130
    assert symbols.function_at(TEXT + 0x310) == "a" * 130
    for outside in (0, TEXT - 1, TEXT + 0x400, (1 << 64) - 1):
        assert symbols.function_at(outside) is None
    assert symbols.addresses_of({"__start_orc_unwind", "no_such"}) == {
        "__start_orc_unwind": TEXT + 0x500
    }


@pytest.mark.parametrize("part", ["num_syms", "token_index", "offsets", "relative_base"])
def test_tables_that_are_not_there_are_an_error(part):
    tables = Tables(SYMBOLS, until_v6_15=True)
    tables.parts[part] = b""
    with pytest.raises(SourceError, match="is not mapped"):
        tables.kallsyms()


def test_offsets_from_their_own_places():
    tables = Tables(SYMBOLS, until_v6_15=False)
    placed = [address - tables.at["offsets"] - 4 * at for at, (_, _, address) in enumerate(SYMBOLS)]
    tables.parts["offsets"] = struct.pack(f"<{len(placed)}i", 0, *placed[1:])
    del tables.at["relative_base"]
    assert tables.kallsyms().addresses_of({"_stext", "_etext"}) == {
        "_stext": TEXT,
        "_etext": TEXT + 0x400,
    }


def test_kernel_that_does_not_tell_is_an_error():
    tables = Tables(SYMBOLS, until_v6_15=True)
    with pytest.raises(SourceError, match=r"VMCOREINFO lacks SYMBOL\(kallsyms_num_syms\)"):
        Kallsyms(cast(KernelMemory, tables), b"OSRELEASE=5.10.0\n", "little")


@pytest.mark.parametrize("count", [0, 2_000_001, 0xFFFFFFFF])
def test_impossible_numbers_of_symbols_are_not_read(count):
    tables = Tables(SYMBOLS, until_v6_15=True)
    tables.parts["num_syms"] = struct.pack("<I", count)
    with pytest.raises(SourceError, match=f"has {count} of them"):
        tables.kallsyms()


def test_names_that_have_no_end_are_an_error():
    tables = Tables(SYMBOLS, until_v6_15=True)
    tables.parts["names"] = tables.parts["names"][:40]
    with pytest.raises(SourceError, match="has no end"):
        tables.kallsyms().function_at(TEXT + 0x100)


@pytest.mark.parametrize("letter", ["d", "\x83"])
def test_search_for_code_at_an_address_ends(letter, monkeypatch):
    """Hostile: thousands of names at one address, none of them of code, or with no letter."""
    head = [*SYMBOLS[1:3], ("T", "_etext", TEXT + 0x400)]
    others = [(letter, "x" * 20, TEXT + 0x100)] * 2000
    symbols = Tables([*head, *others], until_v6_15=False).kallsyms()
    symbols.function_at(TEXT)  # has read it all
    read: list[int] = []
    packed = symbols._packed

    def counted(index: int, most: int) -> bytes:
        read.append(most)
        return packed(index, most)

    monkeypatch.setattr(symbols, "_packed", counted)
    assert symbols.function_at(TEXT + 0x200) is None
    assert 0 < sum(read) < 100


def test_name_that_is_long_beyond_all_kernels_is_cut():
    others = [("d", "z", TEXT + 0x100)] * 200  # a table is no longer than so many names are
    symbols = [*SYMBOLS[1:3], ("T", "y" * 4000, TEXT + 8), SYMBOLS[-2], *others]
    found = Tables(symbols, until_v6_15=False).kallsyms().function_at(TEXT + 8)
    assert found == "y" * 1024
