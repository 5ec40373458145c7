"""Modules and BTF as a hostile guest may have them; those of real kernels are in tests/guest."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from typing import cast

import pytest

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.linux.btf import Btf
from qemu_dump_ext.linux.kallsyms import Kallsyms
from qemu_dump_ext.linux.kernel_memory import KernelMemory
from qemu_dump_ext.linux.modules import Modules, OrcTables

BTF, HEAD, MODULE, SYMTAB, STRTAB, TYPETAB, KALLSYMS, TEXT = (
    0xFFFFFFFF90000000 + (number << 20) for number in range(8)
)
# Of the structures, as no kernel has them: name, offset of each member in bytes.
STRUCTS = {
    "module": {"state": 0, "list": 8, "name": 24, "core_layout": 128, "kallsyms": 168, "arch": 176},
    "module_layout": {"base": 0, "size": 8, "text_size": 12},
    "mod_kallsyms": {"symtab": 0, "num_symtab": 8, "strtab": 16, "typetab": 24},
    "mod_arch_specific": {"num_orcs": 0, "orc_unwind_ip": 8, "orc_unwind": 16},
}
SINCE_V6_4 = {
    **{name: members for name, members in STRUCTS.items() if name != "module_layout"},
    "module": {"list": 8, "mem": 128, "kallsyms": 168, "arch": 176},
    "module_memory": {"base": 0, "size": 12},
}


def btf(structs: Mapping[str, Mapping[str, int]], *, order: str = "<") -> bytes:
    strings = b"\0"
    places = {}
    for name in [*structs, *(name for members in structs.values() for name in members)]:
        if name not in places:
            places[name] = len(strings)
            strings += name.encode() + b"\0"
    # A type of another kind that has the name of a structure.
    types = struct.pack(f"{order}III", places["module"], 2 << 24, 0)
    for name, members in structs.items():
        types += struct.pack(f"{order}III", places[name], 4 << 24 | len(members), 1024)
        for member, offset in members.items():
            types += struct.pack(f"{order}III", places[member], 1, 8 * offset)
    header = struct.pack(f"{order}HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), 1 << 16)
    return header + types + strings


class Guest:
    """Memory with one module, whose functions are `first` at TEXT + 16 and `second` at + 32."""

    word_size = 8

    def __init__(self, structs: Mapping[str, Mapping[str, int]] = STRUCTS) -> None:
        self.parts: dict[int, bytearray] = {}
        self.put(BTF, btf(structs))
        self.put(HEAD, struct.pack("<QQ", MODULE + 8, MODULE + 8))
        module = bytearray(512)
        struct.pack_into("<QQ", module, 8, HEAD, HEAD)
        struct.pack_into("<Q", module, 128, TEXT)
        struct.pack_into("<I", module, 128 + 12, 0x100)
        struct.pack_into("<Q", module, 168, KALLSYMS)
        struct.pack_into("<IIQQ", module, 176, 7, 0, 0x1000, 0x2000)
        self.put(MODULE, module)
        self.put(KALLSYMS, struct.pack("<QQQQ", SYMTAB, 4, STRTAB, TYPETAB))
        self.put(STRTAB, b"\0first\0second\0data\0")
        symbols = [(0, 0, 0), (7, 1, TEXT + 32), (1, 1, TEXT + 16), (14, 1, TEXT + 48)]
        self.put(SYMTAB, b"".join(struct.pack("<IBBHQQ", n, 0, 0, s, v, 0) for n, s, v in symbols))
        self.put(TYPETAB, b"\0tTd")

    def put(self, gva: int, content: bytes | bytearray) -> None:
        self.parts[gva] = bytearray(content)

    def read_known(self, gva: int, view: memoryview) -> list[tuple[int, int]]:
        for start, content in self.parts.items():
            if start <= gva < start + len(content):
                known = content[gva - start :][: len(view)]
                view[: len(known)] = known
                return [(len(known), len(view))] if len(known) < len(view) else []
        return [(0, len(view))]

    def read(self, gva: int, size: int) -> bytes:
        if size > 1 << 26:
            pytest.fail(f"{size} bytes are asked for")
        data = bytearray(size)
        if self.read_known(gva, memoryview(data)):
            raise SourceError(f"kernel address {gva:#x} is not mapped")
        return bytes(data)

    def addresses_of(self, names: Collection[str]) -> dict[str, int]:
        stop = BTF + len(self.parts[BTF])
        known = {"modules": HEAD, "__start_BTF": BTF, "__stop_BTF": stop}
        return {name: known[name] for name in names if name in known}

    def modules(self) -> Modules:
        return Modules(cast(KernelMemory, self), cast(Kallsyms, self), "little")


@pytest.mark.parametrize("structs", [STRUCTS, SINCE_V6_4])
def test_functions_of_a_module_are_named_and_have_orc_tables(structs):
    modules = Guest(structs).modules()
    names = [modules.function_at(TEXT + offset) for offset in (15, 16, 31, 32, 0xFF, 0x100)]
    assert names == [None, "first", "first", "second", "second", None]
    assert modules.orc_at(TEXT + 20) == OrcTables(0x1000, 0x2000, 7)
    assert modules.orc_at(TEXT + 0x100) is None


def test_processor_without_orc_tables_has_none():
    structs = {name: each for name, each in STRUCTS.items() if name != "mod_arch_specific"}
    modules = Guest(structs).modules()
    assert modules.function_at(TEXT + 20) == "first"
    assert modules.orc_at(TEXT + 20) is None


@pytest.mark.parametrize("name", ["module", "mod_kallsyms", "module_layout"])
def test_structure_that_is_not_known_is_an_error(name):
    structs = {other: each for other, each in STRUCTS.items() if other != name}
    structs.setdefault("module", {"state": 0})
    with pytest.raises(SourceError, match=f"has no structure {name} as it is known"):
        Guest(structs).modules()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x9f\xeb" + bytes(22), "has no structure"),
        (bytes(24), "begins with something else"),
        (bytes(23), "has 23 bytes"),
        (struct.pack("<HBBIIIII", 0xEB9F, 1, 0, *[0xFFFFFFFF] * 5), "has no structure"),
    ],
)
def test_btf_that_is_none_is_an_error(content: bytes, message: str):
    guest = Guest()
    guest.put(BTF, content)
    with pytest.raises(SourceError, match=message):
        guest.modules()


def test_search_in_btf_ends(monkeypatch):
    """Hostile: types without end that have the name, and all members that there may be."""
    strings = b"\0module\0"
    types = struct.pack("<III", 1, 4 << 24 | 1024, 1) * 200_000
    header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    guest = Guest()
    guest.put(BTF, header + types + strings)
    looked: list[int] = []
    members_at = Btf._members_at

    def counted(self: Btf, at: int, _wanted: Collection[str]) -> Mapping[str, int]:
        looked.append(at)
        return members_at(self, at, ())

    monkeypatch.setattr(Btf, "_members_at", counted)
    with pytest.raises(SourceError, match="has no structure module"):
        guest.modules()
    assert len(looked) <= 256


def _list_in_a_circle(guest: Guest) -> None:
    struct.pack_into("<Q", guest.parts[MODULE], 8, MODULE + 8)


def _list_that_leads_nowhere(guest: Guest) -> None:
    struct.pack_into("<Q", guest.parts[MODULE], 8, 0x1000)


def _much_code(guest: Guest) -> None:
    struct.pack_into("<I", guest.parts[MODULE], 128 + 12, 0xFFFFFFFF)


@pytest.mark.parametrize("damage", [_list_in_a_circle, _list_that_leads_nowhere, _much_code])
def test_list_that_is_damaged_has_an_end(damage):
    guest = Guest()
    damage(guest)
    modules = guest.modules()
    assert modules.function_at(TEXT + 20) == "first"
    assert modules.function_at(TEXT + (1 << 30)) is None


@pytest.mark.parametrize("count", [0xFFFFFFFF, 1 << 20 | 1, 5])
def test_symbols_that_are_not_there_are_an_error(count):
    guest = Guest()
    struct.pack_into("<I", guest.parts[KALLSYMS], 8, count)
    with pytest.raises(SourceError, match=r"is not mapped|too many with those of others"):
        guest.modules().function_at(TEXT + 20)


def test_name_that_has_no_end_is_cut():
    guest = Guest()
    guest.put(STRTAB, b"\0" + b"x" * 5000)
    found = cast(Sequence[str], guest.modules().function_at(TEXT + 20))
    assert found == "x" * 512
