"""A file that one program has packed as a whole: gzip, bzip2, xz, lzop, zstd.

Such a file cannot be read from its middle on. It is unpacked once, into a nameless file in TMPDIR,
or else in /var/tmp: what is in /tmp may be in memory.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, cast

from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.dump_readers._lzop import LzopUnpacker
from qemu_dump_ext.errors import CorruptDumpError, NoRoomLeftError, RequestError
from qemu_dump_ext.host_limits import refused_as
from qemu_dump_ext.third_party import import_package

_DIRECTORY = "/var/tmp"  # noqa: S108 - the file has no name in it
_PIECE_SIZE = 1 << 20
_MEMORY_MAX = 512 << 20
"""Bytes that unpacking xz may take; what `xz -9` writes takes 65 MiB."""
_INPUT_SIZE = 2048
"""Bytes that are unpacked at once: zstd makes 64 MiB of them at most, xz 15 MiB."""
_KEPT_FREE = 20
"""Of the file system that gets what is unpacked, one part in so many stays free."""


class _Unpacker(Protocol):
    def read(self, size: int, /) -> bytes:
        """Return at most so many of the next bytes; none at the end."""


class _Frames:
    """Unpacks frames that follow each other, each by an object of the library's.

    The libraries' own file objects have no limit of memory (lzma), or take a frame that is cut off
    for a whole one (zstandard).
    """

    def __init__(self, source: io.BufferedReader, begin: Callable[[], Any]) -> None:
        self._source = source
        self._begin = begin
        self._frame = begin()
        self._rest = b""

    def read(self, size: int, /) -> bytes:  # noqa: ARG002 - pieces are bounded by what goes in
        while True:
            if self._frame.eof:
                self._rest = self._frame.unused_data or self._source.read(_INPUT_SIZE)
                if not self._rest:
                    return b""
                self._frame = self._begin()
            packed, self._rest = self._rest or self._source.read(_INPUT_SIZE), b""
            if not packed:
                raise EOFError
            if data := self._frame.decompress(packed):
                return bytes(data)


def _xz(source: io.BufferedReader) -> _Unpacker:
    return _Frames(source, lambda: lzma.LZMADecompressor(memlimit=_MEMORY_MAX))


def _zstd(source: io.BufferedReader) -> _Unpacker:
    zstandard = import_package("zstandard", "a stream that zstd has packed")
    return _Frames(source, lambda: zstandard.ZstdDecompressor().decompressobj())


def _gzip(source: io.BufferedReader) -> _Unpacker:
    return cast(_Unpacker, gzip.GzipFile(fileobj=source, mode="rb"))


UNPACKERS: Mapping[str, Callable[[io.BufferedReader], Any]] = {
    "gzip": _gzip,
    "bzip2": bz2.BZ2File,
    "xz": _xz,
    "lzop": LzopUnpacker,
    "zstd": _zstd,
}
"""By the name of the program that has packed."""


class _Source(io.RawIOBase):
    """A file from an offset on, as Python's own libraries read files."""

    def __init__(self, file: DumpImage, place: int) -> None:
        self._file = file
        self._position = place

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # as io.RawIOBase declares it
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._file.size - self._position))
        self._file.read_into(self._position, view[:count])
        self._position += count
        return count


def unpacked_pieces(file: DumpImage, place: int, packing: str) -> Iterator[bytes]:
    """Yield what a file has packed from an offset on, in pieces that are bounded.

    Args:
        file: The file.
        place: Where the packed data begins, which reaches up to the file's end.
        packing: One of `UNPACKERS`.

    Raises:
        CorruptDumpError: It is damaged, or is cut off.
        MissingPackageError: What unpacks it is not installed.
    """
    source: io.BufferedReader = io.BufferedReader(_Source(file, place), _PIECE_SIZE)
    with _damage_told(packing):
        unpacker = UNPACKERS[packing](source)
    while True:
        with _damage_told(packing):
            piece = unpacker.read(_PIECE_SIZE)
        if not piece:
            return
        yield piece


@contextmanager
def _damage_told(packing: str) -> Iterator[None]:
    """Turn what the libraries raise into an error of ours."""
    try:
        yield
    except EOFError as error:
        raise CorruptDumpError(f"what {packing} has packed is cut off") from error
    except (OSError, zlib.error, lzma.LZMAError) as error:
        raise CorruptDumpError(f"what {packing} has packed is damaged: {error}") from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # of a package that need not be installed
            raise
        raise CorruptDumpError(f"what {packing} has packed is damaged: {error}") from error


class UnpackedImage(DumpImage):
    """What a file has packed.

    What is damaged or cut off is unpacked up to there, with a line in `problems`.
    """

    def __init__(self, file: DumpImage, place: int, packing: str) -> None:
        """Unpack; on an error, `file` stays open.

        Raises:
            MissingPackageError: What unpacks it is not installed.
            NoRoomLeftError: The directory has too little room.
            RequestError: A file cannot be written there.
        """
        self._file = file
        self._directory = os.environ.get("TMPDIR") or _DIRECTORY
        with refused_as(RequestError, f"create a file in {self._directory}"):
            self._unpacked = tempfile.TemporaryFile(  # noqa: SIM115 - closed in close()
                dir=self._directory, buffering=0
            )
        self.size = 0
        self.problems = file.problems
        self.is_whole = file.is_whole
        try:
            for piece in unpacked_pieces(file, place, packing):
                self._append(piece)
        except CorruptDumpError as error:
            self.problems = (*self.problems, error.message)
            self.is_whole = False
        except BaseException:
            self._unpacked.close()
            raise

    def _append(self, piece: bytes) -> None:
        room = os.fstatvfs(self._unpacked.fileno())
        if room.f_bavail * room.f_frsize - len(piece) < room.f_blocks * room.f_frsize // _KEPT_FREE:
            raise NoRoomLeftError(
                f"{self._directory} has too little room for what is unpacked: {self.size:#x} bytes"
                " so far",
                hint="TMPDIR names another directory",
            )
        with refused_as(RequestError, f"write to a file in {self._directory}"):
            view = memoryview(piece)
            while view:
                view = view[self._unpacked.write(view) :]
        self.size += len(piece)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` of what was packed."""
        self.check(offset, len(buffer))
        while buffer:
            count = os.preadv(self._unpacked.fileno(), [buffer], offset)
            if not count:
                raise CorruptDumpError(f"what was unpacked became shorter than {offset:#x} bytes")
            offset += count
            buffer = buffer[count:]

    def stored(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield all of a range: what was packed has no holes."""
        if size:
            yield offset, offset + size

    def close(self) -> None:
        """Close both files."""
        self._unpacked.close()
        self._file.close()

    def forget(self) -> None:
        """Give back what was unpacked, and leave the packed file open."""
        self._unpacked.close()
