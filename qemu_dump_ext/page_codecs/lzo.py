"""Pages packed by LZO1X-1, without python-lzo's own header.

Source: QEMU dump/dump.c (lzo1x_1_compress); makedumpfile.c (lzo1x_decompress_safe).
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

from qemu_dump_ext.page_codecs._declaration import (
    Compress,
    Decompress,
    PageCodec,
    import_package,
    unpack_page,
)
from qemu_dump_ext.structures.kdump import DUMP_DH_COMPRESSED_LZO

_LEVEL = 1


def _import() -> ModuleType:
    return import_package("lzo", "lzo")


def _compressor() -> Compress:
    lzo = _import()

    def compress(page: bytes | memoryview) -> bytes:
        packed: bytes = lzo.compress(bytes(page), _LEVEL, False)
        return packed

    return compress


def _decompressor() -> Decompress:
    lzo = _import()

    def decompress(data: bytes | memoryview, page_size: int) -> bytes:
        unpack = partial(lzo.decompress, bytes(data), False, page_size)
        return unpack_page("lzo", page_size, unpack, lzo.error)

    return decompress


CODEC = PageCodec(
    name="lzo",
    page_flag=DUMP_DH_COMPRESSED_LZO,
    compressor=_compressor,
    decompressor=_decompressor,
)
