"""What the user asked for, checked before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DumpRequest:
    """One dump.

    Attributes:
        codec: Page codec of a kdump, by name; None for an ELF core.
        raw: Write the kdump as it is instead of as makedumpfile's flattened stream.
        exact: Byte for byte as the attached QEMU would write it.
        level: Of the page codec; None: the best trade of time and size.
        threads: How many compress; None: as many as there are CPUs.
        exclude_zero: Leave pages of zeros out of a kdump, as makedumpfile's dump level 1 does.
        sparse: Leave holes in an ELF file for pages of zeros, where the file can have any.
        snapshot: Copy guest memory while the guest stands still, and write the dump afterwards.
        max_pause: Seconds for which the guest may stand still; None: any.
    """

    codec: str | None = None
    raw: bool = False
    exact: bool = False
    level: int | None = None
    threads: int | None = None
    exclude_zero: bool = False
    sparse: bool = True
    snapshot: bool = False
    max_pause: float | None = None

    @property
    def format_name(self) -> str:
        """The name of QMP's DumpGuestMemoryFormat: `elf`, `kdump-zlib`, `kdump-raw-zlib`."""
        if self.codec is None:
            return "elf"
        return f"kdump-raw-{self.codec}" if self.raw else f"kdump-{self.codec}"
