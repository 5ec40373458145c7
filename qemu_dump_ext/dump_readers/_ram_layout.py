"""How the RAM blocks of a migration stream lie in guest physical memory.

The stream does not tell. What is known of the machine says where they may be; the page tables that
the vCPUs use, and the kernel's own note, say whether that is so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from qemu_dump_ext.architectures import Architecture, MachineRam
from qemu_dump_ext.errors import UnsupportedTargetError
from qemu_dump_ext.structures.migration import MigrationStream, StreamBlock
from qemu_dump_ext.value import Value

_NO_MAIN_MEMORY = re.compile(
    r"/rom@|.*\.(?:rom|mrom|bios|prom|flash\d*|vram)$|.*vga|bios\.|pc\.bios|0000:|.*lmb_bram"
)
"""Names of RAM blocks that are a part of a board or of a card."""

_SCREEN = re.compile(r"vga.*vram$|vgavram$|vmsvga")
"""Names of RAM blocks of graphics cards that show a screen at the addresses of a VGA."""


class RamPiece(Value):
    """A range of guest physical memory, and where a RAM block has it.

    Attributes:
        gpa: First guest physical address.
        block: Number of the RAM block.
        offset: In it, in bytes.
        size: In bytes.
    """

    gpa: int
    block: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        """First guest physical address behind it."""
        return self.gpa + self.size


def possible_layouts(
    stream: MigrationStream, architecture: Architecture
) -> Sequence[tuple[RamPiece, ...]]:
    """Return how the RAM blocks of a stream may lie, the likely way first.

    Raises:
        UnsupportedTargetError: Nothing is known of the machine.
    """
    main = _main_memories(stream.blocks)
    layouts = [
        layout
        for numbers in main
        for machine in architecture.machines
        if stream.machine.startswith(machine.machine)
        and sum(stream.blocks[number].size for number in numbers) >= machine.size_min
        for layout in [_layout(stream.blocks, numbers, machine)]
    ]
    if not layouts:
        known = ", ".join(f"{one.machine.rstrip('-')}" for one in architecture.machines)
        raise UnsupportedTargetError(
            f"where a machine {stream.machine or 'of no name'} of {architecture.name} has its RAM"
            " is not known",
            hint=f"known: {', '.join(dict.fromkeys(known.split(', ')))}" if known else None,
        )
    return list(dict.fromkeys(layouts))


def _main_memories(blocks: Sequence[StreamBlock]) -> list[tuple[int, ...]]:
    """Return which blocks may be the machine's main memory; several are the memory of its nodes."""
    numbers = [
        number for number, block in enumerate(blocks) if not _NO_MAIN_MEMORY.match(block.name)
    ]
    by_name = tuple(sorted(numbers, key=lambda number: blocks[number].name))
    largest = max(numbers, key=lambda number: blocks[number].size, default=None)
    found: list[tuple[int, ...]] = [by_name] if len(by_name) > 1 else []
    return found if largest is None else [*found, (largest,)]


def _layout(
    blocks: Sequence[StreamBlock], main: tuple[int, ...], machine: MachineRam
) -> tuple[RamPiece, ...]:
    total = sum(blocks[number].size for number in main)
    pieces: list[RamPiece] = []
    for gpa, offset, size in machine.windows:
        end = total if size is None else min(offset + size, total)
        pieces += _parts(blocks, main, gpa, offset, end)
    if any(_SCREEN.search(block.name) for block in blocks):
        pieces = [part for piece in pieces for part in _around(piece, *machine.screen)]
    for number, block in enumerate(blocks):
        begin = machine.others.get(block.name)
        if block.name in machine.ends:
            begin = machine.ends[block.name] - block.size
        if begin is not None and begin >= 0:
            pieces.append(RamPiece(begin, number, 0, block.size))
    return tuple(sorted(pieces, key=lambda piece: piece.gpa))


def _around(piece: RamPiece, first: int, end: int) -> Iterator[RamPiece]:
    """Yield what of a piece is before and behind a range."""
    for low, high in ((piece.gpa, min(piece.end, first)), (max(piece.gpa, end), piece.end)):
        if low < high:
            yield RamPiece(low, piece.block, piece.offset + low - piece.gpa, high - low)


def _parts(
    blocks: Sequence[StreamBlock], main: tuple[int, ...], gpa: int, offset: int, end: int
) -> Iterator[RamPiece]:
    """Cut a range of the main memory into its blocks."""
    start = 0
    for number in main:
        low, high = max(offset, start), min(end, start + blocks[number].size)
        if low < high:
            yield RamPiece(gpa + low - offset, number, low - start, high - low)
        start += blocks[number].size
