"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?) *(B|KiB|MiB|GiB|TiB)")
_BYTES_OF = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_COUNT = re.compile(r"[0-9]{1,18}")


def parse_size(text: str) -> int:
    """Return the bytes of a number, or of one with a unit behind it.

    Raises:
        ValueError: It is neither.
    """
    match = _SIZE.fullmatch(text)
    if match is not None:
        return int(float(match[1]) * _BYTES_OF[match[2]])
    if _COUNT.fullmatch(text):
        return int(text)
    raise ValueError("a size is a number of bytes, or one with B, KiB, MiB, GiB or TiB")
