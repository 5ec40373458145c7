"""What the user asked for, checked before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass

from qemu_dump_ext.errors import RequestError

DEFAULT_FORMAT = "elf"
"""The format of QEMU, too, where none is asked for."""


@dataclass(frozen=True)
class MemoryRange:
    """A range of guest physical memory: dump nothing else.

    Attributes:
        begin: First guest physical address.
        length: In bytes; 0 where the user wrote 0.
        is_extension: Asked for by `--range`, which QEMU does not have, and not by the two words
            behind the file.
    """

    begin: int
    length: int
    is_extension: bool = False

    @property
    def end(self) -> int:
        """First guest physical address behind the range."""
        return self.begin + self.length


@dataclass(frozen=True)
class DumpRequest:
    """One dump.

    Attributes:
        format: Name of a `DumpFormat`: `elf`, `kdump-zlib`, `kdump-raw-zlib`, ... Which of the
            other attributes a format has, and which exclude each other, the format says.
        exact: Byte for byte as the attached QEMU would write it.
        paging: One segment for each range that the page tables of the vCPUs map, at its virtual
            address.
        memory_range: Dump nothing else; None: everything.
        vmcoreinfo: Add the note that the guest kernel keeps for readers of dumps.
        kernel: Which kernel's, by its release, where guest memory has several; None: the live one.
        level: Of the page codec; None: the best trade of time and size.
        threads: How many compress; None: as many as there are CPUs.
        exclude_zero: Leave pages of zeros out of a kdump, as makedumpfile's dump level 1 does.
        sparse: Leave holes in an ELF file for pages of zeros, where the file can have any.
        snapshot: Copy guest memory while the guest stands still, and write the dump afterwards.
        max_pause: Seconds for which the guest may stand still; None: any.
    """

    format: str = DEFAULT_FORMAT
    exact: bool = False
    paging: bool = False
    memory_range: MemoryRange | None = None
    vmcoreinfo: bool = True
    kernel: str | None = None
    level: int | None = None
    threads: int | None = None
    exclude_zero: bool = False
    sparse: bool = True
    snapshot: bool = False
    max_pause: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no format can do, in QEMU's words.

        Raises:
            RequestError: A negative range.
        """
        if self.memory_range is not None:
            for name in ("begin", "length"):
                if getattr(self.memory_range, name) < 0:
                    raise RequestError(f"parameter '{name}' must not be negative")
