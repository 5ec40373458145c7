"""A guest that does not change while it is looked at: one that stands still, or a dump of one.

What is done with a guest (its log, its description, a dump) is done with a `GuestView` and need
not know which of the two it has.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from qemu_dump_ext.architectures import Architecture, Core
from qemu_dump_ext.errors import GuestMemoryFaultError, RequestError
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.linux.kernel_memory import KernelMemory, read_utsname
from qemu_dump_ext.linux.vmcoreinfo_search import NoteSearch
from qemu_dump_ext.pages.pipeline import populated_ranges
from qemu_dump_ext.plan.plan import DumpPlan, GuestSnapshot
from qemu_dump_ext.qemu.probe import ProbedGuest
from qemu_dump_ext.structures.dialect import MENDED, Dialect
from qemu_dump_ext.structures.utsname import UtsName
from qemu_dump_ext.value import Value

if TYPE_CHECKING:
    from qemu_dump_ext.linux.kernel_pages import KernelPages
    from qemu_dump_ext.structures.win_dmp import WindowsDump


class StandsStill(Protocol):
    """The time for which a guest does not change."""

    @property
    def left(self) -> str | None:
        """What somebody else made of it meanwhile, in which it was left; None: nothing."""

    @property
    def taken_over(self) -> str | None:
        """Who had stopped it before and could not let it run again; None: nobody."""

    def seconds(self) -> float:
        """Return how long it has been."""

    def check(self) -> None:
        """Raise what has ended it before its time, if anything has.

        Raises:
            DumpError: What is read of the guest now is worth nothing.
        """


class Vmcoreinfo(Value):
    """What the guest's kernel tells readers of dumps about itself.

    Attributes:
        note: The ELF note of it, header included; empty where there is none.
        text: The text in that note; empty likewise.
        remarks: Where in memory it was found, or that it was not; empty where it was not looked
            for.
        gpa: Where in memory; None: not known, or not looked for.
    """

    note: bytes = b""
    text: bytes = b""
    remarks: tuple[str, ...] = ()
    gpa: int | None = None


class GuestView(ABC):
    """A guest that does not change, and its memory.

    Attributes:
        architecture: Of the guest.
        core: Form of the headers and notes of its dumps.
        ram_blocks: By ascending gpa.
        vcpus: By ascending cpu_index; empty where their registers are not known.
        probed: What it is, as QEMU tells, or the dump.
        pause: For which it stands still.
        dialect: How dumps of it are spelt, but for those that are to be exact.
        lacking: What of the guest cannot be had, in words.
        remarks: What else is to be known of it.
        stands_still: It does not run while it is looked at.
    """

    architecture: Architecture
    core: Core
    ram_blocks: Sequence[RamBlock]
    vcpus: Sequence[Vcpu]
    probed: ProbedGuest
    pause: StandsStill
    dialect: Dialect = MENDED
    lacking: Sequence[str] = ()
    remarks: Sequence[str] = ()
    stands_still: bool = True

    def __init__(self) -> None:
        self._found: dict[tuple[str | None, bool], Vmcoreinfo] = {}
        self._pages: dict[Vmcoreinfo, KernelPages] = {}
        self._search_seconds = math.inf

    @property
    @abstractmethod
    def memory(self) -> GuestMemory:
        """Guest physical memory.

        Raises:
            SourceError: It cannot be read.
        """

    @property
    def passed_over(self) -> Sequence[tuple[str, str]]:
        """Faster memory sources, and why each was not taken; errors as `memory`."""
        return ()

    def complete(self, snapshot: GuestSnapshot) -> GuestSnapshot:
        """Return what a dump is planned from, with what only this kind of guest knows."""
        return snapshot

    def differences(self, plan: DumpPlan, dump_format: str) -> Sequence[str] | None:
        """Say how a dump differs from the one that the guest is in; None: it is in none.

        Args:
            plan: Of the dump.
            dump_format: Name of its format.
        """
        del plan, dump_format
        return None

    @abstractmethod
    def _known_vmcoreinfo(self) -> Vmcoreinfo | None:
        """Return what is known without a search; None where nothing is."""

    def read(self, gpa: int, size: int) -> bytes:
        """Return `size` bytes of guest memory from `gpa` on.

        Raises:
            GuestMemoryFaultError: Some of it is no memory, or cannot be read.
            SourceError: Guest memory cannot be had at all.
        """
        if size < 0 or not self._has(gpa, size):
            raise GuestMemoryFaultError(gpa, size, "not all of it is guest memory")
        data = bytearray(size)
        for block in self.ram_blocks:
            low, high = max(block.gpa, gpa), min(block.end, gpa + size)
            if low < high:
                # What was never stored is zero; reading it could make QEMU allocate memory.
                for start, end in populated_ranges(self.memory, low, high):
                    self.memory.read_into(start, memoryview(data)[start - gpa : end - gpa])
        return bytes(data)

    def _has(self, gpa: int, size: int) -> bool:
        # Before room is made for it.
        covered = (min(block.end, gpa + size) - max(block.gpa, gpa) for block in self.ram_blocks)
        return sum(max(0, count) for count in covered) == size

    @property
    def search_seconds(self) -> float:
        """How long a search through all memory may take; infinite where that does not matter."""
        return self._search_seconds

    def program_counters(self) -> Sequence[int]:
        """Return where the vCPUs are, as far as that is known."""
        name = self.architecture.program_counter
        return [vcpu.registers[name] for vcpu in self.vcpus if name in vcpu.registers]

    def find_vmcoreinfo(
        self,
        kernel: str | None = None,
        advance: Callable[[int], None] = lambda _size: None,
        *,
        everywhere: bool = True,
    ) -> Vmcoreinfo:
        """Return the kernel's VMCOREINFO; memory is searched for it at most once.

        Args:
            kernel: Which kernel's, as `NoteSearch.find` takes it; None: the live one.
            advance: Is told the bytes of each piece that is searched; may raise.
            everywhere: Search all of memory, and not only where one was found before.

        Raises:
            SourceError: Memory cannot be read.
            RequestError: There is no such kernel.
        """
        for searched in (True, everywhere):
            if (kernel, searched) in self._found:
                return self._found[kernel, searched]
        known = self._known_vmcoreinfo() if kernel is None else None
        found = known or self._search(kernel, advance, everywhere=everywhere)
        self._found[kernel, everywhere] = found
        return found

    def _search(
        self, kernel: str | None, advance: Callable[[int], None], *, everywhere: bool
    ) -> Vmcoreinfo:
        search = NoteSearch(
            self.architecture,
            self.core.byte_order,
            self.memory,
            self.ram_blocks,
            self.vcpus,
            advance=advance,
            seconds=self._search_seconds if kernel is None else math.inf,
        )
        result = search.find(kernel, everywhere=everywhere)
        if result.chosen is None:
            return Vmcoreinfo(remarks=result.remarks)
        chosen = result.chosen
        return Vmcoreinfo(chosen.note, chosen.text, result.remarks, chosen.gpa)

    def kernel_memory(self, vmcoreinfo: Vmcoreinfo) -> KernelMemory:
        """Return memory at the addresses of the kernel that `vmcoreinfo` is of.

        Raises:
            SourceError: Its addresses cannot be translated.
        """
        return KernelMemory(self.architecture, self.memory, self.ram_blocks, vmcoreinfo.text)

    def functions_of_vcpus(self, vmcoreinfo: Vmcoreinfo) -> Sequence[str]:
        """Return the functions of the kernel in which the vCPUs are, as `linux.call_trace` does.

        Raises:
            SourceError: The kernel does not say where it keeps the names of its functions, or its
                addresses cannot be translated.
        """
        from qemu_dump_ext.linux.call_trace import functions_of_vcpus  # noqa: PLC0415 - for few

        return functions_of_vcpus(
            self.architecture,
            self.vcpus,
            self.kernel_memory(vmcoreinfo),
            vmcoreinfo.text,
            self.core.byte_order,
        )

    def kernel_pages(self, vmcoreinfo: Vmcoreinfo) -> KernelPages:
        """Return the pages of the guest as the kernel that `vmcoreinfo` is of accounts for them.

        Raises:
            SourceError: There is no VMCOREINFO, or it says too little.
        """
        from qemu_dump_ext.linux.kernel_pages import KernelPages  # noqa: PLC0415 - for few

        if vmcoreinfo not in self._pages:
            start, size = vmcoreinfo.gpa, len(vmcoreinfo.note)
            self._pages[vmcoreinfo] = KernelPages(
                self.architecture,
                self.memory,
                self.ram_blocks,
                vcpus=self.vcpus,
                vmcoreinfo=vmcoreinfo.text,
                byte_order=self.core.byte_order,
                kept=() if start is None else ((start, start + size),),
            )
        return self._pages[vmcoreinfo]

    def read_utsname(self, vmcoreinfo: Vmcoreinfo) -> UtsName:
        """Return what the kernel that `vmcoreinfo` is of calls itself; empty where unknown."""
        return read_utsname(self.memory, self.architecture, self.ram_blocks, vmcoreinfo.text)

    @property
    def covered_blocks(self) -> Sequence[RamBlock]:
        """What memory the guest has, by ascending gpa; also what cannot be read."""
        return self.ram_blocks

    @property
    def windows_note(self) -> bytes | None:
        """What a driver has left in QEMU's vmcoreinfo device; None: it could not be had."""
        return self.probed.guest_note

    def describe_windows(self, note: bytes | None, dialect: Dialect) -> WindowsDump:
        """Return what a Windows dump of it has besides its memory.

        Args:
            note: As `windows_note`; empty where there is none, or it is not to be used.
            dialect: How the dump is spelt.

        Raises:
            RequestError: It does not run Windows, or what tells of its kernel is not there.
            SourceError: Memory, or a register, cannot be had.
        """
        from qemu_dump_ext.windows.describe import describe_windows  # noqa: PLC0415 - for few
        from qemu_dump_ext.windows.system_memory import WindowsGuest  # noqa: PLC0415

        architecture, native = self.architecture, dialect.windows_as_qemu
        if not (architecture.windows_by_qemu if native else architecture.runs_windows):
            raise RequestError("Windows dump is only available for x86-64")
        if not self.vcpus or not self.ram_blocks:
            raise RequestError(
                "dump: no guest memory to dump",
                hint="a Windows dump is made of RAM and of the registers of vCPUs",
            )
        guest = WindowsGuest(architecture, self.vcpus, self.memory, self.ram_blocks)
        return describe_windows(guest, note, dialect)
