"""The rest of a file, as an image of its own."""

from __future__ import annotations

from collections.abc import Iterator

from qemu_dump_ext.dump_readers._image import DumpImage


class WindowImage(DumpImage):
    """What a file has from an offset on."""

    def __init__(self, file: DumpImage, place: int) -> None:
        file.check(place, 0)
        self._file = file
        self._place = place
        self.size = file.size - place
        self.problems = file.problems
        self.is_whole = file.is_whole

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        self.check(offset, len(buffer))
        self._file.read_into(self._place + offset, buffer)

    def stored(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, end) of what is no hole of the file."""
        for start, end in self._file.stored(self._place + offset, size):
            yield start - self._place, end - self._place

    def close(self) -> None:
        """Close the file."""
        self._file.close()
