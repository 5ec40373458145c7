"""Which guest memory goes into a dump: of what is mapped, that which QEMU itself dumps.

That is RAM and ROM in the address space of the machine, as `parse_flat_view` reads it, whatever
device it belongs to. Left out is what the flat view shows and QEMU does not dump: blocks of a
virtio-mem device that are not plugged, and memory that a confidential guest keeps to itself. Only
QEMU's own dump tells them: it is asked for, and fails on purpose before it has written memory.

Source: QEMU system/memory_mapping.c guest_phys_blocks_region_add(); hw/virtio/virtio-mem.c
virtio_mem_rdm_replay_populated().
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest.access import Monitor
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.qemu.monitor_queries import find_devices, read_number, read_property
from qemu_dump_ext.qemu.monitor_text import parse_flat_view
from qemu_dump_ext.qemu.native_dump import NativeDumps
from qemu_dump_ext.value import Value

_VIRTIO_MEM = r"virtio-mem-(pci|ccw)"
_SUPPORT = ("/machine", "confidential-guest-support")
CONFIDENTIAL = f"qom-get {' '.join(_SUPPORT)}"
"""Whether the guest keeps memory to itself, which it does or not for as long as QEMU runs."""
_BISECT_SECONDS = 5.0
_MIB = 1 << 20

AddressRange = tuple[int, int]
"""First guest physical address, and the first one behind."""


class DumpedMemory(Value):
    """What goes into a dump.

    Attributes:
        blocks: The blocks by ascending gpa.
        left_out: What of guest memory's addresses does not, in words.
        doubts: What could not be found out, in words: blocks may hold more than QEMU would dump.
    """

    blocks: Sequence[RamBlock]
    left_out: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


class VirtioMem(Value):
    """A device of which the guest uses some blocks, and gives others back.

    Attributes:
        name: What messages call it.
        gpa: Where its first block is.
        size: The size of all blocks, in bytes.
        block_size: The block size in bytes.
        plugged: How much of `size` the guest uses, in bytes.
    """

    name: str
    gpa: int
    size: int
    block_size: int
    plugged: int

    @property
    def end(self) -> int:
        """First guest physical address behind it."""
        return self.gpa + self.size


def find_dumped_memory(monitor: Monitor, native: NativeDumps, flat_views: str) -> DumpedMemory:
    """Find out what of a stopped guest's memory goes into a dump.

    Args:
        monitor: QEMU's human monitor.
        native: Asks QEMU for its own dumps.
        flat_views: The answer to `info mtree -f`.

    Raises:
        SourceError: The monitor does not answer.
    """
    blocks: Sequence[RamBlock] = parse_flat_view(flat_views)
    left_out: list[str] = []
    doubts: list[str] = []
    for path in find_devices(monitor, _VIRTIO_MEM):
        name = f"virtio-mem {path.rpartition('/')[2]}"
        try:
            device = _read_virtio_mem(monitor, path, name)
            plugged = _plugged_ranges(device, native)
        except SourceError as error:
            doubts.append(f"{name}: all of its blocks are dumped, also those not plugged: {error}")
            continue
        blocks = keep_within(blocks, (device.gpa, device.end), plugged)
        left_out.append(
            f"{name}: {device.plugged / _MIB:.1f} of {device.size / _MIB:.1f} MiB are plugged"
        )
    if confidential := _confidential_guest(monitor):
        try:
            whole = blocks[0].gpa, blocks[-1].end
            blocks = keep_within(blocks, whole, native.ranges(whole[0], whole[1] - whole[0]))
            left_out.append(f"{confidential}: what only the guest can read is not dumped")
        except (IndexError, SourceError) as error:
            doubts.append(
                f"{confidential}: what only the guest can read is dumped as well: {error}"
            )
    return DumpedMemory(blocks, tuple(left_out), tuple(doubts))


def keep_within(
    blocks: Sequence[RamBlock], bounds: AddressRange, kept: Sequence[AddressRange]
) -> list[RamBlock]:
    """Cut down what of `blocks` lies within `bounds` to what is in `kept` as well.

    Args:
        blocks: The blocks by ascending gpa.
        bounds: What is outside stays.
        kept: Ascending, within the bounds.
    """
    first, end = bounds
    parts = [(0, first), *kept, (end, max(end, *(block.end for block in blocks)))] if blocks else []
    result = []
    index = 0
    for block in blocks:
        while index < len(parts) and parts[index][1] <= block.gpa:
            index += 1
        for low, high in parts[index:]:
            if low >= block.end:
                break
            result.append(block.part(max(low, block.gpa), min(high, block.end)))
    return result


def _read_virtio_mem(monitor: Monitor, path: str, name: str) -> VirtioMem:
    backend = (read_property(monitor, path, "memdev") or "").strip('"')
    values = {
        key: read_number(monitor, owner, key)
        for owner, key in (
            (path, "memaddr"),
            (path, "block-size"),
            (path, "size"),
        )
    }
    size = read_number(monitor, backend, "size") if backend.startswith("/") else None
    gpa, block_size, plugged = values.values()
    if gpa is None or not block_size or plugged is None or not size:
        raise SourceError("QEMU does not tell its size, or where it is")
    if plugged > size or plugged % block_size or size % block_size:
        raise SourceError(
            f"{plugged:#x} of {size:#x} bytes are plugged in blocks of {block_size:#x}"
        )
    return VirtioMem(name, gpa, size, block_size, plugged)


def _plugged_ranges(device: VirtioMem, native: NativeDumps) -> Sequence[AddressRange]:
    if not device.plugged:
        return ()
    if device.plugged == device.size:
        return ((device.gpa, device.end),)
    try:
        ranges = native.ranges(device.gpa, device.size)
    except SourceError:
        ranges = find_plugged(device, native.has_any)
    if sum(end - first for first, end in ranges) != device.plugged:
        raise SourceError("QEMU's dump has another number of them than are plugged")
    return ranges


def find_plugged(
    device: VirtioMem, is_dumped_at: Callable[[int, int], bool], seconds: float = _BISECT_SECONDS
) -> list[AddressRange]:
    """Find the plugged blocks by their number, and by asking where none is.

    From the end on, for Linux plugs from the beginning on. As soon as no more blocks are left
    than are plugged, these are it: for one stretch of plugged blocks, that takes a few questions.

    Args:
        device: Has plugged blocks, and others.
        is_dumped_at: Tells whether there is a plugged block in a range of a gpa and a size.
        seconds: How long it may take.

    Returns:
        Ranges by ascending gpa, as few as possible.

    Raises:
        SourceError: It takes longer.
    """
    left = device.size
    deadline = time.monotonic() + seconds
    mixed = [(device.gpa, device.size)]
    found: list[AddressRange] = []
    while left > device.plugged and mixed:
        if time.monotonic() > deadline:
            raise SourceError(f"it takes longer than {seconds:g} s to find out which are plugged")
        gpa, size = mixed.pop()
        if not is_dumped_at(gpa, size):
            left -= size
        elif size == device.block_size:
            found.append((gpa, gpa + size))
        else:
            half = size // 2 // device.block_size * device.block_size
            mixed += [(gpa, half), (gpa + half, size - half)]
    found += [(gpa, gpa + size) for gpa, size in mixed]
    return list(_joined(sorted(found)))


def _joined(ranges: Sequence[AddressRange]) -> Iterator[AddressRange]:
    first, end = ranges[0] if ranges else (0, 0)
    for low, high in ranges[1:]:
        if low != end:
            yield first, end
            first = low
        end = high
    if ranges:
        yield first, end


def _confidential_guest(monitor: Monitor) -> str | None:
    path = read_property(monitor, *_SUPPORT)
    name = (path or "").strip('"')
    return f"confidential guest {name}" if name else None
