"""Declare a C structure once, bind it to an ABI: byte order, word size and alignment.

One declaration serves 32 and 64 bit, both byte orders, and both alignments of 64-bit integers
(4 on i386 and in packed structures, 8 on Arm). Offsets are computed here and nowhere else.
"""

from __future__ import annotations

import struct
from functools import cached_property
from typing import Literal

from qemu_dump_ext.value import Value

U32_MAX = (1 << 32) - 1
U64_MAX = (1 << 64) - 1
ByteOrder = Literal["little", "big"]

_INTEGER_SIZES = {"u8": 1, "u16": 2, "u32": 4, "s32": 4, "u64": 8, "s64": 8}
_SIGNED = frozenset(("s32", "s64"))
_COUNTED = frozenset(("bytes", "wide", "wide_le"))
_UNSIGNED_CODE = {1: "B", 2: "H", 4: "I", 8: "Q"}


class Abi(Value):
    """How a compiler lays out structures.

    Attributes:
        byte_order: The byte order of every integer.
        word_size: Size of `long` and of pointers in bytes, 4 or 8.
        max_align: Largest alignment that a member is given, in bytes; 1 means packed.
    """

    byte_order: ByteOrder
    word_size: int
    max_align: int


class Field(Value):
    """One member.

    Attributes:
        name: Unique in its structure; the spelling of the header that declares it.
        kind: `u8` to `u64`, `s32`, `s64`, `ulong` (one word), `bytes`, or an unsigned integer of
            `count` bytes without alignment: `wide` in the byte order of the structure,
            `wide_le` always little-endian.
        count: For `bytes` and wide integers, the length; an array of integers is written as
            several fields.
    """

    name: str
    kind: str
    count: int = 1


class BoundStruct:
    """A structure with known offsets.

    Attributes:
        size: The size in bytes, tail padding included.
        offsets: Byte offset of each member.
        codec: `struct.Struct` over all members in order, for hot loops.
    """

    def __init__(self, layout: StructLayout, abi: Abi) -> None:
        self.name = layout.name
        self.byte_order = abi.byte_order
        code = "<" if abi.byte_order == "little" else ">"
        offset = 0
        struct_align = 1
        self.offsets: dict[str, int] = {}
        self._masks: dict[str, int] = {}
        self._wide: dict[str, tuple[int, ByteOrder]] = {}
        for field in layout.fields:
            if field.kind in _COUNTED:
                size, align, member = field.count, 1, f"{field.count}s"
                if field.kind != "bytes":
                    order = "little" if field.kind == "wide_le" else abi.byte_order
                    self._wide[field.name] = size, order
                    self._masks[field.name] = (1 << 8 * size) - 1
            else:
                size = abi.word_size if field.kind == "ulong" else _INTEGER_SIZES[field.kind]
                align = min(size, abi.max_align)
                letter = _UNSIGNED_CODE[size]
                member = letter.lower() if field.kind in _SIGNED else letter
                self._masks[field.name] = (1 << 8 * size) - 1
            padding = -offset % align
            offset += padding
            self.offsets[field.name] = offset
            code += f"{padding}x" * bool(padding) + member
            offset += size
            struct_align = max(struct_align, align)
        tail = -offset % struct_align
        self.codec = struct.Struct(code + f"{tail}x" * bool(tail))
        self.size = self.codec.size
        self._names = tuple(self.offsets)

    def pack(self, **values: int | bytes) -> bytes:
        """Encode; members that are not named become zero.

        Raises:
            TypeError: A name is not a member.
            struct.error: A value does not fit its member.
            OverflowError: A value does not fit its wide member.
        """
        unknown = values.keys() - self.offsets.keys()
        if unknown:
            raise TypeError(f"struct {self.name} has no member {', '.join(sorted(unknown))}")
        members: dict[str, int | bytes] = {
            name: 0 if name in self._masks else b"" for name in self._names
        }
        members |= values
        for name, (size, order) in self._wide.items():
            value = members[name]
            members[name] = value.to_bytes(size, order) if isinstance(value, int) else value
        return self.codec.pack(*members.values())

    def unpack(self, data: bytes | memoryview, offset: int = 0) -> dict[str, int | bytes]:
        """Decode at `offset`.

        Raises:
            struct.error: `data` is too short.
        """
        values = dict(zip(self._names, self.codec.unpack_from(data, offset), strict=True))
        for name, (_, order) in self._wide.items():
            values[name] = int.from_bytes(values[name], order)
        return values

    def unpack_integers(self, data: bytes | memoryview, offset: int = 0) -> dict[str, int]:
        """Decode the integer members only."""
        return {
            name: value
            for name, value in self.unpack(data, offset).items()
            if isinstance(value, int)
        }

    def truncate(self, name: str, value: int) -> int:
        """Cut a register value to the width of the (unsigned) member `name`."""
        return value & self._masks[name]


class StructLayout(Value):
    """A structure as its header declares it, independent of the ABI.

    Attributes:
        name: The name as in C.
        fields: The fields in order.
    """

    name: str
    fields: tuple[Field, ...]

    def bind(self, abi: Abi) -> BoundStruct:
        """Return the structure as laid out by `abi`."""
        structure = self._bound.get(abi)
        if structure is None:
            structure = self._bound[abi] = BoundStruct(self, abi)
        return structure

    @cached_property
    def _bound(self) -> dict[Abi, BoundStruct]:
        # Of each layout its own: to look one up would take a hash of all of its fields.
        return {}


def fields_of(kind: str, names: str) -> tuple[Field, ...]:
    """Declare consecutive members of one kind from a blank-separated list of names."""
    return tuple(Field(name, kind) for name in names.split())
