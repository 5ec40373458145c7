"""A guest of which nobody can be asked: its RAM is known otherwise, or from before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.value import Value


class LocatedGuest(Value):
    """What a guest is, and where QEMU's process has its RAM.

    Attributes:
        architecture: Its name.
        core: Which of the architecture's cores its dumps have, by number.
        machine: QOM type of the machine.
        version: Of QEMU; zeros: not known.
        vcpus: How many there are; None: not known.
        blocks: QEMU's address of each RAM block, by ascending gpa.
    """

    architecture: str
    core: int
    machine: str
    version: tuple[int, int, int]
    vcpus: int | None
    blocks: Mapping[RamBlock, int]


class SilentGuest(Value):
    """A guest whose monitors do not answer.

    Attributes:
        pid: Of QEMU's process.
        reason: Why nobody is asked.
        located: What is known of it all the same.
        stands_still: Nothing of its QEMU runs.
        remarks: How it is known, in words.
        doubts: What of it may be otherwise, in words.
    """

    pid: int
    reason: str
    located: LocatedGuest
    stands_still: bool
    remarks: Sequence[str]
    doubts: Sequence[str]


class NoMonitor(Value):
    """Stands where a monitor would.

    Attributes:
        reason: Why there is none.
    """

    reason: str

    def execute(self, command: str) -> NoReturn:
        """Refuse.

        Raises:
            SourceError: Always.
        """
        raise SourceError(f"QEMU cannot be asked for {command!r}: {self.reason}")
