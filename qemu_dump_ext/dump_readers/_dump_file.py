"""What every dump that can be read offers, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import islice
from types import MappingProxyType, TracebackType
from typing import Self

from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.guest.memory import ReadPacked
from qemu_dump_ext.guest.model import Vcpu
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.structures.elf_notes import Note, parse_notes
from qemu_dump_ext.structures.utsname import UTSNAME_FIELDS, UtsName

_NOTES_SIZE_MAX = 64 << 20
"""More bytes of notes than thousands of vCPUs need; a larger number in a header is damage."""
_NOTES_MAX = 1 << 16
VMCOREINFO_SIZE_MAX = 1 << 20
"""More than Linux ever gives it, which is one page of at most 64 KiB."""
_PRSTATUS64_SIZE_MIN = 300
"""Between the largest struct elf_prstatus with 32-bit words, 268 bytes (PPC), and the smallest with
64-bit words, 328 (QEMU on 32-bit PPC, which has the prefix of the 64-bit one). The words of the
dump do not tell: 32-bit guests come in ELFCLASS64."""
_PR_PID_OFFSET_32, _PR_PID_OFFSET_64 = 24, 32
"""The offset of pr_pid in struct elf_prstatus. Source: Linux include/linux/elfcore.h."""


class DumpFile(ABC):
    """An open dump. Use as a context manager; not for several threads at once.

    Attributes:
        image: The bytes of the dump, rearranged if it is flattened.
        format: `elf`, `kdump`, `elf-flattened`, `kdump-flattened`, ...
        reader: Name of the `DumpReader` that opened it.
        byte_order: The byte order of the dump, which is the guest's.
        word_size: 4 or 8 bytes, as the dump's headers have it.
        page_size: Unit of presence, in bytes.
        header: Integers and strings of the main header, under their names in C.
        threads: How many may unpack what is read; None: one for each CPU.
    """

    image: DumpImage
    format: str
    reader: str
    byte_order: ByteOrder
    word_size: int
    page_size: int
    header: Mapping[str, int | str]
    threads: int | None = None

    @property
    def vcpus(self) -> Sequence[Vcpu]:
        """The vCPUs, of a format that has registers that are in no note; empty of others."""
        return ()

    @property
    def lacking(self) -> Sequence[str]:
        """What of the guest is not in it, besides memory, in words."""
        return tuple(problem for file in self.files for problem in file.image.problems)

    @property
    def files(self) -> Sequence[DumpFile]:
        """The dump itself, or the parts of one that was split into several files."""
        return (self,)

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
        self.image.close()

    @cached_property
    def notes(self) -> tuple[Note, ...]:
        """The notes, in the order of the dump.

        Raises:
            CorruptDumpError: They are not well-formed.
        """
        return self._read_notes()

    def _read_notes(self) -> tuple[Note, ...]:
        found: list[Note] = []
        total = 0
        for offset, size in self._note_areas():
            total += size
            if total > _NOTES_SIZE_MAX:
                raise CorruptDumpError(f"notes at offset {offset:#x} of {size:#x} bytes: too large")
            left = _NOTES_MAX - len(found)
            notes = parse_notes(self.image.read(offset, size), self.byte_order, offset)
            found += islice(notes, left + 1)
            if len(found) > _NOTES_MAX:
                raise CorruptDumpError(f"more than {_NOTES_MAX} notes: more than any dump has")
        return tuple(found)

    @abstractmethod
    def _note_areas(self) -> list[tuple[int, int]]:
        """Return (offset, size) of each area of notes."""

    @cached_property
    def vmcoreinfo(self) -> bytes | None:
        """Text of the guest kernel's VMCOREINFO, up to its first NUL; None without.

        Raises:
            CorruptDumpError: The notes are not well-formed.
        """
        for note in self.notes:
            if note.name == "VMCOREINFO":
                if len(note.descriptor) > VMCOREINFO_SIZE_MAX:
                    raise CorruptDumpError(
                        f"VMCOREINFO of {len(note.descriptor):#x} bytes: too large"
                    )
                return note.descriptor.partition(b"\0")[0]
        return None

    @property
    def vmcoreinfo_facts(self) -> Mapping[str, str]:
        """VMCOREINFO as key and value, such as `OSRELEASE`; none where the notes are damaged."""
        text = ""
        with suppress(CorruptDumpError):
            text = (self.vmcoreinfo or b"").decode("utf-8", "backslashreplace")
        pairs = (line.partition("=") for line in text.splitlines())
        return MappingProxyType({key: value for key, equals, value in pairs if equals})

    def pid_of(self, note: Note) -> int | None:
        """Return pr_pid of an NT_PRSTATUS note; QEMU sets it to the vCPU's number + 1.

        None if it is another note, or too short.
        """
        size = len(note.descriptor)
        start = _PR_PID_OFFSET_64 if size >= _PRSTATUS64_SIZE_MIN else _PR_PID_OFFSET_32
        if not note.is_prstatus or size < start + 4:
            return None
        return int.from_bytes(note.descriptor[start : start + 4], self.byte_order)

    @property
    def machine(self) -> int | str | None:
        """What the dump says of the machine: EM_* or utsname.machine; None: nothing."""
        return self.header.get("e_machine", self.header.get("machine"))

    @property
    def utsname(self) -> UtsName:
        """What the header says that the kernel calls itself; empty where it does not."""
        return UtsName(**{name: str(self.header.get(name, "")) for name in UTSNAME_FIELDS})

    @property
    def windows_header(self) -> bytes | None:
        """The header of a full dump of Windows with this memory; None: it is no such dump."""
        return None

    @property
    def phys_base(self) -> int | None:
        """Physical minus link address of the kernel; None where the format does not tell."""
        return None

    @abstractmethod
    def memory_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of the guest memory in the dump, ascending, merged.

        Raises:
            CorruptDumpError: The dump cannot be read so far.
        """

    def covered_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of the guest memory that the dump is about, ascending, merged.

        With what was left out of it on purpose; errors as `memory_ranges`.
        """
        return self.memory_ranges()

    def stored_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of what the dump says to have data of, ascending, merged.

        What is memory and has no data is not stored, though it reads as zero; errors as
        `memory_ranges`.
        """
        return self.memory_ranges()

    def readable_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of what of `stored_ranges` is in the file, ascending, merged.

        Without what was lost when the dump was written, or cut off afterwards; errors as
        `memory_ranges`.
        """
        return self.stored_ranges()

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return (gpa, end) of what may not be zero in a part of one of `memory_ranges`."""
        return [(gpa, gpa + size)]

    def packed_pages(self, codec: str, page_size: int) -> ReadPacked | None:  # noqa: ARG002
        """Return what reads pages as they are packed, see `PackedMemory`; None: there are none."""
        return None

    @abstractmethod
    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` with guest memory from `gpa`.

        Raises:
            GuestMemoryFaultError: The dump does not have all of it.
            CorruptDumpError: The dump says that it has it, and is damaged there.
        """

    def read(self, gpa: int, size: int) -> bytes:
        """Return `size` bytes of guest memory from `gpa`; errors as `read_into`.

        `size` is the caller's: it is allocated before anything is read.
        """
        data = bytearray(size)
        self.read_into(gpa, memoryview(data))
        return bytes(data)
