"""A dump that exists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from os import PathLike
from types import TracebackType
from typing import Self

from qemu_dump_ext.api.views import GuestView
from qemu_dump_ext.dump_readers import VerifyReport
from qemu_dump_ext.dump_readers import open_dump as open_file
from qemu_dump_ext.engine.stored_guest import StoredGuest
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.structures.elf_notes import Note


class StoredDump(GuestView):
    """A dump, as `open_dump` gives it; close it, or use it in a `with`. For one thread at a time.

    Where nothing tells of what guest it is, all but its format and notes raises
    UnsupportedTargetError.

    Attributes:
        format: `elf`, `kdump`, `elf-flattened` or `kdump-flattened`.
        notes: The ELF notes in it.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._dump = open_file(path)

    @cached_property
    def _view(self) -> StoredGuest:  # what is in the file can be had of any guest
        return StoredGuest(self._dump)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._dump.close()

    @property
    def format(self) -> str:
        """`elf`, `kdump`, `elf-flattened` or `kdump-flattened`."""
        return self._dump.format

    @property
    def notes(self) -> Sequence[Note]:
        """The ELF notes, in the order of the file.

        Raises:
            CorruptDumpError: They are not well-formed.
        """
        return self._dump.notes

    def memory_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of the guest memory in it, ascending.

        Raises:
            CorruptDumpError: The dump cannot be read so far.
        """
        return ((block.gpa, block.size) for block in self.ram_blocks)


def open_dump(path: str | PathLike[str]) -> StoredDump:
    """Open a dump for reading.

    Raises:
        RequestError: The file cannot be opened.
        NotADumpError: It is of no format that is read.
        CorruptDumpError: Its headers are damaged.
    """
    return StoredDump(path)


def verify(path: str | PathLike[str]) -> VerifyReport:
    """Read a whole dump and find damage in it.

    Raises:
        RequestError: The file cannot be opened.
        NotADumpError: It is of no format that is read.
        CorruptDumpError: Its headers are damaged.
    """
    with open_file(path) as dump:
        return verify_dump(dump)
