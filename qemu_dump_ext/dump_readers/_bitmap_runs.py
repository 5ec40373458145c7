"""Runs of set bits in a bitmap of pages, least significant bit of each byte first."""

from __future__ import annotations

import re
from collections.abc import Iterator

_BIT_RUNS = re.compile(rb"\xff+|\x00+|[^\x00\xff]")
_BITS = tuple(tuple(bit for bit in range(8) if byte >> bit & 1) for byte in range(256))


def runs_of_ones(bitmap: bytes, first: int) -> Iterator[tuple[int, int]]:
    """Yield (number, count) of each run of set bits, not merged.

    Args:
        bitmap: One piece of it.
        first: Number of its first bit.
    """
    for match in _BIT_RUNS.finditer(bitmap):
        start = match.start()
        byte = bitmap[start]
        if byte == 0xFF:
            yield first + 8 * start, 8 * (match.end() - start)
        elif byte:
            for bit in _BITS[byte]:
                yield first + 8 * start + bit, 1


def length_of_run(bits: int) -> int:
    """Return how many of the lowest bits of a number are set."""
    return (~bits & (bits + 1)).bit_length() - 1
