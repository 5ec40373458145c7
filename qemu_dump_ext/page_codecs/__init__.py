"""How pages of kdump-compressed dumps are packed: one file for each codec."""

from __future__ import annotations

import sys
from functools import cache

from qemu_dump_ext.discovery import collect, load
from qemu_dump_ext.page_codecs._declaration import UNCOMPRESSED, Compress, Decompress, PageCodec

__all__ = [
    "UNCOMPRESSED",
    "Compress",
    "Decompress",
    "PageCodec",
    "all_page_codecs",
    "find_page_codec",
]


@cache
def all_page_codecs() -> dict[str, PageCodec]:
    """Return every declared codec by name, also those whose package is missing."""
    return collect(sys.modules[__name__], "CODEC", PageCodec)


def find_page_codec(name: str) -> PageCodec:
    """Return the codec of this name, also that of `UNCOMPRESSED`; no other one is imported."""
    if name == UNCOMPRESSED.name:
        return UNCOMPRESSED
    return load(sys.modules[__name__], name, "CODEC", PageCodec)
