"""How pages of kdump-compressed dumps are packed: one file for each codec."""

from __future__ import annotations

import sys
from functools import cache

from qemu_dump_ext.discovery import collect
from qemu_dump_ext.page_codecs._declaration import Compress, Decompress, PageCodec

__all__ = ["Compress", "Decompress", "PageCodec", "all_page_codecs"]


@cache
def all_page_codecs() -> dict[str, PageCodec]:
    """Return every declared codec by name, also those whose package is missing."""
    return collect(sys.modules[__name__], "CODEC", PageCodec)
