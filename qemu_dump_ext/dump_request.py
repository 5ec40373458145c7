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
    """

    codec: str | None = None
    raw: bool = False
    exact: bool = False

    @property
    def format_name(self) -> str:
        """The name of QMP's DumpGuestMemoryFormat: `elf`, `kdump-zlib`, `kdump-raw-zlib`."""
        if self.codec is None:
            return "elf"
        return f"kdump-raw-{self.codec}" if self.raw else f"kdump-{self.codec}"
