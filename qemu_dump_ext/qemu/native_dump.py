"""QEMU's own notes, from a dump of a single byte that QEMU writes in a millisecond.

They have what no other interface shows: the hidden bits of segment caches, registers of a vCPU in
32-bit code in full width, and the note that the guest gave to the vmcoreinfo device.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Sequence

from qemu_dump_ext.errors import MonitorAnswerError, SourceError
from qemu_dump_ext.guest.access import DescriptorMonitor, Monitor
from qemu_dump_ext.host_limits import refused_as
from qemu_dump_ext.qemu.shared_directory import quote_for_monitor, shared_directory
from qemu_dump_ext.structures.elf import parse_loads

LONGEST_EHDR = 64
"""Bytes; that of ELFCLASS64."""
_FD_NAME = "qemu-dump"
_HEAD_SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 24)
_NOTHING_THERE = ("no guest memory to dump", "Invalid parameter 'begin'")
_FULL_DEVICE = "/dev/full"
_COMMAND = "dump-guest-memory"
_CANNOT_WRITE = "failed to write"


class NativeDumps:
    """Asks QEMU for dumps of its own; nobody else does, for somebody may listen who must not.

    Every method raises SourceError where QEMU must not be asked.
    """

    def __init__(
        self, monitor: Monitor, qmp: DescriptorMonitor | None, forbidden: str | None
    ) -> None:
        """Ask a stopped guest's QEMU.

        Args:
            monitor: QEMU's human monitor.
            qmp: QEMU's QMP, or None.
            forbidden: Why QEMU must not be asked, as `why_dumps_are_forbidden` tells; None: it may.
        """
        self._monitor = monitor
        self._qmp = qmp
        self._forbidden = forbidden

    def begin_into(self, descriptor: int, gpa: int, size: int) -> Callable[[], None]:
        """Let QEMU write its ELF dump of a range, without paging, into a descriptor of ours.

        Args:
            descriptor: Stays open here; QEMU closes its own.
            gpa: First guest physical address.
            size: Of the range, in bytes.

        Returns:
            Waits for the end of the dump; raises MonitorAnswerError where QEMU refuses.

        Raises:
            SourceError: Descriptors cannot be passed.
        """
        qmp = self.require_descriptors()
        # Not detached: QEMU's thread would still clean up when the dump is over for all that can
        # be asked, and its list of what forbids migration has no lock. A dump begun, or
        # query-migrate asked, at that time crashes QEMU (seen with 7.2 and 11.1).
        qmp.hand_over(descriptor, _FD_NAME)
        answer = qmp.begin_qmp(
            _COMMAND,
            {"paging": False, "protocol": f"fd:{_FD_NAME}", "begin": gpa, "length": size},
        )

        def wait() -> None:
            try:
                answer()
            except MonitorAnswerError:
                with contextlib.suppress(SourceError):  # QEMU may have taken it
                    qmp.begin_qmp("closefd", {"fdname": _FD_NAME})()
                raise

        return wait

    def dump_byte(self, gpa: int) -> bytes:
        """Let QEMU dump the byte at `gpa`, and return the ELF file.

        Raises:
            SourceError: QEMU refuses, or is elsewhere.
        """
        self._check()
        if self._qmp is not None and self._qmp.passes_descriptors:
            return self._dump_byte_through_descriptor(gpa)
        return self._dump_byte_through_file(gpa)

    def _dump_byte_through_descriptor(self, gpa: int) -> bytes:
        with refused_as(SourceError, "get memory for QEMU to dump into"):
            content = os.memfd_create("qemu-dump-notes")
        try:
            self.begin_into(content, gpa, 1)()
            return os.pread(content, os.fstat(content).st_size, 0)
        finally:
            os.close(content)

    def _dump_byte_through_file(self, gpa: int) -> bytes:
        with shared_directory() as directory:
            path = directory / "notes"
            # Ours, so that QEMU's mode 0400 does not matter, and so that we notice when QEMU
            # writes another file of this name.
            with refused_as(SourceError, f"create a file in {directory}"):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            command = f"{_COMMAND} {quote_for_monitor(path)} {gpa:#x} 1"
            answer = self._monitor.execute(command)
            if "Error:" in answer:
                raise MonitorAnswerError(command, answer)
            content = path.read_bytes()
        if not content:
            raise SourceError("QEMU's file does not appear here: QEMU is elsewhere")
        return content

    def ranges(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return what of a range QEMU dumps, as its own program headers tell.

        QEMU writes into a file that cannot grow, and gives up when the headers are written.

        Args:
            gpa: First guest physical address.
            size: Of the range, in bytes.

        Returns:
            Ranges of guest physical memory, first address and the first one behind, ascending.

        Raises:
            SourceError: QEMU refuses, or descriptors cannot be passed.
        """
        for room in _HEAD_SIZES:
            content = os.memfd_create("qemu-dump-head", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(content, room)
                fcntl.fcntl(content, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
                try:
                    self.begin_into(content, gpa, size)()
                except MonitorAnswerError as error:
                    if any(words in error.answer for words in _NOTHING_THERE):
                        return ()
                    if not os.lseek(content, 0, os.SEEK_CUR):
                        raise
                head = os.pread(content, os.lseek(content, 0, os.SEEK_CUR), 0)
            finally:
                os.close(content)
            loads = parse_loads(head)
            if loads is not None:
                return loads
        raise SourceError("QEMU's dump has too many program headers")

    def has_any(self, gpa: int, size: int) -> bool:
        """Tell whether QEMU dumps anything of a range; nothing is written.

        Raises:
            SourceError: QEMU says neither.
        """
        self._check()
        command = f"{_COMMAND} {_FULL_DEVICE} {gpa:#x} {size:#x}"
        answer = self._monitor.execute(command)
        if any(words in answer for words in _NOTHING_THERE):
            return False
        if _CANNOT_WRITE in answer:
            return True
        raise MonitorAnswerError(command, answer)

    def require_descriptors(self) -> DescriptorMonitor:
        """Return QEMU's QMP, to which a descriptor can be handed over.

        Raises:
            SourceError: There is only the human monitor.
        """
        self._check()
        if self._qmp is None:
            raise SourceError(
                "QEMU takes descriptors of ours through QMP only, not through the human monitor",
                hint="--qmp SOCKET",
            )
        return self._qmp

    def _check(self) -> None:
        if self._forbidden is not None:
            raise SourceError(self._forbidden)
