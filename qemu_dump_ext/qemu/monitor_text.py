"""Parsers of HMP answers. Pure: text in, data out.

The answers come from QEMU, but names in them come from users and may hold anything: everything is
parsed from the side whose form is fixed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from qemu_dump_ext.errors import MonitorAnswerError
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.structures.dialect import QemuVersion
from qemu_dump_ext.untrusted import parse_unsigned

FLAT_VIEWS = "info mtree -f"
RUNNING = "running"
"""What `parse_status` returns for a guest that is not stopped."""

_STATUS = re.compile(
    r"^VM status: (?P<word>running|paused)(?: \(single step mode\))?"
    r"(?: \((?P<state>[a-z-]+)\))?\s*$",
    re.MULTILINE,
)
_MIGRATION = re.compile(r"^(?:Migration status|Status):\s*([a-z-]+)", re.MULTILINE)
_DUMP_STATUS = re.compile(r"^Status: ([a-z]+)", re.MULTILINE)
_FLAT_RANGE = re.compile(
    r"^  (?P<first>[0-9a-f]{16})-(?P<last>[0-9a-f]{16}) \(prio -?\d+, (?P<kind>[a-z/-]+)\):"
    r" ?(?P<name>.*)$"
)
_REGION_OFFSET = re.compile(r"^(?P<name>.*?)(?: @(?P<offset>[0-9a-f]{16}))?$")
_RAM_KINDS = frozenset(("ram", "rom", "nv-ram", "nv-rom"))
_FLASH_KINDS = frozenset(("romd", "i/o"))
_READABLE_KINDS = _RAM_KINDS | {"ramd", "romd"}
_ABSURD_NUMBER = re.compile(r"\b[0-9a-fA-F]{1025,}\b")
"""Of more bits than any register has that a monitor shows, which are 2048."""
_RAM_MAX = 1 << 52
"""As much memory as the widest physical addresses of a board reach, in bytes."""
_CPU_INDEX_BITS = 16
_NON_VOLATILE_BACKEND = re.compile(r"alias \S.*? @(?P<backend>\S+) ")
_MEMORY_SIZE = re.compile(r"^(?:base|plugged) memory: (\d{1,20})$", re.MULTILINE)


def parse_version(text: str) -> QemuVersion:
    """Parse `info version`: `7.2.22Debian 1:7.2+dfsg…` is (7, 2, 22)."""
    match = re.match(r"\s*(\d+)\.(\d+)\.(\d+)", text)
    groups = match.groups() if match else ()
    numbers = [number for group in groups if (number := parse_unsigned(group, bits=16)) is not None]
    if len(numbers) != 3:
        raise MonitorAnswerError("info version", text)
    major, minor, micro = numbers
    return major, minor, micro


def parse_status(text: str) -> str:
    """Parse `info status` into QMP's name of the run state.

    `running` and `running (single step mode)` are `running`; `paused` is a state of its own, and
    any other stands behind it, as in `paused (single step mode) (prelaunch)`.
    """
    match = _STATUS.search(text)
    if match is None:
        raise MonitorAnswerError("info status", text)
    return RUNNING if match["word"] == RUNNING else match["state"] or match["word"]


def parse_migration(text: str) -> str:
    """Parse `info migrate` into the status of the migration; `none` where it tells none."""
    match = _MIGRATION.search(text)
    return "none" if match is None else match[1]


def parse_dump_status(text: str) -> str:
    """Parse `info dump` into the status of QEMU's last dump; `none` where it tells none."""
    match = _DUMP_STATUS.search(text)
    return "none" if match is None else match[1]


def parse_flat_view(text: str) -> list[RamBlock]:
    """Parse `info mtree -f` into the blocks that `dump-guest-memory` includes.

    Ranges of the address space `memory` that are RAM or ROM, merged where they touch both in
    guest physical memory and inside one memory region. Flat views are numbered at random: the
    right one is found by the address space that shares it.

    Returns:
        Blocks by ascending gpa.

    Raises:
        MonitorAnswerError: No such flat view, or one that no memory has.

    Source:
        QEMU system/memory.c mtree_print_flatview(); system/memory_mapping.c
        guest_phys_block_add_section().
    """
    ranges = list(_flat_ranges(text))
    # A window to flash that only reads (the BIOS below 1 MiB, since QEMU 9.1) is shown as `rom`.
    flash = {_region(match)[0] for match in ranges if match["kind"] in _FLASH_KINDS}
    blocks: list[RamBlock] = []
    for match in ranges:
        if match["kind"] in _RAM_KINDS:
            name, offset = _region(match)
            if match["kind"] != "rom" or name not in flash:
                _add_range(blocks, match, name, offset)
    if (size := sum(block.size for block in blocks)) > _RAM_MAX:
        raise MonitorAnswerError(FLAT_VIEWS, f"{size:#x} bytes of memory are impossible")
    return blocks


