"""The headers of a qcow2 image, as far as internal snapshots with the state of a guest need them.

Everything in it is untrusted: sizes and counts are bounded.

Source: QEMU docs/interop/qcow2.rst; block/qcow2.h for the limits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field

from qemu_dump_ext.errors import CorruptDumpError, UnsupportedTargetError
from qemu_dump_ext.printable import printable
from qemu_dump_ext.structures.c_struct import Abi, Field, StructLayout, fields_of
from qemu_dump_ext.value import Value

QCOW2_MAGIC = b"QFI\xfb"
QCOW2_ENTRY_SIZE = 8
"""Bytes of an entry of an L1 or L2 table."""
OFFSET_MASK = (1 << 56) - (1 << 9)
"""Of such an entry: the bits of the offset, in the image, of what it leads to."""
READS_AS_ZERO = 1
COMPRESSED = 1 << 62
"""Of an entry of an L2 table: its cluster is nothing but zeros, or is compressed."""

_ABI = Abi("big", word_size=8, max_align=8)
_HEADER = StructLayout(
    "QCowHeader",
    (
        Field("magic", "bytes", len(QCOW2_MAGIC)),
        Field("version", "u32"),
        Field("backing_file_offset", "u64"),
        *fields_of("u32", "backing_file_size cluster_bits"),
        Field("size", "u64"),
        *fields_of("u32", "crypt_method l1_size"),
        *fields_of("u64", "l1_table_offset refcount_table_offset"),
        *fields_of("u32", "refcount_table_clusters nb_snapshots"),
        Field("snapshots_offset", "u64"),
    ),
).bind(_ABI)
"""What versions 2 and 3 have."""
_INCOMPATIBLE_SIZE = 8
"""Bytes of the incompatible features, which version 3 has behind it."""
_SNAPSHOT = StructLayout(
    "QCowSnapshotHeader",
    (
        Field("l1_table_offset", "u64"),
        Field("l1_size", "u32"),
        *fields_of("u16", "id_str_size name_size"),
        *fields_of("u32", "date_sec date_nsec"),
        Field("vm_clock_nsec", "u64"),
        *fields_of("u32", "vm_state_size extra_data_size"),
    ),
).bind(_ABI)
"""Behind it: extra data, the ID, the name, and what fills up to 8 bytes."""
_EXTRA = StructLayout(
    "QCowSnapshotExtraData", fields_of("u64", "vm_state_size_large disk_size")
).bind(_ABI)
_TABLE_PLACE = slice(_HEADER.offsets["nb_snapshots"], _HEADER.size)

_VERSIONS = range(2, 4)
_CLUSTER_BITS = range(9, 22)
_L1_ENTRIES_MAX = (32 << 20) // QCOW2_ENTRY_SIZE
_SNAPSHOTS_MAX = 1 << 16
_EXTRA_SIZE_MAX = 1024
_TABLE_SIZE_MAX = 64 << 20
_HARMLESS_FEATURES = 0b1011
"""Dirty and corrupt, which are about reference counts, and the type of compression."""
_REFUSED_FEATURES: Mapping[int, str] = {
    1 << 2: "has its data in another file (data_file)",
    1 << 4: "has parts of clusters (extended_l2)",
}

ReadAt = Callable[[int, int], bytes]
"""Returns so many bytes at an offset of the image; raises CorruptDumpError where they are not."""


class Qcow2Snapshot(Value):
    """One internal snapshot.

    Attributes:
        place: Offset of its entry in the image.
        entry: The entry as it stands there.
        identifier: QEMU's number of it, as text.
        name: What its maker called it.
        state_size: Bytes of the guest's state; 0: it is of a disk alone.
        disk_size: Of the guest's disk, in bytes; the state is behind it.
        l1_place: Offset of its L1 table.
        l1_count: Entries of that.
    """

    place: int
    entry: bytes = field(repr=False)
    identifier: str
    name: str
    state_size: int
    disk_size: int
    l1_place: int
    l1_count: int


class Qcow2Header(Value):
    """What the header of an image tells.

    Attributes:
        version: 2 or 3.
        cluster_bits: A cluster has two to the power of it bytes.
        table: The bytes of the header that change whenever the table of snapshots does.
        snapshots: The table.
    """

    version: int
    cluster_bits: int
    table: bytes = field(repr=False)
    snapshots: Sequence[Qcow2Snapshot]


def parse_qcow2(read: ReadAt) -> Qcow2Header:
    """Return what the header of an image and its table of snapshots tell.

    Raises:
        CorruptDumpError: They contradict the format, or are cut off.
        UnsupportedTargetError: The image has what is not read: encryption, for one.
    """
    head = read(0, _HEADER.size)
    fields = _HEADER.unpack_integers(head)
    if fields["version"] not in _VERSIONS:
        raise CorruptDumpError(f"qcow2 image of version {fields['version']}, not 2 or 3")
    if fields["cluster_bits"] not in _CLUSTER_BITS:
        raise CorruptDumpError(f"qcow2 image with clusters of {fields['cluster_bits']} bits")
    if fields["crypt_method"]:
        raise UnsupportedTargetError("the qcow2 image is encrypted: this is not read")
    if fields["version"] > _VERSIONS[0]:
        _check_features(int.from_bytes(read(_HEADER.size, _INCOMPATIBLE_SIZE), "big"))
    return Qcow2Header(
        fields["version"], fields["cluster_bits"], head[_TABLE_PLACE], _snapshots(read, fields)
    )


def read_table_place(read: ReadAt) -> bytes:
    """Return `Qcow2Header.table` as it is now."""
    return read(_TABLE_PLACE.start, _TABLE_PLACE.stop - _TABLE_PLACE.start)


def _check_features(features: int) -> None:
    for bit, words in _REFUSED_FEATURES.items():
        if features & bit:
            raise UnsupportedTargetError(f"the qcow2 image {words}: this is not read")
    unknown = features & ~_HARMLESS_FEATURES
    if unknown:
        raise UnsupportedTargetError(
            f"the qcow2 image has features that are not known: {unknown:#x}"
        )


def _snapshots(read: ReadAt, fields: Mapping[str, int]) -> list[Qcow2Snapshot]:
    count, start = fields["nb_snapshots"], fields["snapshots_offset"]
    if count > _SNAPSHOTS_MAX:
        raise CorruptDumpError(f"qcow2 image with {count} snapshots")
    found: list[Qcow2Snapshot] = []
    position = start
    for _ in range(count):
        snapshot = _snapshot_at(read, position, fields["size"])
        found.append(snapshot)
        position += -(-len(snapshot.entry) // 8) * 8
        if position - start > _TABLE_SIZE_MAX:
            raise CorruptDumpError(f"qcow2 image with over {_TABLE_SIZE_MAX:#x} bytes of snapshots")
    return found


def _snapshot_at(read: ReadAt, place: int, disk_size: int) -> Qcow2Snapshot:
    fields = _SNAPSHOT.unpack_integers(read(place, _SNAPSHOT.size))
    extra_size = fields["extra_data_size"]
    if extra_size > _EXTRA_SIZE_MAX or fields["l1_size"] > _L1_ENTRIES_MAX:
        raise CorruptDumpError(f"the snapshot at offset {place:#x} of the qcow2 image is damaged")
    texts = _SNAPSHOT.size + extra_size
    name = texts + fields["id_str_size"]
    entry = read(place, name + fields["name_size"])
    # What is shorter is of an earlier version.
    extra = _EXTRA.unpack_integers(entry[_SNAPSHOT.size : texts].ljust(_EXTRA.size, b"\0"))
    return Qcow2Snapshot(
        place=place,
        entry=entry,
        identifier=_text(entry[texts:name]),
        name=_text(entry[name:]),
        state_size=extra["vm_state_size_large"] or fields["vm_state_size"],
        disk_size=extra["disk_size"] if extra_size >= _EXTRA.size else disk_size,
        l1_place=fields["l1_table_offset"],
        l1_count=fields["l1_size"],
    )


def _text(data: bytes) -> str:
    return printable(data.decode("utf-8", "backslashreplace"))
