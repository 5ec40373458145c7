"""makedumpfile's flattened format: writes at offsets, sent through a stream in any order.

Source: makedumpfile IMPLEMENTATION and makedumpfile.h (struct makedumpfile_header,
makedumpfile_data_header); QEMU dump/dump.c write_start_flat_header().
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from qemu_dump_ext.structures.flattened import (
    FLATTENED_ABI,
    FLATTENED_CHUNK,
    FLATTENED_END,
    FLATTENED_HEADER,
    FLATTENED_HEADER_SIZE,
    FLATTENED_SIGNATURE,
    FLATTENED_TYPE,
    FLATTENED_VERSION,
)

_JOINED = 1 << 16
"""Bytes of data below which a copy is cheaper than a write of its own."""


class FlattenedStream:
    """Wraps `write_at` into chunks; the end mark is written only when all went well."""

    def __init__(self, write: Callable[[bytes | memoryview], None]) -> None:
        self._write = write
        self._chunk_header = FLATTENED_CHUNK.bind(FLATTENED_ABI).codec.pack

    def __enter__(self) -> Callable[[int, bytes | memoryview], None]:
        header = FLATTENED_HEADER.bind(FLATTENED_ABI).pack(
            signature=FLATTENED_SIGNATURE, type=FLATTENED_TYPE, version=FLATTENED_VERSION
        )
        self._write(header.ljust(FLATTENED_HEADER_SIZE, b"\0"))
        return self.write_at

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error_type is None:
            self._write(self._chunk_header(FLATTENED_END, FLATTENED_END))

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Send one chunk."""
        header = self._chunk_header(offset, len(data))
        if len(data) < _JOINED:
            self._write(header + data)
        else:
            self._write(header)
            self._write(data)
