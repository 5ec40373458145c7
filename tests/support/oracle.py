"""QEMU's own dumps of a stopped machine, and an independent look at any dump."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.support.raw_qmp import RawQmp


class OracleDumps:
    """What QEMU's dump-guest-memory writes of a machine; each taken when first asked for."""

    def __init__(self, machine: QemuMachine, directory: Path) -> None:
        self.machine = machine
        self._directory = directory

    @cached_property
    def elf(self) -> Path:
        """The ELF core."""
        return self.take("elf")

    @cached_property
    def kdump_zlib(self) -> Path:
        """The flattened kdump."""
        return self.take("kdump-zlib")

    @cached_property
    def kdump_raw_zlib(self) -> Path:
        """The flattened kdump, rearranged by makedumpfile."""
        return rearrange(self.kdump_zlib, self._directory / "rearranged")

    def take(self, dump_format: str) -> Path:
        """Take the dump of a format of QMP's DumpGuestMemoryFormat, once."""
        path = self._directory / dump_format
        if path.exists():
            return path
        with RawQmp(self.machine.qmp_sockets[1]) as qmp:
            qmp.execute(
                "dump-guest-memory", paging=False, protocol=f"file:{path}", format=dump_format
            )
        return path


def rearrange(flattened: Path, target: Path) -> Path:
    """Turn a flattened kdump into a raw one with makedumpfile."""
    with flattened.open("rb") as stream:
        subprocess.run(
            ["makedumpfile", "-R", target], stdin=stream, check=True, capture_output=True
        )
    return target


_EHDR_NAMES = [
    "e_ident",
    "e_type",
    "e_machine",
    "e_version",
    "e_entry",
    "e_phoff",
    "e_shoff",
    "e_flags",
    "e_ehsize",
    "e_phentsize",
    "e_phnum",
    "e_shentsize",
    "e_shnum",
    "e_shstrndx",
]


def elf_facts(path: Path) -> dict[str, Any]:
    """Read a 64-bit little-endian core by `struct` alone.

    Returns:
        ELF header fields by name; `loads`: p_vaddr, p_paddr, p_filesz, p_memsz of each PT_LOAD;
        `notes`: the notes area; `gap`: bytes between it and the first PT_LOAD; `memory`: the
        content of each PT_LOAD; `tail`: what is behind.
    """
    data = path.read_bytes()
    facts: dict[str, Any] = dict(
        zip(_EHDR_NAMES, struct.unpack_from("<16sHHIQQQIHHHHHH", data), strict=True)
    )
    loads, memory, end = [], [], 0
    for index in range(facts["e_phnum"]):
        kind, _, offset, vaddr, paddr, filesz, memsz, _ = struct.unpack_from(
            "<IIQQQQQQ", data, facts["e_phoff"] + 56 * index
        )
        content = data[offset : offset + filesz]
        if kind == 4:
            facts["notes"] = content
        else:
            facts.setdefault("gap", offset - end)
            loads.append((vaddr, paddr, filesz, memsz))
            memory.append(content)
        end = max(end, offset + filesz)
    return facts | {"loads": loads, "memory": memory, "tail": data[end:]}


_UTSNAME = ["sysname", "nodename", "release", "version", "machine", "domainname"]
_HEADER_NAMES = [
    "timestamp_sec",
    "timestamp_usec",
    "status",
    "block_size",
    "sub_hdr_size",
    "bitmap_blocks",
    "max_mapnr",
    "total_ram_blocks",
    "device_blocks",
    "written_blocks",
    "current_cpu",
    "nr_cpus",
]
_SUB_HEADER_NAMES = [
    "phys_base",
    "dump_level",
    "split",
    "start_pfn",
    "end_pfn",
    "offset_vmcoreinfo",
    "size_vmcoreinfo",
    "offset_note",
    "size_note",
    "offset_eraseinfo",
    "size_eraseinfo",
    "start_pfn_64",
    "end_pfn_64",
    "max_mapnr_64",
]


def kdump_facts(path: Path) -> dict[str, Any]:
    """Read a raw 64-bit little-endian kdump by `struct` alone.

    Returns:
        Header and sub-header fields by name; `notes`, `vmcoreinfo`, `bitmaps`; `rest`: page
        descriptors and data.
    """
    data = path.read_bytes()
    facts: dict[str, Any] = {"signature": data[:12]}
    for index, name in enumerate(_UTSNAME):
        facts[name] = data[12 + 65 * index :][:65].rstrip(b"\0").decode()
    facts |= zip(_HEADER_NAMES, struct.unpack_from("<QQIIIIIIIIII", data, 408), strict=True)
    block = facts["block_size"]
    facts |= zip(_SUB_HEADER_NAMES, struct.unpack_from("<QIIQQQQQQQQQQQ", data, block), strict=True)
    facts["notes"] = data[facts["offset_note"] :][: facts["size_note"]]
    facts["vmcoreinfo"] = data[facts["offset_vmcoreinfo"] :][: facts["size_vmcoreinfo"]]
    bitmaps = block * (1 + facts["sub_hdr_size"])
    rest = bitmaps + block * facts["bitmap_blocks"]
    return facts | {"bitmaps": data[bitmaps:rest], "rest": data[rest:]}


def differing_fields(ours: dict[str, Any], theirs: dict[str, Any]) -> set[str]:
    """Name the facts that differ."""
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


def kdump_pages(path: Path) -> Iterator[tuple[int, bytes]]:
    """Read the pages of a raw kdump through libkdumpfile, as drgn brings it.

    Yields:
        gpa and content of every page of the second bitmap.
    """
    import drgn  # noqa: PLC0415

    facts = kdump_facts(path)
    block = facts["block_size"]
    second = facts["bitmaps"][len(facts["bitmaps"]) // 2 :]
    program = drgn.Program()
    program.set_core_dump(path)
    for index, bits in enumerate(second):
        for bit in range(8):
            if bits >> bit & 1:
                gpa = (8 * index + bit) * block
                yield gpa, program.read(gpa, block, physical=True)
