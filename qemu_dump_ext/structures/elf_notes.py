"""One note of an ELF core or a kdump after the other, encoded and parsed. Pure.

Source: System V gABI, "Note Section", with names and descriptors padded to 4 bytes in both classes,
as Linux and QEMU write them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.structures.c_struct import BoundStruct, ByteOrder
from qemu_dump_ext.structures.elf import NHDR, NT_PRSTATUS, elf_abi
from qemu_dump_ext.value import Value


class Note(Value):
    """One note.

    Attributes:
        name: Without its NUL; each letter is a byte.
        type: `NT_*`, whose meaning depends on the name.
        descriptor: Without padding.
        offset: The offset of the note's header, in bytes, counted as `parse_notes` was told.
        descriptor_offset: The offset of the descriptor, likewise.
    """

    name: str
    type: int
    descriptor: bytes
    offset: int
    descriptor_offset: int

    @property
    def is_prstatus(self) -> bool:
        """Whether it carries the registers of one vCPU."""
        return self.name == "CORE" and self.type == NT_PRSTATUS


def _header(byte_order: ByteOrder) -> BoundStruct:
    return NHDR.bind(elf_abi(byte_order, 4))  # three 32-bit words in every class


def encode_note(name: str, note_type: int, descriptor: bytes, byte_order: ByteOrder) -> bytes:
    """Encode one note, name and descriptor padded."""
    owner = name.encode("latin-1") + b"\0"
    header = _header(byte_order).pack(
        n_namesz=len(owner), n_descsz=len(descriptor), n_type=note_type
    )
    return header + _padded(owner) + _padded(descriptor)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def parse_notes(data: bytes, byte_order: ByteOrder, offset: int = 0) -> Iterator[Note]:
    """Yield the notes in `data`, which lies at `offset` of something.

    Raises:
        CorruptDumpError: A note reaches beyond the end.
    """
    header = _header(byte_order)
    position = 0
    while position < len(data):
        if position + header.size > len(data):
            raise CorruptDumpError(f"note header at offset {offset + position:#x} is cut off")
        name_size, descriptor_size, note_type = header.codec.unpack_from(data, position)
        name_start = position + header.size
        start = name_start + name_size + -name_size % 4
        end = start + descriptor_size
        if end > len(data):
            raise CorruptDumpError(
                f"note at offset {offset + position:#x} of {name_size} + {descriptor_size} bytes"
                f" reaches beyond the notes' end at {offset + len(data):#x}"
            )
        name = bytes(data[name_start : name_start + name_size]).rstrip(b"\0")
        yield Note(
            name.decode("latin-1"),
            note_type,
            bytes(data[start:end]),
            offset + position,
            offset + start,
        )
        position = end + -end % 4


def whole_notes(data: bytes, byte_order: ByteOrder) -> list[Note]:
    """Return the notes in `data` before the first that reaches beyond its end."""
    notes: list[Note] = []
    with suppress(CorruptDumpError):
        notes.extend(parse_notes(data, byte_order))
    return notes
