"""How pages of kdump-compressed dumps are packed: one file for each codec."""

from __future__ import annotations

import sys
from functools import cache

from qemu_dump_ext.discovery import collect
from qemu_dump_ext.page_codecs._declaration import Compress, Decompress, PageCodec

__all__ = ["UNCOMPRESSED", "Compress", "Decompress", "PageCodec", "all_page_codecs", "codec_names"]

UNCOMPRESSED = "none"
"""The word for a kdump whose pages are stored as they are."""


@cache
def all_page_codecs() -> dict[str, PageCodec]:
    """Return every declared codec by name, also those whose package is missing."""
    return collect(sys.modules[__name__], "CODEC", PageCodec)


def codec_names() -> list[str]:
    """Return every word that may follow -z."""
    return [*all_page_codecs(), UNCOMPRESSED]
