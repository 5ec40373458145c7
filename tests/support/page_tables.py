"""Page tables made by hand, in guest memory before the guest starts; registers set through gdb."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.support.doors import run_gdb

TABLES_AT = 0x400000
PRESENT, PAGE_SIZE_BIT, NO_EXECUTE = 1, 1 << 7, 1 << 63
PG, PSE, PAE, LA57 = 1 << 31, 1 << 4, 1 << 5, 1 << 12
LONG = 0x500  # LME and LMA
_NUMBERS = {"cr0": 27, "cr3": 29, "cr4": 30, "efer": 32}
"""In the target description of QEMU's stub."""
_OFF = {"cr0": 0x60000010, "cr4": 0, "efer": 0, "cr3": 0}


class TableImage:
    """Pages of tables, one behind the other from TABLES_AT on."""

    def __init__(self) -> None:
        self.data = bytearray()

    def table(self, entries: Mapping[int, int], size: int = 8) -> int:
        """Add a page of entries by index; return its gpa."""
        gpa = TABLES_AT + len(self.data)
        page = bytearray(4096)
        for index, entry in entries.items():
            struct.pack_into("<Q" if size == 8 else "<I", page, index * size, entry)
        self.data += page
        return gpa

    def chain(self, entries: Mapping[int, int], *indexes: int) -> int:
        """Add a table and those that lead to it, each through one entry, the root last."""
        gpa = self.table(entries)
        for index in indexes:
            gpa = self.table({index: gpa | PRESENT})
        return gpa


@dataclass(frozen=True)
class Mode:
    """Registers of one vCPU."""

    cr3: int
    cr4: int = 0
    efer: int = 0
    cr0: int = 0x60000011 | PG

    def registers(self) -> dict[str, int]:
        return {"efer": self.efer, "cr4": self.cr4, "cr3": self.cr3, "cr0": self.cr0}


def set_modes(machine: QemuMachine, modes: Sequence[Mode | None]) -> None:
    """Give each vCPU its registers; None: no paging."""
    commands = []
    count = 0
    for number, mode in enumerate(modes, 1):
        commands.append(f"maintenance packet Hgp1.{number}")
        # gdb itself cannot set them: it has them as flags.
        for name, value in [*_OFF.items(), *(mode.registers().items() if mode else ())]:
            content = value.to_bytes(8, "little").hex()
            commands.append(f"maintenance packet P{_NUMBERS[name]:x}={content}")
        count = len(commands)
    done = run_gdb(machine, commands)
    assert done.stdout.count('received: "OK"') == count, done.stdout + done.stderr


def page(gpa: int, flags: int = 0) -> int:
    return gpa | PRESENT | flags


def large(gpa: int, flags: int = 0) -> int:
    return gpa | PRESENT | PAGE_SIZE_BIT | flags


def run_of_pages(index: int, gpa: int, count: int) -> dict[int, int]:
    return {index + i: page(gpa + 0x1000 * i) for i in range(count)}


def random_tables(image: TableImage, seed: int) -> int:
    """A root of 4 levels over few pages of memory: everything meets and overlaps everything."""
    pick = random.Random(seed)  # noqa: S311
    directories = []
    distances = [0, 0, 0, 0x3000, 0x200000, pick.randrange(1 << 12) << 12]
    for top in range(2):
        tables = {}
        for index in range(pick.randrange(1, 8)):
            base = (top << 30 | index << 21) & 0x3FFFFF
            if pick.random() < 0.25:
                tables[index] = large((base + 0x200000 * pick.randrange(3)) % 0x3800000)
                continue
            entries: dict[int, int] = {}
            number = 0
            while number < 512 and len(entries) < 400:
                number += pick.choice((1, 1, 2, 5, 40))
                distance = pick.choice(distances)
                for step in range(pick.choice((1, 1, 2, 3, 17))):
                    if number + step < 512:
                        gpa = (base + 0x1000 * (number + step) + distance) % 0x3F00000
                        flags = pick.choice((0, 0, 0, 0, 1 << 59, NO_EXECUTE, 0xE7E & ~0x80))
                        entries[number + step] = page(gpa, flags)
                number += 16 if pick.random() < 0.3 else 1
            tables[index] = page(image.table(entries))
        directories.append(image.table(tables))
    pointers = image.table(
        {pick.randrange(4): page(directories[0]), 4 + pick.randrange(4): page(directories[1])}
    )
    return image.table({pick.choice((0, 1, 256, 511)): page(pointers)})
