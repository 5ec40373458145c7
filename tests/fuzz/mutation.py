"""Change an input as hostile peers and broken media do: deterministic for a seed."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

_NUMBERS = (
    *(0, 1, 2, 0x7F, 0x80, 0xFF, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 2, (1 << 64) - 4096),
)
_WORDS = (
    *(b"9" * 5000, b"0x" + b"f" * 5000, b"f" * 17, b"-1", b"0x", b"1e999", b"NaN", b"-", b"0"),
    *("٣".encode(), "²".encode(), b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\0", b"\x1b[2J", b"\r\n"),
    *(b"[" * 5000, b'{"a":' * 5000, b"(" * 5000, b"<!--" * 2000, b"<reg " * 2000, b" " * 5000),
    *(b"null", b"true", b"{}", b"[]", b'""', b"!!python/object:os.system", b"&a [*a]", b"/../"),
    *(b'<xi:include href="target.xml"/>', b"CPU#4294967296\n", b"CPU#0\n", b"Error: no\n"),
)

_TRIES = 8
_NEAR = 1 << 14
"""Bytes around a place in which lines are swapped, and a number is looked for."""
_NUMBER = re.compile(rb"[0-9][0-9a-f]*")


def mutate(data: bytes, others: Sequence[bytes], chance: random.Random, *, most: int) -> bytes:
    """Return `data` with one to eight changes.

    Args:
        data: What is valid.
        others: More of its kind, from which pieces are taken.
        chance: Decides.
        most: How long the result is, at most.
    """
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        at = _place(changed, chance)
        end = min(len(changed), at + chance.choice((1, 2, 4, 8, 16, 64, 1024)))
        match chance.randrange(9):
            case 0:
                changed[at:end] = bytes(chance.randrange(256) for _ in range(end - at))
            case 1:
                size = chance.choice((1, 2, 4, 8))
                value = chance.choice(_NUMBERS) & ((1 << 8 * size) - 1)
                changed[at : at + size] = value.to_bytes(size, chance.choice(("little", "big")))
            case 2:
                changed[at:end] = chance.choice(_WORDS)
            case 3:
                _replace_number(changed, at, chance)
            case 4:
                del changed[at:end]
            case 5:
                changed[at:at] = changed[at:end] * chance.choice((1, 2, 50))
            case 6:
                piece = chance.choice(others)
                start = chance.randrange(len(piece) + 1)
                changed[at:end] = piece[start : start + chance.choice((8, 64, 512))]
            case 7:
                del changed[at:]
            case _:
                _swap_lines(changed, at, chance)
    return bytes(changed[:most])


def _place(data: bytearray, chance: random.Random) -> int:
    """Return where to change something; rarely among zeros, of which samples of RAM have most."""
    for _ in range(_TRIES):
        at = chance.randrange(len(data) + 1)
        if any(data[at : at + 8]):
            return at
    return chance.randrange(len(data) + 1)


def _replace_number(changed: bytearray, at: int, chance: random.Random) -> None:
    """Put another number in place of the next one that is written in letters."""
    found = _NUMBER.search(changed, at, at + _NEAR)
    at, end = found.span() if found else (at, at)
    value = chance.choice(_NUMBERS)
    changed[at:end] = chance.choice(
        (str(value), f"{value:x}", f"{value:016x}", f"-{value}")
    ).encode()


def _swap_lines(changed: bytearray, at: int, chance: random.Random) -> None:
    start = max(0, at - _NEAR)
    lines = bytes(changed[start : at + _NEAR]).splitlines(keepends=True)
    if lines:
        one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
        lines[one], lines[other] = lines[other], lines[one]
        changed[start : at + _NEAR] = b"".join(lines)
