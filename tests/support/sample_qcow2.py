"""qcow2 images made by hand: snapshots whose state is whatever a test asks.

Laid out as QEMU's docs/interop/qcow2.rst tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import pack

CLUSTER_BITS = 9
CLUSTER = 1 << CLUSTER_BITS
_ENTRIES = CLUSTER // 8
_DISK_SIZE = 3 * _ENTRIES * CLUSTER - 512
"""Of an L1 table with three entries, the state begins behind."""
_STATE_TABLE = 3
COPIED = 1 << 63


def make_qcow2(
    states: Mapping[str, bytes],
    *,
    version: int = 3,
    crypt: int = 0,
    features: int = 0,
    extra: bool = True,
    entries: Mapping[int, int] | None = None,
    state_size: int | None = None,
) -> bytes:
    """Return an image with a snapshot of each name, whose state is bytes; none: of the disk alone.

    Args:
        states: By the snapshots' names; their IDs are 1, 2 and so on.
        version: Of the format.
        crypt: How it says to be encrypted.
        features: Incompatible ones.
        extra: Whether snapshots have more than those of the first QEMUs.
        entries: Of the L2 table of the last state, by number: instead of those that are right.
        state_size: What the last snapshot says, instead of what is right.
    """
    data = bytearray(CLUSTER)
    table = bytearray()
    for number, (name, state) in enumerate(states.items(), 1):
        last = number == len(states)
        clusters = -(-len(state) // CLUSTER)
        l2_places = []
        for first in range(0, clusters, _ENTRIES):
            here = range(first, min(first + _ENTRIES, clusters))
            place = len(data) + CLUSTER
            told = {index: place + index * CLUSTER | COPIED for index in range(len(here))}
            told |= (entries or {}) if last else {}
            l2_places.append(len(data) | COPIED)
            data += b"".join(pack(">Q", told.get(index, 0)) for index in range(_ENTRIES))
            for index in here:
                data += state[index * CLUSTER :][:CLUSTER].ljust(CLUSTER, b"\0")
        l1_place = len(data)
        l1 = [0] * _STATE_TABLE + l2_places
        l1_table = b"".join(pack(">Q", place) for place in l1)
        data += l1_table.ljust(-(-len(l1_table) // CLUSTER) * CLUSTER, b"\0")
        size = len(state) if state_size is None or not last else state_size
        words = pack(">QQ", size, _DISK_SIZE) if extra else b""
        texts = str(number).encode(), name.encode()
        entry = pack(">QIHH", l1_place, len(l1), *map(len, texts)) + bytes(16)
        entry += pack(">II", size & 0xFFFFFFFF, len(words)) + words + b"".join(texts)
        table += entry.ljust(-(-len(entry) // 8) * 8, b"\0")
    head = b"QFI\xfb" + pack(">IQIIQ", version, 0, 0, CLUSTER_BITS, _DISK_SIZE)
    head += pack(">IIQQIIQ", crypt, 0, 0, 0, 0, len(states), len(data))
    head += pack(">QQQII", features, 0, 0, 4, 104)
    data[: len(head)] = head
    return bytes(data + table)
