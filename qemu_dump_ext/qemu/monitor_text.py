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
_NON_VOLATILE_BACKEND = re.compile(r"alias \S.*? @(?P<backend>\S+) ")


def parse_version(text: str) -> QemuVersion:
    """Parse `info version`: `7.2.22Debian 1:7.2+dfsg…` is (7, 2, 22)."""
    match = re.match(r"\s*(\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise MonitorAnswerError("info version", text)
    major, minor, micro = (int(number) for number in match.groups())
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
        MonitorAnswerError: No such flat view.

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
    in_view = found = False
    for line in text.splitlines():
        if line.startswith("FlatView #"):
            in_view = False
        elif line.startswith(' AS "memory",'):
            in_view = found = True
        elif in_view and (match := _FLAT_RANGE.match(line)):
            yield match
    if not found:
        raise MonitorAnswerError(
            "info mtree -f", text, hint="QEMU before 2.9 has no flat view of its memory"
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
    if match is None:
        raise MonitorAnswerError(f"gpa2hva {gpa:#x}", text)
    return int(match.group(1), 16)


def split_vcpus(text: str) -> dict[int, str]:
    """Split `info registers -a` into the text of each vCPU, by cpu_index."""
    parts = re.split(r"^CPU#(\d+)\s*$", text, flags=re.MULTILINE)
    return {int(index): body for index, body in zip(parts[1::2], parts[2::2], strict=True)}


def parse_vcpu_list(text: str) -> list[int]:
    """Parse `info cpus`: the cpu_index of each line of the form `* CPU #0: thread_id=…`."""
    return [int(index) for index in re.findall(r"^[* ] CPU #(\d+):", text, re.MULTILINE)]


def parse_physical_bytes(text: str) -> bytes:
    """Parse `xp /Nxb ADDRESS`: lines of `0000000000001000: 0x01 0x02 …`."""
    values: list[int] = []
    for line in text.splitlines():
        values.extend(int(value, 16) for value in line.partition(":")[2].split())
    return bytes(values)
