"""Pages packed by zlib.

Source: QEMU dump/dump.c (compress2 at Z_BEST_SPEED): zlib container, level 1.

Intel's ISA-L writes the same format three times as fast: its level 1 within 2 % of the size of
zlib's level 1, its level 0 six times as fast at a quarter more.
"""

from __future__ import annotations

import zlib
from contextlib import suppress
from functools import partial
from typing import Any

from qemu_dump_ext.page_codecs._declaration import (
    Compress,
    Decompress,
    PageCodec,
    bad_page,
    no_level,
    wrong_size,
)
from qemu_dump_ext.structures.kdump import DUMP_DH_COMPRESSED_ZLIB

_DEFAULT_LEVEL = 1
_ISAL_HIGHEST_LEVEL = 1
"""ISA-L has two more, which are slower than these and hardly smaller."""


def _compressor() -> Compress:
    return partial(zlib.compress, level=zlib.Z_BEST_SPEED)


def _tuned(level: int | None) -> Compress:
    wanted = _DEFAULT_LEVEL if level is None else level
    if not 0 <= wanted <= zlib.Z_BEST_COMPRESSION:
        raise no_level("zlib", wanted, zlib.Z_BEST_COMPRESSION)
    if wanted <= _ISAL_HIGHEST_LEVEL:
        # Three times as fast. What it packs unpacks to the same page, but not always in the same
        # bytes: it may find matches that its memory from an earlier page points to.
        try:
            from isal import isal_zlib
        except ImportError:
            pass
        else:
            return partial(isal_zlib.compress, level=wanted)
    return partial(zlib.compress, level=max(wanted, zlib.Z_BEST_SPEED))


def _decompressor() -> Decompress:
    library: Any = zlib
    # Takes two thirds of the time, and looks at the checksum as well.
    with suppress(ImportError):
        from isal import isal_zlib

        library = isal_zlib
    return partial(_decompress, library)


def _decompress(library: Any, data: bytes | memoryview, page_size: int) -> bytes:
    stream = library.decompressobj()
    try:
        # One byte more than a page: so that the checksum behind the page is reached.
        page: bytes = stream.decompress(data, page_size + 1)
    except library.error as error:
        raise bad_page("zlib", error) from error
    if len(page) != page_size:
        raise wrong_size("zlib", len(page) if len(page) < page_size else "more", page_size)
    if not stream.eof or stream.unused_data:
        raise bad_page("zlib", "bytes behind its end" if stream.eof else "it ends too early")
    return page


CODEC = PageCodec(
    name="zlib",
    page_flag=DUMP_DH_COMPRESSED_ZLIB,
    compressor=_compressor,
    decompressor=_decompressor,
    tuned=_tuned,
)
