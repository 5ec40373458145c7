"""What the user asked for, checked before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.page_codecs import codec_names


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
        codec: Page codec of a kdump, by name; None for an ELF core.
        raw: Write the kdump as it is instead of as makedumpfile's flattened stream.
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

    codec: str | None = None
    raw: bool = False
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
        """Refuse what contradicts itself, in QEMU's words.

        Raises:
            RequestError: A kdump with paging, or with a range that QEMU knows; a negative range.
        """
        bounds = self.memory_range
        refused_range = bounds is not None and (self.exact or not bounds.is_extension)
        if self.codec is not None and (self.paging or refused_range):
            raise RequestError(
                "kdump-compressed format doesn't support paging or filter",
                hint=None if self.paging or self.exact else "--range BEGIN LENGTH does",
            )
        if bounds is not None:
            for name in ("begin", "length"):
                if getattr(bounds, name) < 0:
                    raise RequestError(f"parameter '{name}' must not be negative")

    @property
    def format_name(self) -> str:
        """The name of QMP's DumpGuestMemoryFormat: `elf`, `kdump-zlib`, `kdump-raw-zlib`."""
        if self.codec is None:
            return "elf"
        return f"kdump-raw-{self.codec}" if self.raw else f"kdump-{self.codec}"


def request_of_format(name: str, level: int | None = None) -> DumpRequest:
    """Return the request for a format, by the name that QMP has for it.

    Raises:
        ValueError: There is no such format.
    """
    if name == "elf":
        return DumpRequest()
    codecs = codec_names()
    for prefix, raw in (("kdump-raw-", True), ("kdump-", False)):
        codec = name.removeprefix(prefix)
        if name.startswith(prefix) and codec in codecs:
            return DumpRequest(codec=codec, raw=raw, level=level)
    raise ValueError(f"a format is elf, or kdump- or kdump-raw- and one of {', '.join(codecs)}")
