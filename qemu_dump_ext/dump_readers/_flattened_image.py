"""Read a flattened stream as the dump that it describes.

Source: makedumpfile IMPLEMENTATION ("flattened format"), makedumpfile.c (rearrange_dumpdata).
"""

from __future__ import annotations

from collections.abc import Iterator

from qemu_dump_ext.dump_readers._extent_index import ExtentIndex, merged_pairs
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.errors import CorruptDumpError
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

_LAST_OFFSET = (1 << 63) - 1


def is_flattened(head: bytes) -> bool:
    """Tell from the first bytes of a file whether it is a flattened stream."""
    return head.startswith(FLATTENED_SIGNATURE + b"\0")


class FlattenedImage(DumpImage):
    """The dump inside a flattened stream.

    The chunk headers are read one after the other when it is opened. They come in any order and
    a later chunk wins. A stream that ends too early or has a bad chunk header is indexed up to
    there, with a line in `problems`; what is missing then fails to read, while in a whole stream a
    gap between chunks reads as zero, as the hole that `makedumpfile -R` leaves.
    """

    def __init__(self, file: DumpImage) -> None:
        self._file = file
        header = FLATTENED_HEADER.bind(FLATTENED_ABI)
        fields = header.unpack_integers(file.read(0, header.size))
        if (fields["type"], fields["version"]) != (FLATTENED_TYPE, FLATTENED_VERSION):
            raise CorruptDumpError(
                f"flattened header at offset {header.offsets['type']:#x} has type {fields['type']}"
                f" and version {fields['version']}, not {FLATTENED_TYPE} and {FLATTENED_VERSION}"
            )
        self._index = ExtentIndex()
        self.is_whole = False  # until the end marker is seen
        problem = self._read_chunk_headers()
        self.problems = () if problem is None else (problem,)
        self.chunk_count = len(self._index)
        if not self.chunk_count:
            raise CorruptDumpError(problem or "flattened stream without a chunk")
        self._index.settle()
        self.size = max(start + size for start, size in self._index.ranges())

    def _read_chunk_headers(self) -> str | None:
        codec = FLATTENED_CHUNK.bind(FLATTENED_ABI).codec
        read, append, end = self._file.read, self._index.append, self._file.size
        position = FLATTENED_HEADER_SIZE
        while position + codec.size <= end:
            offset, size = codec.unpack(read(position, codec.size))
            data = position + codec.size
            if offset == size == FLATTENED_END:
                self.is_whole = True
                if data != end:
                    return f"{end - data} bytes behind the end marker at offset {position:#x}"
                return None
            if offset < 0 or size <= 0 or offset > _LAST_OFFSET - size:
                return f"bad chunk header at offset {position:#x}: offset {offset}, size {size}"
            if data + size > end:
                return (
                    f"chunk at offset {position:#x} of {size:#x} bytes reaches beyond the end of"
                    f" the file at {end:#x}"
                )
            append(offset, size, data)
            position = data + size
        return f"flattened stream has no end marker: the file ends at {end:#x}"

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` of the dump."""
        self.check(offset, len(buffer))
        done = 0
        for size, place in self._index.pieces(offset, len(buffer)):
            part = buffer[done : done + size]
            if place is not None:
                self._file.read_into(place, part)
            elif self.is_whole:
                part[:] = bytes(size)
            else:
                raise CorruptDumpError(
                    f"{size:#x} bytes at offset {offset + done:#x} are missing: {self.problems[0]}"
                )
            done += size

    def stored(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, end) of what is in a chunk, and no hole of the file."""
        for length, place in self._index.pieces(offset, size):
            if place is not None:
                for start, end in self._file.stored(place, length):
                    yield offset + start - place, offset + end - place
            elif offset >= self.size or not self.is_whole:
                yield offset, offset + length
            offset += length

    def readable(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, end) of what is in a chunk, or in a gap of a stream that is whole."""
        return merged_pairs(self._readable_pieces(offset, min(size, self.size - offset)))

    def _readable_pieces(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        for length, place in self._index.pieces(offset, size):
            if place is not None or self.is_whole:
                yield offset, offset + length
            offset += length

    def close(self) -> None:
        """Close the file."""
        self._file.close()
