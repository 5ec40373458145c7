"""Turn what others wrote into numbers and bytes of ours: one place, with bounds.

Guests, monitors, stubs and files say what they like: thousands of digits, signs, digits of other
scripts. What is no number of the wanted size is None, never an exception.
"""

from __future__ import annotations

import re

_DIGITS = {8: "[0-7]+", 10: "[0-9]+", 16: "(?:0[xX])?[0-9a-fA-F]+"}
_LETTERS_MAX = 200
"""More than a number of any size has that is asked for, leading zeros included."""


def parse_unsigned(text: str, base: int = 10, *, bits: int = 64) -> int | None:
    """Return an unsigned number, or None where `text` is none.

    Args:
        text: Nothing but digits, with or without 0x where `base` is 16.
        base: 8, 10 or 16.
        bits: How many it has at most.
    """
    if len(text) > _LETTERS_MAX or not re.fullmatch(_DIGITS[base], text):
        return None
    value = int(text, base)
    return value if value >> bits == 0 else None


def parse_bytes(text: str, *, most: int) -> bytes | None:
    """Return bytes that are written as pairs of hexadecimal digits, or None where they are not.

    Args:
        text: Nothing but such pairs.
        most: How many bytes they are at most.
    """
    if len(text) > 2 * most or not re.fullmatch("(?:[0-9a-fA-F]{2})*", text):
        return None
    return bytes.fromhex(text)
