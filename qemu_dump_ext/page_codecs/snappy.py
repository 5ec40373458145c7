"""Pages packed by snappy's raw format, without its framing.

Source: QEMU dump/dump.c (snappy_compress); snappy format_description.txt (length preamble).
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

from qemu_dump_ext.page_codecs._declaration import (
    Compress,
    Decompress,
    PageCodec,
    bad_page,
    import_package,
    unpack_page,
    wrong_size,
)
from qemu_dump_ext.structures.kdump import DUMP_DH_COMPRESSED_SNAPPY

_PREAMBLE_MAX = 5
"""Bytes of a length below 2^32, 7 bits in each."""


def _import() -> ModuleType:
    return import_package("snappy", "snappy")


def _unpacked_size(data: bytes | memoryview) -> int:
    size = 0
    for index, byte in enumerate(data[:_PREAMBLE_MAX]):
        size |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return size
    raise bad_page("snappy", "its length has no end")


def _compressor() -> Compress:
    snappy = _import()

    compress: Compress = snappy.compress
    return compress


def _decompressor() -> Decompress:
    snappy = _import()

    def decompress(data: bytes | memoryview, page_size: int) -> bytes:
        # The library allocates what the preamble says.
        size = _unpacked_size(data)
        if size != page_size:
            raise wrong_size("snappy", size, page_size)
        unpack = partial(snappy.uncompress, data)
        return unpack_page("snappy", page_size, unpack, snappy.UncompressError)

    return decompress


CODEC = PageCodec(
    name="snappy",
    page_flag=DUMP_DH_COMPRESSED_SNAPPY,
    compressor=_compressor,
    decompressor=_decompressor,
)
