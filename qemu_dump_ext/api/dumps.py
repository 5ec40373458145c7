"""A dump that exists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from os import PathLike
from types import TracebackType
from typing import BinaryIO, Self

from qemu_dump_ext.api.targets import sink_for
from qemu_dump_ext.api.views import GuestView
from qemu_dump_ext.dump_readers import VerifyReport
from qemu_dump_ext.dump_readers import open_dump as open_file
from qemu_dump_ext.engine import convert as converting
from qemu_dump_ext.engine.report import DumpReport
from qemu_dump_ext.engine.stored_guest import StoredGuest
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.plan.request import DEFAULT_FORMAT, DumpOptions
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.structures.elf_notes import Note

_PLAIN = DumpOptions()


class StoredDump(GuestView):
    """A dump, as `open_dump` gives it; close it, or use it in a `with`. For one thread at a time.

    Where nothing tells of what guest it is, all but its format and notes raises
    UnsupportedTargetError.

    Attributes:
        format: `elf`, `kdump`, `elf-flattened`, `kdump-flattened`, or what else it was read as.
        notes: The ELF notes in it.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *parts: str | PathLike[str],
        target: str | None = None,
        layout: str | None = None,
        snapshot_name: str | None = None,
    ) -> None:
        self._dump = open_file(path, *parts, layout=layout, snapshot_name=snapshot_name)
        self._target = target

    @cached_property
    def _view(self) -> StoredGuest:  # what is in the file can be had of any guest
        return StoredGuest(self._dump, target=self._target)

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
        """`elf`, `kdump`, `elf-flattened`, `kdump-flattened`, or what else it was read as."""
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

    def dump(
        self,
        file: str | PathLike[str] | BinaryIO,
        *,
        format: str = DEFAULT_FORMAT,  # noqa: A002 - the word of every door
        options: DumpOptions = _PLAIN,
        force: bool = False,
        keep: bool = False,
    ) -> DumpReport:
        """Make another dump of it.

        Args:
            file: Path, or something open for writing that has a descriptor.
            format: `elf`, `kdump-zlib`, `kdump-raw-zlib`, ...
            options: What else is asked for; nothing that concerns a guest that runs.
            force: Replace a file that exists.
            keep: Mend nothing: the new dump says what this one says.

        Raises:
            RequestError: What is asked for is impossible.
            CorruptDumpError: A page of it is damaged.
            DumpWriteError: The dump cannot be written.
        """
        with sink_for(file, force=force) as sink:
            return converting.convert(
                options.of_format(format),
                self._dump,
                sink,
                progress=ProgressMeter(None),
                target=self._target,
                keep=keep,
            )


def open_dump(
    path: str | PathLike[str],
    *parts: str | PathLike[str],
    target: str | None = None,
    layout: str | None = None,
    snapshot_name: str | None = None,
) -> StoredDump:
    """Open a dump for reading.

    Args:
        path: The file; its format is told by its content.
        parts: The other files of a dump that makedumpfile --split wrote.
        target: QEMU's name of the guest's target, where nothing in the dump tells it.
        layout: How RAM without any headers lies: a machine such as `q35` or `aarch64/virt`, or
            `GPA:SIZE[@OFFSET],...`.
        snapshot_name: Name or ID of the snapshot in a qcow2 image that has several.

    Raises:
        RequestError: The file cannot be opened.
        NotADumpError: It is of no format that is read.
        CorruptDumpError: Its headers are damaged.
    """
    return StoredDump(path, *parts, target=target, layout=layout, snapshot_name=snapshot_name)


def convert(
    source: str | PathLike[str],
    file: str | PathLike[str] | BinaryIO,
    *,
    format: str = DEFAULT_FORMAT,  # noqa: A002 - the word of every door
    options: DumpOptions = _PLAIN,
    force: bool = False,
    keep: bool = False,
) -> DumpReport:
    """Make another dump of a dump that exists, as `open_dump` and `StoredDump.dump` do."""
    with open_dump(source) as dump:
        return dump.dump(file, format=format, options=options, force=force, keep=keep)


def verify(path: str | PathLike[str]) -> VerifyReport:
    """Read a whole dump and find damage in it.

    Raises:
        RequestError: The file cannot be opened.
        NotADumpError: It is of no format that is read.
        CorruptDumpError: Its headers are damaged.
    """
    with open_file(path) as dump:
        return verify_dump(dump)
