"""What one file of `page_codecs/` must declare."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TypeAlias

from qemu_dump_ext import third_party
from qemu_dump_ext.errors import (
    CodecUnavailableError,
    CorruptDumpError,
    MissingPackageError,
    RequestError,
)
from qemu_dump_ext.value import Value

Compress: TypeAlias = Callable[[bytes | memoryview], bytes]
Decompress: TypeAlias = Callable[[bytes | memoryview, int], bytes]


class PageCodec(Value):
    """How one page of a kdump-compressed dump is packed.

    Attributes:
        name: The word behind `kdump-`; equal to the name of the file.
        page_flag: `DUMP_DH_COMPRESSED_*` of the page descriptor.
        compressor: Makes a function that packs one page; the answer may be longer than the page.
            Byte-identical to QEMU's where QEMU knows the codec and the library is the same.
        tuned: Makes a compressor of a level, None: the best trade of time and size. Same format,
            but not QEMU's bytes. None: the codec has no levels, and `compressor` is the best.
        decompressor: Makes a function (packed page, page size in bytes) that answers exactly one
            page, never allocates more than about twice that, and raises `CorruptDumpError`.

    Both makers raise `CodecUnavailableError` when the package cannot be imported. What they make
    keeps state: one for each thread.
    """

    name: str
    page_flag: int
    compressor: Callable[[], Compress]
    decompressor: Callable[[], Decompress]
    tuned: Callable[[int | None], Compress] | None = None


def _whole(page: bytes | memoryview, page_size: int) -> bytes:
    if len(page) != page_size:
        raise wrong_size("uncompressed", len(page), page_size)
    return bytes(page)


UNCOMPRESSED = PageCodec(
    name="none",
    page_flag=0,
    compressor=lambda: bytes,
    decompressor=lambda: _whole,
)
"""Of a kdump whose pages are stored as they are; no page says that it is packed by it."""


def import_package(module: str, codec: str) -> ModuleType:
    """Import a third-party module when it is needed: gdb's own Python may lack it.

    Args:
        module: Name of the module.
        codec: Name of the codec, for the message.

    Raises:
        CodecUnavailableError: It cannot be imported.
    """
    try:
        return third_party.import_package(module, f"page codec {codec}")
    except MissingPackageError as error:
        raise CodecUnavailableError(
            error.message, package=error.package, hint=error.hint
        ) from error


def no_level(codec: str, level: int, highest: int) -> RequestError:
    """Return the error for a level that the codec has not."""
    return RequestError(f"{codec} has no level {level}", hint=f"0 to {highest}")


def bad_page(codec: str, reason: object) -> CorruptDumpError:
    """Return the error for a page that does not unpack."""
    return CorruptDumpError(f"{codec} page does not unpack: {reason}")


def unpack_page(
    codec: str, page_size: int, unpack: Callable[[], bytes], error: type[Exception]
) -> bytes:
    """Return what `unpack` returns: one page.

    Args:
        codec: The name of the codec, for messages.
        page_size: The page size in bytes.
        unpack: Calls the library.
        error: What the library raises for damage; its cause, if any, says more.

    Raises:
        CorruptDumpError: It is damaged, or no page.
    """
    try:
        page = unpack()
    except error as damage:
        raise bad_page(codec, damage.__cause__ or damage) from damage
    if len(page) != page_size:
        raise wrong_size(codec, len(page), page_size)
    return page


def wrong_size(codec: str, size: int | str, page_size: int) -> CorruptDumpError:
    """Return the error for a page that unpacks to another size than a page's, in bytes."""
    return bad_page(codec, f"it has {size} bytes instead of {page_size}")
