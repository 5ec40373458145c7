"""The state of a guest that `savevm` has put into a qcow2 image, behind the end of its disk.

The image may be in use by a QEMU. What belongs to a snapshot is not written to while there is that
snapshot: the guest's writes go elsewhere. So each read is followed by a look at whether it is still
in the table, from which QEMU takes a snapshot before it gives its clusters to others.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.structures.qcow2 import (
    COMPRESSED,
    OFFSET_MASK,
    QCOW2_ENTRY_SIZE,
    READS_AS_ZERO,
    Qcow2Header,
    Qcow2Snapshot,
    parse_qcow2,
    read_table_place,
)

_TABLES_KEPT = 8
"""L2 tables; each has 2 MiB at most, and tells of 512 MiB of state where clusters have 64 KiB."""


class VmStateImage(DumpImage):
    """The state in one snapshot."""

    def __init__(self, file: DumpImage, header: Qcow2Header, snapshot: Qcow2Snapshot) -> None:
        """Use an image; on an error, `file` stays open.

        Raises:
            CorruptDumpError: The state is larger than the image, or than its tables tell of.
        """
        self._file = file
        self._snapshot = snapshot
        self._table = header.table
        self._cluster_bits = header.cluster_bits
        self._entries = (1 << header.cluster_bits) // QCOW2_ENTRY_SIZE
        of_table = self._entries << header.cluster_bits
        # Disk and state have L2 tables of their own.
        self._first_table = -(-snapshot.disk_size // of_table)
        self.size = snapshot.state_size
        self.problems = file.problems
        room = max(0, snapshot.l1_count - self._first_table) * of_table
        if self.size > min(room, file.size):
            raise CorruptDumpError(
                f"snapshot {snapshot.name!r} of the qcow2 image has a state of {self.size:#x}"
                " bytes, of which the image has less: truncated or damaged"
            )
        self._l2_table = lru_cache(_TABLES_KEPT)(self._read_l2_table)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` of the state."""
        self.check(offset, len(buffer))
        size = 1 << self._cluster_bits
        while buffer:
            cluster, inside = divmod(offset, size)
            part = buffer[: size - inside]
            place = self._place(cluster)
            if place:
                self._file.read_into(place + inside, part)
            else:
                part[:] = bytes(len(part))
            offset, buffer = offset + len(part), buffer[len(part) :]
        self._check_snapshot()

    def _place(self, cluster: int) -> int:
        """Return where a cluster of the state is in the image; 0: it is nothing but zeros."""
        number, index = divmod(cluster, self._entries)
        start = index * QCOW2_ENTRY_SIZE
        entry = int.from_bytes(self._l2_table(number)[start : start + QCOW2_ENTRY_SIZE], "big")
        if entry & COMPRESSED:
            raise self._error(cluster, "is compressed, as QEMU writes none")
        if entry & READS_AS_ZERO:
            return 0
        if not entry & OFFSET_MASK:
            raise self._error(cluster, "is not in the image")
        return entry & OFFSET_MASK

    def _read_l2_table(self, number: int) -> bytes:
        place = self._snapshot.l1_place + (self._first_table + number) * QCOW2_ENTRY_SIZE
        entry = int.from_bytes(self._file.read(place, QCOW2_ENTRY_SIZE), "big")
        if not entry & OFFSET_MASK:
            raise self._error(number * self._entries, "is not in the image")
        return self._file.read(entry & OFFSET_MASK, self._entries * QCOW2_ENTRY_SIZE)

    def _error(self, cluster: int, what: str) -> CorruptDumpError:
        offset = cluster << self._cluster_bits
        return CorruptDumpError(
            f"the cluster at {offset:#x} of the state in snapshot {self._snapshot.name!r} {what}"
        )

    def _check_snapshot(self) -> None:
        """Refuse what was read where the snapshot is gone.

        Raises:
            CorruptDumpError: It is.
        """
        snapshot, read = self._snapshot, self._file.read
        if read_table_place(read) == self._table:
            try:
                if read(snapshot.place, len(snapshot.entry)) == snapshot.entry:
                    return
            except CorruptDumpError:
                pass  # The table has moved, and the image has become shorter.
        self._file.look_again()
        header = parse_qcow2(read)
        for found in header.snapshots:
            if found.entry == snapshot.entry:
                self._snapshot, self._table = found, header.table
                return
        raise CorruptDumpError(
            f"snapshot {snapshot.name!r} was deleted while it was read, by a QEMU that uses the"
            " image"
        )

    def stored(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield all of a range: QEMU writes the state as it is."""
        if size:
            yield offset, offset + size

    def close(self) -> None:
        """Close the image."""
        self._file.close()
