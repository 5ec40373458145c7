"""Read RAM that has no headers: a memory backend's file, what `pmemsave` writes, a raw image.

Nothing in its first bytes tells what it is. Who opens it says where the memory lies; or the kernel
in it does, see `_ram_by_kernel`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from qemu_dump_ext.architectures import MachineRam, all_architectures
from qemu_dump_ext.dump_readers._declaration import LISTED_MAX, DumpReader, Fit
from qemu_dump_ext.dump_readers._extent_dump import ExtentDump
from qemu_dump_ext.dump_readers._extent_index import ExtentIndex
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.dump_readers._ram_by_kernel import FileRange, find_layout
from qemu_dump_ext.dump_readers._range_headers import verify_memory
from qemu_dump_ext.errors import NotADumpError, RequestError
from qemu_dump_ext.untrusted import parse_unsigned

_SEARCH_SECONDS = 4.0
_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_NUMBER = re.compile("(0x[0-9a-fA-F]{1,16}|[0-9]{1,20})([KMGT]?)")
_ADDRESS_END = 1 << 64

Windows = Sequence[tuple[int, int, int]]
"""gpa, offset in the file, size."""


class RawFile(ExtentDump):
    """An open file of RAM.

    Attributes:
        windows: Where it lies: gpa, offset in the file, size.
        told_by: What tells that.
    """

    page_size = 1

    def __init__(
        self, image: DumpImage, windows: Windows, header: Mapping[str, int | str], told_by: str
    ) -> None:
        self.image = image
        self.format = self.reader = "raw"
        self.byte_order, self.word_size = "little", 8
        self.header = MappingProxyType(dict(header))
        self.windows, self.told_by = windows, told_by
        self.index = ExtentIndex()
        for gpa, offset, size in windows:
            self.index.append(gpa, size, offset)
        self.index.settle()


def open_by_kernel(image: DumpImage, _suffix: str = "") -> RawFile:
    """Open RAM of which the kernel in it tells where it lies.

    Raises:
        NotADumpError: No kernel does.
    """
    found = find_layout(image, FileRange(0, image.size), _SEARCH_SECONDS) if image.size else None
    if found is None:
        raise NotADumpError("no kernel in it tells where its memory lies")
    machine = f" of machine {found.machine.rstrip('-')}" if found.machine else ""
    told_by = f"the page tables of the kernel, as RAM{machine} of {found.architecture.name} lies"
    header = {"machine": found.core.uname_machine}
    dump = RawFile(image, found.windows, header, told_by)
    dump.byte_order, dump.word_size = found.core.byte_order, found.core.word_size
    return dump


def open_by_layout(image: DumpImage, layout: str) -> RawFile:
    """Open RAM of which the user says where it lies, as `parse_layout` takes it."""
    windows = parse_layout(layout, image.size)
    return RawFile(image, windows, {}, "the layout that was given")


def parse_layout(layout: str, size: int) -> Windows:
    """Return where RAM lies.

    Args:
        layout: A machine such as `q35`, or `aarch64/virt` where several targets have one; or
            `GPA:SIZE[@OFFSET],...`, without OFFSET one behind the other in the file.
        size: Of the file, in bytes.

    Raises:
        RequestError: It says nothing that is possible.
    """
    if ":" not in layout:
        return _machine_windows(layout, size)
    windows = []
    position = 0
    for word in layout.split(","):
        gpa_text, _, rest = word.partition(":")
        size_text, at, offset_text = rest.partition("@")
        gpa, length = _number(gpa_text), _number(size_text)
        offset = _number(offset_text) if at else position
        if not length or gpa + length > _ADDRESS_END:
            raise RequestError(f"--layout: {word!r} is no range of memory")
        if offset + length > size:
            raise RequestError(
                f"--layout: {word!r} ends at offset {offset + length:#x}, the file at {size:#x}"
            )
        windows.append((gpa, offset, length))
        position = offset + length
    windows.sort()
    for (first, _, length), (start, _, _) in pairwise(windows):
        if first + length > start:
            raise RequestError(f"--layout: two ranges have the address {start:#x}")
    return windows


def _machine_windows(name: str, size: int) -> Windows:
    target, slash, machine = name.rpartition("/")
    known: dict[str, list[MachineRam]] = {
        f"{architecture.name}/{word}": [one for one in architecture.machines if word in one.names]
        for architecture in all_architectures().values()
        for one in architecture.machines
        for word in one.names
        if target in {"", architecture.name}
    }
    found = {
        full_name: one.windows_of(size)
        for full_name, machines in known.items()
        if full_name.rpartition("/")[2] == machine
        for one in [next((one for one in machines if size >= one.size_min), machines[-1])]
    }
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    if found:
        raise RequestError(
            f"--layout: {name!r} is a machine of several targets", hint=f"one of {', '.join(found)}"
        )
    raise RequestError(
        f"--layout: no machine {name!r}" + (f" of {target}" if slash else ""),
        hint=f"GPA:SIZE[@OFFSET],... or one of {', '.join(sorted(known))}",
    )


def _number(word: str) -> int:
    found = _NUMBER.fullmatch(word)
    value = None
    if found:
        value = parse_unsigned(found[1], 16 if found[1][:2] == "0x" else 10)
    if found is None or value is None or value << _SHIFTS[found[2]] >= _ADDRESS_END:
        raise RequestError(
            f"--layout: {word!r} is no number", hint="0x80000000, 2147483648, 2048M and 2G are"
        )
    return value << _SHIFTS[found[2]]


def _describe(dump: RawFile) -> Mapping[str, Callable[[], Any]]:
    return {
        "layout": lambda: dump.told_by,
        "windows": lambda: [
            {"gpa": gpa, "offset": offset, "size": size}
            for gpa, offset, size in dump.windows[:LISTED_MAX]
        ],
    }


READER = DumpReader(
    name="raw",
    probe=lambda _head: Fit.NO,  # what is of no other format is looked at by its kernel
    open=open_by_kernel,
    describe=_describe,
    verify=verify_memory,
)
