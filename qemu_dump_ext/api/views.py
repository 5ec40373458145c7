"""What a guest that stands still and one in a dump have in common."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qemu_dump_ext.engine.dmesg import read_log
from qemu_dump_ext.engine.guest_view import GuestView as View
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.third_party import require_extra

if TYPE_CHECKING:
    import drgn


class GuestView:
    """A guest that does not change: `StoppedGuest` or `StoredDump`.

    Attributes:
        architecture: QEMU's name of the target, such as `x86_64`.
        ram_blocks: The RAM blocks by ascending gpa.
        vcpus: The vCPUs by ascending index; empty for a dump without registers.
        vmcoreinfo: What the guest's kernel says of itself; empty where it was not found.
    """

    @property
    def _view(self) -> View:
        raise NotImplementedError

    @property
    def architecture(self) -> str:
        """QEMU's name of the target, such as `x86_64`."""
        return self._view.architecture.name

    @property
    def ram_blocks(self) -> Sequence[RamBlock]:
        """Guest memory, by ascending gpa."""
        return self._view.ram_blocks

    @property
    def vcpus(self) -> Sequence[Vcpu]:
        """By ascending index; empty for a dump without registers."""
        return self._view.vcpus

    @property
    def vmcoreinfo(self) -> bytes:
        """Text in which the guest's kernel tells about itself; empty where it was not found.

        Raises:
            SourceError: Guest memory cannot be read.
        """
        return self._view.find_vmcoreinfo().text

    def read(self, gpa: int, size: int) -> bytes:
        """Return `size` bytes of guest physical memory from `gpa` on.

        Raises:
            GuestMemoryFaultError: Some of it is no memory, or cannot be read.
        """
        return self._view.read(gpa, size)

    def read_kernel(self, gva: int, size: int) -> bytes:
        """Return `size` bytes at an address of the guest's kernel.

        Raises:
            SourceError: The kernel's page tables are not known, or map no memory there.
        """
        return self._view.kernel_memory(self._view.find_vmcoreinfo()).read(gva, size)

    def log(self, *, kernel: str | None = None) -> str:
        """Return the kernel's log, oldest line first.

        Args:
            kernel: Which kernel's, by its release, where guest memory has several; None: the live
                one.

        Raises:
            SourceError: There is no log that can be read.
            RequestError: There is no such kernel.
        """
        records = read_log(self._view, kernel=kernel).records
        return "".join(f"{record.line()}\n" for record in records)

    def drgn(self) -> drgn.Program:
        """Return a program of drgn whose memory is the guest's; it has no symbols yet.

        It reads while it is used: not behind the `with` block of the guest.

        Raises:
            MissingPackageError: drgn is not installed.
            RequestError: drgn knows no such processor.
            SourceError: The kernel does not tell about itself.
        """
        require_extra("drgn", "drgn()")
        module = importlib.import_module("qemu_dump_ext.api.drgn_program")
        program: drgn.Program = module.program_of(self._view)
        return program