def parse_readable_ranges(text: str) -> list[tuple[int, int]]:
    """Parse `info mtree -f` into what a page table may map as memory: RAM, ROM and flash.

    Returns:
        (first, end) of each range, ascending.

    Source:
        QEMU softmmu/physmem.c cpu_physical_memory_is_io().
    """
    return [
        (int(match["first"], 16), int(match["last"], 16) + 1)
        for match in _flat_ranges(text)
        if match["kind"] in _READABLE_KINDS
    ]


def _flat_ranges(text: str) -> Iterator[re.Match[str]]:
    """Yield the ranges of the flat view, which must ascend and not overlap."""
    in_view = found = False
    end = 0
    for line in text.splitlines():
        if line.startswith("FlatView #"):
            in_view = False
        elif line.startswith(' AS "memory",'):
            in_view = found = True
        elif in_view and (match := _FLAT_RANGE.match(line)):
            first, last = int(match["first"], 16), int(match["last"], 16)
            if not end <= first <= last:
                raise MonitorAnswerError(FLAT_VIEWS, f"impossible memory: {line.strip()}")
            end = last + 1
            yield match
    if not found:
        raise MonitorAnswerError(
            FLAT_VIEWS, text, hint="QEMU before 2.9 has no flat view of its memory"
        )


def _region(match: re.Match[str]) -> tuple[str, int]:
    # A range that KVM has mapped is followed by the accelerator's name, once per address space.
    named = _REGION_OFFSET.match(re.sub(r"( [A-Z]+)+$", "", match["name"]))
    name = named["name"] if named else match["name"]
    offset = int(named["offset"], 16) if named and named["offset"] else 0
    return name, offset


def _add_range(blocks: list[RamBlock], match: re.Match[str], name: str, offset: int) -> None:
    gpa, end = int(match["first"], 16), int(match["last"], 16) + 1
    last = blocks[-1] if blocks else None
    if (
        last is not None
        and last.end == gpa
        and last.name == name
        and last.region_offset + last.size == offset
    ):
        blocks[-1] = RamBlock(last.gpa, last.size + end - gpa, name, last.region_offset)
    else:
        blocks.append(RamBlock(gpa, end - gpa, name, offset))


def parse_host_address(text: str, gpa: int) -> int:
    """Parse `gpa2hva`: `Host virtual address for 0x… (pc.ram) is 0x7f…`."""
    match = re.search(r"^Host virtual address for .* is (0x[0-9a-f]+)$", text.strip())
    # The upper half of all addresses is the kernel's, on every host.
    address = parse_unsigned(match[1], 16, bits=63) if match else None
    if address is None:
        raise MonitorAnswerError(f"gpa2hva {gpa:#x}", text)
    return address


def split_vcpus(text: str) -> dict[int, str]:
    """Split `info registers -a` into the text of each vCPU, by cpu_index.

    Raises:
        MonitorAnswerError: It makes no sense.
    """
    if absurd := _ABSURD_NUMBER.search(text):
        raise MonitorAnswerError("info registers", f"a number of {len(absurd[0])} digits")
    parts = re.split(r"^CPU#(\d+)\s*$", text, flags=re.MULTILINE)
    return {
        _cpu_index("info registers", index): body
        for index, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def parse_vcpu_list(text: str) -> list[int]:
    """Parse `info cpus`: the cpu_index of each line of the form `* CPU #0: thread_id=…`.

    Raises:
        MonitorAnswerError: One is impossible.
    """
    found = re.findall(r"^[* ] CPU #(\d+):", text, re.MULTILINE)
    return [_cpu_index("info cpus", index) for index in dict.fromkeys(found)]


def _cpu_index(command: str, digits: str) -> int:
    index = parse_unsigned(digits, bits=_CPU_INDEX_BITS)
    if index is None:
        raise MonitorAnswerError(command, f"no machine has a vCPU of number {digits}")
    return index


def parse_physical_memory(text: str, bits: int) -> list[int]:
    """Parse `xp /NxF ADDRESS`: lines of `0000000000001000: 0x01 0x02 …`, whatever others say.

    Args:
        text: The answer.
        bits: Of each number.

    Raises:
        MonitorAnswerError: There is something else in it.
    """
    values = []
    for row in re.findall(r"^[0-9a-f]+:(.*)$", text, re.MULTILINE):
        for word in row.split():
            value = parse_unsigned(word, 16, bits=bits)
            if value is None:
                raise MonitorAnswerError("xp", text)
            values.append(value)
    return values


def parse_memory_size(text: str) -> int | None:
    """Return the bytes of RAM that `info memory_size_summary` tells of, or None if it tells none.

    Memory that was plugged in later counts, where the machine can have such memory.
    """
    sizes = [parse_unsigned(size) for size in _MEMORY_SIZE.findall(text)]
    return sum(size for size in sizes if size is not None) if sizes else None


def parse_physical_bytes(text: str) -> bytes:
    """Parse `xp /Nxb ADDRESS`, as `parse_physical_memory` does."""
    return bytes(parse_physical_memory(text, 8))
