"""What the user asked for, checked before anything is touched."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import Literal, get_args

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.value import Value

DEFAULT_FORMAT = "elf"
"""The format of QEMU, too, where none is asked for."""
ZERO = 1
"""Of a dump level: pages of zeros share one page. They are no less there."""
MiniDump = Literal["usual", "smallest"]
MINI_DUMPS: tuple[MiniDump, ...] = get_args(MiniDump)
WINDOWS_FORMAT = "win-dmp"
"""What -w asks for."""
DUMP_LEVEL_MAX = 31
"""All that makedumpfile can leave out."""


class Live(StrEnum):
    """Whether a guest is dumped while it runs; the words behind `--live`."""

    REQUIRE = "require"
    PREFER = "prefer"


class MemoryRange(Value):
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


class DumpOptions(Value, kw_only=True):
    """What can be asked for of a dump besides its format.

    Which of it a format has, and what excludes each other, the format says.

    Attributes:
        exact: Byte for byte as the attached QEMU would write it.
        paging: One segment for each range that the page tables of the vCPUs map, at its virtual
            address.
        memory_range: Dump nothing else; None: everything.
        vmcoreinfo: Add the note that the guest kernel keeps for readers of dumps.
        kernel: Which kernel's, by its release, where guest memory has several; None: the live one.
        level: Of the page codec; None: the best trade of time and size.
        threads: How many compress; None: as many as there are CPUs.
        omit_zero: Leave pages of zeros out of a kdump, where they otherwise share one page, as they
            do with makedumpfile's dump level 1, or out of a Windows dump.
        sparse: Leave holes for pages of zeros in an ELF core or a Windows dump, where the file can
            have any.
        snapshot: Copy guest memory while the guest stands still, and write the dump afterwards.
        live: Have QEMU stream the guest while it runs; None: it stands still. Where that cannot be:
            `require` is an error, but for a guest that does not run; `prefer` takes a snapshot.
        dump_level: Which pages are left out, as makedumpfile numbers them: a sum of 1 (zeros), 2
            (cache), 4 (cache with private data, too), 8 (user) and 16 (free).
        mini: What triage needs: dump level 31, and the struct pages of pages that are left out are
            left out, too; `smallest`: so is the kernel's code. None: no more than the level.
        dump_level_required: Rather no dump than one of all pages, where they cannot be told apart.
        max_bytes: Take the lowest dump level, from `dump_level` on, of which the dump is no larger,
            and rather none than a larger one; None: any size.
        max_pause: Seconds for which the guest may stand still; None: any.
    """

    exact: bool = False
    paging: bool = False
    memory_range: MemoryRange | None = None
    vmcoreinfo: bool = True
    kernel: str | None = None
    level: int | None = None
    threads: int | None = None
    omit_zero: bool = False
    sparse: bool = True
    snapshot: bool = False
    live: Live | None = None
    dump_level: int = 0
    mini: MiniDump | None = None
    dump_level_required: bool = False
    max_bytes: int | None = None
    max_pause: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no format can do, in QEMU's words.

        Raises:
            RequestError: A negative range; a mini dump of another level, or one that is exact;
                two ways to a short pause.
        """
        if self.mini is not None and (self.exact or self.dump_level not in {0, DUMP_LEVEL_MAX}):
            what = "QEMU has no mini dumps" if self.exact else "a mini dump is of dump level 31"
            raise RequestError(what, hint="--mini goes with neither --exact nor another level")
        if self.live is not None and self.snapshot:
            raise RequestError("--live and --snapshot exclude each other: give one of them")
        if self.memory_range is not None:
            for name in ("begin", "length"):
                if getattr(self.memory_range, name) < 0:
                    raise RequestError(f"parameter '{name}' must not be negative")

    @property
    def level_of_pages(self) -> int:
        """The dump level, also of a mini dump."""
        return self.dump_level if self.mini is None else DUMP_LEVEL_MAX

    def of_format(self, name: str) -> DumpRequest:
        """Return the request for a dump of a format; a range is one for every format."""
        bounds = self.memory_range
        if bounds is not None and not self.exact:
            bounds = replace(bounds, is_extension=True)
        return DumpRequest(**{**vars(self), "format": name, "memory_range": bounds})


class DumpRequest(DumpOptions, kw_only=True):
    """One dump.

    Attributes:
        format: Name of a `DumpFormat`: `elf`, `kdump-zlib`, `kdump-raw-zlib`, ...
    """

    format: str = DEFAULT_FORMAT
