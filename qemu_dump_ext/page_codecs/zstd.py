"""Pages packed as one zstd frame each.

Source: makedumpfile.c (ZSTD_compressCCtx); QEMU has no such format.
"""

from __future__ import annotations

from types import ModuleType

from qemu_dump_ext.page_codecs._declaration import (
    Compress,
    Decompress,
    PageCodec,
    import_package,
    no_level,
    unpack_page,
    wrong_size,
)
from qemu_dump_ext.structures.kdump import DUMP_DH_COMPRESSED_ZSTD

_LEVEL = 2
"""The level that packs one page as fast as level 1, and smaller."""
_FAST_LEVEL = -1
_HIGHEST_LEVEL = 19
_SIZE_UNKNOWN = -1


def _import() -> ModuleType:
    return import_package("zstandard", "zstd")


def _compressor() -> Compress:
    return _tuned(_LEVEL)


def _tuned(level: int | None) -> Compress:
    wanted = _LEVEL if level is None else level
    if not 0 <= wanted <= _HIGHEST_LEVEL:
        raise no_level("zstd", wanted, _HIGHEST_LEVEL)
    # The library's level 0 is its default; ours is its fastest that is smaller than snappy.
    compress: Compress = _import().ZstdCompressor(level=wanted or _FAST_LEVEL).compress
    return compress


def _decompressor() -> Decompress:
    zstandard = _import()
    unpack = zstandard.ZstdDecompressor().decompress

    def decompress(data: bytes | memoryview, page_size: int) -> bytes:
        def one_page() -> bytes:
            # A size in the frame header overrides max_output_size.
            size = zstandard.frame_content_size(data)
            if size not in (page_size, _SIZE_UNKNOWN):
                raise wrong_size("zstd", size, page_size)
            page: bytes = unpack(data, max_output_size=page_size, allow_extra_data=False)
            return page

        return unpack_page("zstd", page_size, one_page, zstandard.ZstdError)

    return decompress


CODEC = PageCodec(
    name="zstd",
    page_flag=DUMP_DH_COMPRESSED_ZSTD,
    compressor=_compressor,
    decompressor=_decompressor,
    tuned=_tuned,
)
