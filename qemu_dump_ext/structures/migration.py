"""QEMU's migration stream: RAM blocks, their pages, and what each device says of itself.

A stream begins with the machine's type, then comes RAM, page by page, and then each device as a
section whose fields a JSON text behind all of them describes. It is read from the front to the
end once, as it may come from a pipe; whoever takes the pages keeps what he wants of them.

Everything in it is untrusted: sizes and counts are bounded, a section that is not known is refused
by its name.

Source: QEMU migration/savevm.c, migration/ram.c, migration/vmstate.c, hw/ppc/spapr.c
htab_save_iterate(), hw/s390x/s390-stattrib.c cmma_save(), docs/devel/migration/mapped-ram.rst.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.printable import printable
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.value import Value

MIGRATION_MAGIC = b"QEVM"
_VERSION = 3
_EOF, _START, _PART, _END, _FULL = range(5)
_SUBSECTION, _DESCRIPTION, _CONFIGURATION, _COMMAND, _FOOTER = 5, 6, 7, 8, 0x7E
_SECTION_BEGINS = frozenset((_START, _FULL, _COMMAND))

_RAM_ZERO, _RAM_MEM_SIZE, _RAM_PAGE, _RAM_EOS, _RAM_CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
_RAM_FLUSH = 0x200
"""Where maps tell where pages are: that other threads have written theirs."""
_MAP_HEADER = struct.Struct(">IQQQ")
_MAP_VERSION = 1
_REFUSED_PAGES: Mapping[int, str] = {
    0x01: "of a version of QEMU before 1.0",
    0x40: "packed by xbzrle, which only the receiver of a migration can unpack",
    0x80: "sent by RDMA",
    0x100: "packed by the capability compress",
    0x200: "sent through other channels, by multifd",
}
_USUAL_PAGE_SIZE = 4096
_PAGE_BITS = range(10, 17)

_BUFFER_SIZE = 1 << 20
_NAME_MAX = 1024
_BLOCKS_MAX = 4096
_RAM_MAX = 1 << 56
_SECTIONS_MAX = 1 << 16
_EARLY_SIZE_MAX = 8 << 20
"""Bytes of a device that comes before RAM: one bit for each block of a virtio-mem device."""
_TAIL_SIZE_MAX = 128 << 20
"""Bytes of all devices: some have the pictures of a screen in them."""
_DESCRIPTION_SIZE_MAX = 12 << 20
"""Bytes of JSON, which take 30 times the memory; a PC has 50 KB, and 12 KB for each vCPU more."""
_DEVICE_FIELDS_MAX = 1 << 16
_STEPS_MAX = 1 << 23
"""Fields, and elements of arrays, that are looked at in all devices; a vCPU has 1000 at most."""
_DEPTH_MAX = 16
_HTAB_ENTRY_SIZE = 16
_ATTRIBUTES_EOS, _ATTRIBUTES_MORE, _ATTRIBUTES_DONE = 0x01, 0x02, 0x08
_U32_MAX = (1 << 32) - 1


class StreamBlock(Value):
    """A RAM block, by QEMU's own name of it.

    Attributes:
        name: Such as `pc.ram`.
        size: In bytes.
    """

    name: str
    size: int


class PageMap(Value):
    """Which pages of a RAM block a file has, each at its own place, by the capability mapped-ram.

    Attributes:
        block: Number of the RAM block.
        place: Offset in the stream of the page that is the block's first.
        size: Of the block, in bytes.
        page_size: In bytes.
        bitmap_place: Offset in the stream of a bit for each page that is there, from the lowest of
            each byte on; others are zero.
    """

    block: int
    place: int
    size: int
    page_size: int
    bitmap_place: int

    @property
    def bitmap_size(self) -> int:
        """In bytes: of whole words of 64 bits."""
        return -(-self.size // self.page_size // 64) * 8


class PageTaker(Protocol):
    """Gets the pages of a stream, in its order, which is any; a page may come again."""

    def begin(self, blocks: Sequence[StreamBlock], page_size: int) -> None:
        """Know all RAM blocks; comes first."""

    def page(self, block: int, offset: int, data: memoryview, place: int) -> None:
        """Take a page.

        Args:
            block: Number of the RAM block.
            offset: In it, in bytes, within its size.
            data: Of one page; only valid until this returns.
            place: Offset in the stream.
        """

    def fill(self, block: int, offset: int, byte: int) -> None:
        """Take a page that is one byte over and over, nearly always 0."""


class StreamBuffer:
    """Bytes that come one after the other, from wherever.

    Attributes:
        position: Where the next byte is in what the stream is in.
    """

    def __init__(
        self,
        fill: Callable[[memoryview], int],
        skip: Callable[[int], None] | None = None,
        position: int = 0,
    ) -> None:
        """Use a source.

        Args:
            fill: Puts bytes into a buffer and returns how many; 0 at the end.
            skip: Leaves out so many bytes, also beyond the end; None: it cannot.
            position: Of the first byte.
        """
        self._fill = fill
        self._skip = skip
        self.position = position
        self._view = memoryview(bytearray(_BUFFER_SIZE))
        self._start = self._end = 0

    def take(self, size: int) -> memoryview:
        """Return the next bytes; only valid until more is taken.

        Raises:
            CorruptDumpError: The stream ends before.
        """
        start, stop = self._start, self._start + size
        if stop > self._end:
            self._more(size)
            start, stop = 0, size
        self._start = stop
        self.position += size
        return self._view[start:stop]

    @property
    def can_skip(self) -> bool:
        """Whether bytes can be left out without reading them."""
        return self._skip is not None

    def skip(self, size: int) -> None:
        """Leave out the next bytes, which need not be there."""
        inside = min(size, self._end - self._start)
        self._start += inside
        self.position += size
        if self._skip is not None:
            self._skip(size - inside)

    def peek(self) -> int | None:
        """Return the next byte, which stays; None at the end."""
        if self._start == self._end:
            try:
                self._more(1)
            except CorruptDumpError:
                return None
        return self._view[self._start]

    def rest(self, most: int) -> bytearray:
        """Return all that is left.

        Raises:
            CorruptDumpError: It is more than `most` bytes.
        """
        data = bytearray()
        while len(data) <= most and self.peek() is not None:
            data += self.take(self._end - self._start)
        if len(data) > most:
            raise CorruptDumpError(f"the devices in the stream have more than {most >> 20} MiB")
        return data

    def _more(self, size: int) -> None:
        left = self._end - self._start
        self._view[:left] = bytes(self._view[self._start : self._end])
        self._start, self._end = 0, left
        while self._end < size:
            count = self._fill(self._view[self._end :])
            if not count:
                raise CorruptDumpError(
                    f"the stream ends at offset {self.position + self._end:#x}, in the middle"
                )
            self._end += count


class DeviceFields:
    """The state of one device, by QEMU's names of its fields.

    A field of a struct has the name of the struct and a dot before it, one of a subsection the
    subsection's and a slash: `env.eip`, `env.regs[3]`, `env.segs[1].base`,
    `cpu/vfp/env.vfp.zregs[0].d[1]`.
    """

    def __init__(self, arrays: Mapping[str, tuple[memoryview, int]]) -> None:
        # Of each, its bytes, and how many one element has.
        self._arrays = arrays

    def has_part(self, beginning: str) -> bool:
        """Tell whether there is a field whose name begins so."""
        return any(name.startswith(beginning) for name in self._arrays)

    def __contains__(self, name: str) -> bool:
        return self.data(name) is not None

    def data(self, name: str) -> bytes | None:
        """Return the bytes of a field or of an element of an array; None where there is none."""
        if name in self._arrays:
            return bytes(self._arrays[name][0])
        array, _, index = name.removesuffix("]").rpartition("[")
        if array not in self._arrays or not index.isdecimal():
            return None
        data, size = self._arrays[array]
        element = data[int(index) * size :][:size]
        return bytes(element) if len(element) == size else None

    def integer(self, name: str, byte_order: ByteOrder = "big") -> int | None:
        """Return a field as an unsigned number; None where there is none."""
        data = self.data(name)
        return None if data is None else int.from_bytes(data, byte_order)

    def integers(self, name: str) -> Sequence[int]:
        """Return the elements of an array of numbers; empty where there is none."""
        if name not in self._arrays:
            return ()
        data, size = self._arrays[name]
        return [
            int.from_bytes(data[start : start + size], "big") for start in range(0, len(data), size)
        ]


class StreamDevice(Value):
    """The section of one device.

    Attributes:
        name: Such as `cpu`, with the path of its bus before it where it is on one.
        instance: Number among those of the same name.
        data: What it said.
        description: Of its fields, as JSON; None where it does not fit.
        steps: Is spent on reading descriptions: what is left for all devices of the stream.
    """

    name: str
    instance: int
    data: memoryview
    description: Mapping[str, Any] | None
    steps: Iterator[int] = field(repr=False, compare=False)

    @cached_property
    def fields(self) -> DeviceFields:
        """Its state.

        Raises:
            CorruptDumpError: Description and data do not fit together.
        """
        if self.description is None:
            raise CorruptDumpError(f"device {self.name!r} is not as it is described")
        arrays: dict[str, tuple[memoryview, int]] = {}
        for name, data, size in _decode(self.description, self.data, "", _DEPTH_MAX, self.steps):
            if len(arrays) >= _DEVICE_FIELDS_MAX:
                raise CorruptDumpError(f"device {self.name!r} has too many fields")
            arrays.setdefault(name, (data, size))
        return DeviceFields(arrays)


@dataclass
class MigrationStream:
    """What a stream tells, as far as it goes.

    Attributes:
        machine: Type of the machine, such as `pc-q35-7.2`; empty where it is not told.
        page_size: Of the target, in bytes.
        blocks: The RAM blocks.
        devices: In the order of the stream; empty where it does not describe them.
        capabilities: Of the migration that are told.
        maps: Of a stream whose pages are at their places: of each RAM block; its pages were not
            taken.
        problem: Why it was not read to its end; None: it was.
        undescribed: Why there are no devices, or None.
    """

    machine: str = ""
    page_size: int = _USUAL_PAGE_SIZE
    blocks: Sequence[StreamBlock] = ()
    devices: Sequence[StreamDevice] = ()
    capabilities: Sequence[str] = ()
    maps: Sequence[PageMap] = ()
    problem: CorruptDumpError | None = None
    undescribed: str | None = None

    def find(self, name: str) -> Sequence[StreamDevice]:
        """Return the devices of a name, also those of it on a bus."""
        return [one for one in self.devices if one.name.rpartition("/")[2] == name]


def parse_stream(
    source: StreamBuffer, pages: PageTaker, page_size: int | None = None
) -> MigrationStream:
    """Read a stream from its beginning to its end.

    Args:
        source: Of the stream.
        pages: Gets the pages.
        page_size: Of the target, in bytes, where it is known otherwise: not every stream tells.

    Raises:
        CorruptDumpError: It is none, or is damaged before the RAM blocks are known. What comes
            later is told by `MigrationStream.problem`.
    """
    parser = _Parser(source, pages, page_size)
    try:
        parser.read()
    except CorruptDumpError as error:
        if not parser.stream.blocks:
            raise
        parser.stream.problem = error
    return parser.stream


class _Parser:
    def __init__(self, source: StreamBuffer, pages: PageTaker, page_size: int | None) -> None:
        self._source = source
        self._pages = pages
        self.stream = MigrationStream(page_size=page_size or _USUAL_PAGE_SIZE)
        self._sections: dict[int, str] = {}
        self._early: list[_Section] = []
        self._has_footers = False  # as machines of QEMU before 2.4
        self._current = -1  # the RAM block of the last page
        self._handlers: Mapping[str, Callable[[], None]] = {
            "ram": self._read_ram,
            "spapr/htab": self._read_htab,
            "s390-storage_attributes": self._read_storage_attributes,
        }

    def read(self) -> None:
        source = self._source
        if bytes(source.take(4)) != MIGRATION_MAGIC:
            raise CorruptDumpError("it does not begin like a migration stream")
        version = self._u32()
        if version != _VERSION:
            raise CorruptDumpError(f"migration stream of version {version}, not {_VERSION}")
        while (kind := source.peek()) != _FULL or not self.stream.blocks:
            source.take(1)
            if kind == _CONFIGURATION:
                self._read_configuration()
            elif kind in {_START, _PART, _END}:
                self._read_iterated(begins=kind == _START)
            elif kind == _FULL:
                self._read_early()
            elif kind == _COMMAND:
                self._u16()
                source.take(self._u16())
            elif kind == _EOF and self.stream.blocks:
                break
            else:
                raise self._error(f"section of type {kind}")
        self._read_devices()

    def _read_devices(self) -> None:
        tail = self._source.rest(_TAIL_SIZE_MAX)
        description = find_description(tail)
        if description is None:
            self.stream.undescribed = "the stream does not describe its devices (suppress-vmdesc)"
            return
        entries = _described(description)
        self.stream.devices = _match_sections(
            entries, self._early, tail, has_footers=self._has_footers
        )

    def _read_configuration(self) -> None:
        size = self._u32()
        self.stream.machine = self._text(size)
        while self._source.peek() == _SUBSECTION:
            self._source.take(1)
            name = self._name()
            self._u32()
            if name == "configuration/target-page-bits":
                bits = self._u32()
                if bits not in _PAGE_BITS:
                    raise self._error(f"pages of {bits} bits")
                self.stream.page_size = 1 << bits
            elif name == "configuration/capabilities":
                self.stream.capabilities = [self._name() for _ in range(self._count(_NAME_MAX))]
            elif name == "configuration/uuid":
                self._source.take(16)
            else:
                raise self._error(f"unknown part {name!r}")

    def _read_iterated(self, *, begins: bool) -> None:
        number = self._u32()
        if begins:
            name = self._name()
            self._source.take(8)  # instance and version
            if len(self._sections) >= _SECTIONS_MAX:
                raise self._error("too many sections")
            self._sections[number] = name
        found = self._sections.get(number)
        if found is None:
            raise self._error(f"section {number}, which never began")
        if found not in self._handlers:
            raise self._error(f"section {found!r}, of which the length is not told, is not read")
        self._handlers[found]()
        self._skip_footer(number)

    def _skip_footer(self, number: int) -> None:
        if self._source.peek() == _FOOTER:
            self._source.take(1)
            self._has_footers = True
            if self._u32() != number:
                raise self._error(f"section {number} ends as another one")

    def _read_early(self) -> None:
        """Read a device before RAM: how long it is, its footer alone tells by now."""
        number, name = self._u32(), self._name()
        instance, _ = self._u32(), self._u32()
        if len(self._early) >= _SECTIONS_MAX:
            raise self._error("too many sections")
        footer = bytes((_FOOTER, *number.to_bytes(4, "big")))
        data = bytearray()
        while not (data.endswith(footer) and self._source.peek() in _SECTION_BEGINS):
            data += self._source.take(1)
            if len(data) > _EARLY_SIZE_MAX:
                raise self._error(f"section {name!r} has no end")
        self._early.append(_Section(name, instance, memoryview(bytes(data[: -len(footer)]))))

    def _read_ram(self) -> None:
        take, pages, blocks = self._source.take, self._pages, self.stream.blocks
        page_size = self.stream.page_size
        mask = page_size - 1
        unpack = struct.Struct(">Q").unpack
        names = {block.name: number for number, block in enumerate(blocks)}
        current = self._current
        size = blocks[current].size if current >= 0 else 0
        is_mapped = bool(self.stream.maps)
        while True:
            (word,) = unpack(take(8))
            flags, offset = word & mask, word & ~mask
            if flags & _RAM_EOS:
                return
            if flags & _RAM_MEM_SIZE:
                self._read_blocks(offset)
                is_mapped = bool(self.stream.maps)
                blocks = self.stream.blocks
                names = {block.name: number for number, block in enumerate(blocks)}
                continue
            if is_mapped and flags == _RAM_FLUSH:
                continue
            if not flags & _RAM_CONTINUE:
                current = self._current = names.get(self._name(), -1)
                size = blocks[current].size if current >= 0 else 0
            if offset >= size:
                raise self._error(f"a page at {offset:#x} of a RAM block of {size:#x} bytes")
            kind = flags & ~_RAM_CONTINUE
            if kind == _RAM_PAGE:
                place = self._source.position
                pages.page(current, offset, take(page_size)[: size - offset], place)
            elif kind == _RAM_ZERO:
                pages.fill(current, offset, take(1)[0])
            else:
                raise self._error(f"pages {_pages_of_kind(kind)} are not read")

    def _read_blocks(self, total: int) -> None:
        if self.stream.blocks or not 0 < total < _RAM_MAX:
            raise self._error(f"RAM blocks of {total:#x} bytes")
        if "x-ignore-shared" in self.stream.capabilities:
            # Which blocks are shared is not told: their pages would be taken for zeros.
            raise self._error("shared memory is not in it, by the capability x-ignore-shared")
        is_mapped = "mapped-ram" in self.stream.capabilities
        maps: list[PageMap] = []
        blocks: list[StreamBlock] = []
        left = total
        while left:
            name, size = self._name(), self._u64()
            if not 0 < size <= left or len(blocks) >= _BLOCKS_MAX:
                raise self._error(f"RAM block {name!r} of {size:#x} bytes")
            left -= size
            blocks.append(StreamBlock(name, size))
            if is_mapped:
                maps.append(self._read_map(len(maps), size))
        self._pages.begin(blocks, self.stream.page_size)
        self.stream.blocks = blocks
        self.stream.maps = maps

    def _read_map(self, block: int, size: int) -> PageMap:
        """Read which pages of a block the file has, and leave out the pages."""
        if not self._source.can_skip:
            raise self._error("pages by the capability mapped-ram, which need a file")
        version, page_size, bitmap_place, pages_place = _MAP_HEADER.unpack(
            self._source.take(_MAP_HEADER.size)
        )
        if (version, page_size) != (_MAP_VERSION, self.stream.page_size):
            raise self._error(f"a map of pages of version {version}, of {page_size:#x} bytes each")
        pages = PageMap(block, pages_place, size, page_size, bitmap_place)
        self._skip_to(bitmap_place)
        self._source.skip(pages.bitmap_size)
        self._skip_to(pages_place)
        self._source.skip(size)
        return pages

    def _skip_to(self, place: int) -> None:
        if not self._source.position <= place < _RAM_MAX:
            raise self._error(f"a map of pages that tells of offset {place:#x}")
        self._source.skip(place - self._source.position)

    def _read_htab(self) -> None:
        """Skip the hash page table of a pseries guest."""
        head = self._u32()
        if head in {0, _U32_MAX}:
            while not head:
                self._u32()
                valid, invalid = self._u16(), self._u16()
                if not valid and not invalid:
                    break
                for _ in range(valid):
                    self._source.take(_HTAB_ENTRY_SIZE)

    def _read_storage_attributes(self) -> None:
        """Skip what an s390x guest has told about its pages."""
        while not (flags := self._u64()) & _ATTRIBUTES_EOS:
            if flags & _ATTRIBUTES_MORE:
                for _ in range(self._u64()):
                    self._source.take(1)
            elif not flags & _ATTRIBUTES_DONE:
                raise self._error(f"storage attributes with flags {flags:#x}")

    def _u16(self) -> int:
        return int.from_bytes(self._source.take(2), "big")

    def _u32(self) -> int:
        return int.from_bytes(self._source.take(4), "big")

    def _u64(self) -> int:
        return int.from_bytes(self._source.take(8), "big")

    def _count(self, most: int) -> int:
        count = self._u32()
        if count > most:
            raise self._error(f"a count of {count}")
        return count

    def _name(self) -> str:
        return self._text(self._source.take(1)[0])

    def _text(self, size: int) -> str:
        if not 0 < size <= _NAME_MAX:
            raise self._error(f"a name of {size} bytes")
        return _printable(self._source.take(size))

    def _error(self, what: str) -> CorruptDumpError:
        return CorruptDumpError(
            f"migration stream, before offset {self._source.position:#x}: {what}"
        )


def _printable(data: memoryview) -> str:
    return printable(bytes(data).decode("utf-8", "backslashreplace"))


def _pages_of_kind(kind: int) -> str:
    return next(
        (words for bit, words in _REFUSED_PAGES.items() if kind & bit), f"of kind {kind:#x}"
    )


class _Section(Value):
    name: str
    instance: int
    data: memoryview = field(repr=False)


def find_description(tail: bytes | bytearray) -> Mapping[str, Any] | None:
    """Return the description of all devices that ends a stream, or None where there is none.

    Args:
        tail: The end of the stream, from within what comes before the description.

    Raises:
        CorruptDumpError: There is one, and it is damaged.
    """
    for found in re.finditer(rb"\x06(.{4})(?=\{)", tail, re.DOTALL):
        size = int.from_bytes(found[1], "big")
        if size == len(tail) - found.end():
            return _parse_description(tail[found.end() :])
    return None


def _parse_description(text: bytes | bytearray) -> Mapping[str, Any]:
    if len(text) > _DESCRIPTION_SIZE_MAX:
        raise CorruptDumpError(f"description of the devices of {len(text):#x} bytes: too large")
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptDumpError("the description of the devices is no JSON") from error
    if not isinstance(description, dict):
        raise CorruptDumpError("the description of the devices is no object")
    return description


def _described(description: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    devices = description.get("devices")
    if not isinstance(devices, list) or len(devices) > _SECTIONS_MAX:
        raise CorruptDumpError("the description of the devices has no list of them")
    return [_object(device) for device in devices]


def _match_sections(
    entries: Sequence[Mapping[str, Any]],
    early: Sequence[_Section],
    tail: bytes | bytearray,
    *,
    has_footers: bool,
) -> Sequence[StreamDevice]:
    """Cut the end of a stream into its devices."""
    devices: list[StreamDevice] = []
    steps = iter(range(_STEPS_MAX))
    position = 0
    for number, entry in enumerate(entries):
        if number < len(early):
            section = early[number]
        else:
            following = entries[number + 1] if number + 1 < len(entries) else None
            section, position = _section_at(
                tail, position, entry, following, has_footers=has_footers
            )
        told = entry.get("name"), entry.get("instance_id")
        if (section.name, section.instance) != told:
            raise CorruptDumpError(
                f"device {section.name!r} is not the one that is described: {told[0]!r:.80}"
            )
        fits = len(section.data) == _size_of(entry, _DEPTH_MAX)
        description = entry if fits else None
        devices.append(
            StreamDevice(section.name, section.instance, section.data, description, steps)
        )
    return devices


def _section_at(
    tail: bytes | bytearray,
    position: int,
    entry: Mapping[str, Any],
    following: Mapping[str, Any] | None,
    *,
    has_footers: bool,
) -> tuple[_Section, int]:
    """Return the section at a position, and where the next one begins."""
    name_start = position + 6
    name_end = name_start + (tail[name_start - 1] if name_start <= len(tail) else 0)
    start = name_end + 8
    end = start + _size_of(entry, _DEPTH_MAX)
    if start > len(tail) or tail[position] != _FULL:
        raise CorruptDumpError("a device is described that the stream does not have")
    if has_footers:
        footer = bytes((_FOOTER, *tail[position + 1 : position + 5]))
        if tail[end : end + len(footer)] != footer:
            # Arrays with empty places are described wrongly before QEMU 10.
            found = re.compile(re.escape(footer) + _beginning(following), re.DOTALL).search(
                tail, start
            )
            if found is None:
                raise CorruptDumpError(f"device {entry.get('name')!r:.80} is not as described")
            end = found.start()
        behind = end + len(footer)
    else:
        behind = end
    instance = int.from_bytes(tail[name_end : name_end + 4], "big")
    name = _printable(memoryview(tail)[name_start:name_end])
    return _Section(name, instance, memoryview(tail)[start:end]), behind


def _beginning(entry: Mapping[str, Any] | None) -> bytes:
    """Return the pattern of how a section begins, or of what is behind the last one."""
    if entry is None:
        return b"\x00"
    name = str(entry.get("name")).encode("utf-8", "replace")
    return b"\x04.{4}" + re.escape(bytes((len(name) & 0xFF,)) + name)


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise CorruptDumpError("the description of the devices is not well-formed")
    return value


def _objects(value: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(value, list):
        raise CorruptDumpError("the description of the devices is not well-formed")
    return [_object(one) for one in value]


def _number(entry: Mapping[str, Any], key: str, default: int) -> int:
    value = entry.get(key, default)
    if not isinstance(value, int) or not 0 <= value <= _TAIL_SIZE_MAX:
        raise CorruptDumpError(f"the description of the devices has {key} {value!r:.40}")
    return value


def _subsection_head(entry: Mapping[str, Any]) -> int:
    """Return how many bytes stand before the fields of a subsection."""
    name = entry.get("vmsd_name")
    if not isinstance(name, str):
        raise CorruptDumpError("the description of the devices has a part without a name")
    return 6 + len(name.encode())


def _size_of(entry: Mapping[str, Any], depth: int) -> int:
    """Return how many bytes fields and subsections have; those of a struct are in its size."""
    if not depth:
        raise CorruptDumpError("the description of the devices is nested too deep")
    size = sum(
        _number(one, "size", 0) * _number(one, "array_len", 1)
        for one in _objects(entry.get("fields", []))
    )
    return size + sum(
        _subsection_head(one) + _size_of(one, depth - 1)
        for one in _objects(entry.get("subsections", []))
    )


def _decode(
    entry: Mapping[str, Any], data: memoryview, prefix: str, depth: int, steps: Iterator[int]
) -> Iterator[tuple[str, memoryview, int]]:
    """Yield the name, the bytes, and the size of one element, of each field."""
    if not depth or len(prefix) > _NAME_MAX:
        raise CorruptDumpError("the description of the devices is nested too deep")
    position = 0
    for one in _objects(entry.get("fields", [])):
        _take(steps)
        size, count = _number(one, "size", 0), _number(one, "array_len", 1)
        index = f"[{_number(one, 'index', 0)}]" if "index" in one else ""
        name = f"{prefix}{one.get('name')}{index}"
        if len(name) > _NAME_MAX:
            raise CorruptDumpError(f"the field {name!r:.80} has a name of {len(name)} letters")
        part = data[position : position + size * count]
        position += size * count
        if len(part) < size * count:
            raise CorruptDumpError(f"the field {name!r:.80} is longer than the device")
        if not size:
            continue
        if "struct" not in one:
            yield name, part, size
            continue
        for number in range(count):
            _take(steps)
            element = part[number * size :][:size]
            inner = f"{name}[{number}]." if "array_len" in one else f"{name}."
            yield from _decode(_object(one["struct"]), element, inner, depth - 1, steps)
    for one in _objects(entry.get("subsections", [])):
        _take(steps)
        position += _subsection_head(one)
        size = _size_of(one, depth - 1)
        inner = f"{prefix}{one['vmsd_name']}/"
        yield from _decode(one, data[position : position + size], inner, depth - 1, steps)
        position += size


def _take(steps: Iterator[int]) -> None:
    if next(steps, None) is None:
        raise CorruptDumpError("the description of the devices has too many fields")
