"""The bytes of a dump file, read with bounds: everything in it is untrusted."""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator

from qemu_dump_ext.errors import CorruptDumpError, NotADumpError, RequestError


class DumpImage(ABC):
    """A dump as its format describes it, starting at offset 0.

    Attributes:
        size: In bytes.
        problems: What is wrong with it as a whole, in words; offsets are those of the file.
        is_whole: Everything up to `size` can be read.
    """

    size: int
    problems: tuple[str, ...] = ()
    is_whole: bool = True

    def check(self, offset: int, size: int) -> None:
        """Refuse a range that is not inside, before memory is spent on it.

        Raises:
            CorruptDumpError: It is not.
        """
        if offset < 0 or size < 0 or offset + size > self.size:
            raise CorruptDumpError(
                f"{size:#x} bytes at offset {offset:#x} reach beyond the dump's end at"
                f" {self.size:#x}: truncated or damaged"
            )

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset`.

        Raises:
            CorruptDumpError: They are not inside, or cannot be read.
        """
        self.check(offset, size)
        data = bytearray(size)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; as `read`. May be called by several threads."""

    @abstractmethod
    def stored(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, end) of a range, ascending, but for its holes, which read as zero."""

    def readable(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, end) of what of a range can be read, ascending."""
        if offset < self.size:
            yield offset, min(offset + size, self.size)

    def look_again(self) -> None:  # noqa: B027 - what is rearranged stays as it was
        """Take note of how large a file is by now that somebody writes to."""

    @abstractmethod
    def close(self) -> None:
        """Give the file back; harmless when repeated."""


class PlainImage(DumpImage):
    """A file that is the dump itself."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            # A pipe must not make us wait; for a regular file the flag means nothing.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a socket, or a terminal without one
                raise NotADumpError(f"{os.fspath(path)} is not a regular file") from error
            name = os.fspath(path) or "''"
            raise RequestError(f"cannot open {name}: {error.strerror}") from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise NotADumpError(f"{os.fspath(path)} is not a regular file")
        self.size = status.st_size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        self.check(offset, len(buffer))
        while buffer:
            try:
                count = os.preadv(self._fd, [buffer], offset)
            except OSError as error:
                raise CorruptDumpError(
                    f"cannot read {len(buffer):#x} bytes at offset {offset:#x}: {error.strerror}"
                ) from error
            if not count:
                raise CorruptDumpError(f"the file became shorter than {offset:#x} bytes")
            offset += count
            buffer = buffer[count:]

    def stored(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, end) of what is no hole of the file."""
        last = offset + size
        while offset < last:
            start, end = self._next_data(offset) if offset < self.size else (offset, last)
            if start < min(end, last):
                yield start, min(end, last)
            offset = end

    def _next_data(self, offset: int) -> tuple[int, int]:
        try:
            start = os.lseek(self._fd, offset, os.SEEK_DATA)
            return start, os.lseek(self._fd, start, os.SEEK_HOLE)
        except OSError as error:
            # ENXIO: there is a hole up to the end; else, the file system does not tell.
            return self.size if error.errno == errno.ENXIO else offset, self.size

    def look_again(self) -> None:
        """Take note of how large the file is by now."""
        self.size = os.fstat(self._fd).st_size

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
