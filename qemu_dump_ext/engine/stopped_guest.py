"""A guest that stands still, looked at once: the beginning of every use case.

Stopping it, asking what it is, opening its memory and finding its VMCOREINFO happen here and
nowhere else. Whatever is done with it then works on the one `StoppedGuest`, also several things
one after the other.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

from qemu_dump_ext.architectures import architectures_of_target
from qemu_dump_ext.engine.guest_view import GuestView, Vmcoreinfo
from qemu_dump_ext.errors import MonitorAnswerError, SourceError
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.guest.silent import LocatedGuest, SilentGuest
from qemu_dump_ext.memory_sources import (
    AUTO,
    OpenedMemory,
    all_memory_sources,
    memory_source_states,
    open_memory,
)
from qemu_dump_ext.memory_sources.process import SOURCE as PROCESS
from qemu_dump_ext.memory_sources.process import host_addresses, open_located
from qemu_dump_ext.pages.page_set import PageSet
from qemu_dump_ext.pages.zero_pages import load_before_stopping
from qemu_dump_ext.plan.plan import EarlierDump, GuestSnapshot
from qemu_dump_ext.qemu.monitor_queries import read_memory_size
from qemu_dump_ext.qemu.probe import (
    ProbedGuest,
    ask_before_stopping,
    check_undisturbed,
    find_machine,
    probe_guest,
)
from qemu_dump_ext.qemu.process import find_qemu_process
from qemu_dump_ext.qemu.qemu_processes import QemuProcess, qemu_process
from qemu_dump_ext.qemu.run_state import Pause, PauseLimit, stopped
from qemu_dump_ext.qemu.target_name import target_by_qmp
from qemu_dump_ext.structures.dialect import MENDED
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_text
from qemu_dump_ext.value import Value

_SEARCH_SECONDS = 10.0
"""A guest stands still meanwhile; nobody who asked for a dump wants it to be mostly a search."""


class NoPause(Value):
    """Of a guest that nobody can be asked to stop."""

    left = taken_over = None
    is_ours = False

    def seconds(self) -> float:
        """It was not stopped."""
        return 0.0

    def check(self, _size: int = 0) -> None:
        """Nobody tells whether it runs."""


class StoppedGuest(GuestView):
    """A guest that stands still; `stopped_guest` opens one."""

    pause: Pause | NoPause

    def __init__(
        self,
        access: GuestAccess,
        probed: ProbedGuest,
        memory: str,
        opened: ExitStack,
        pause: Pause | NoPause,
    ) -> None:
        """Use what was probed.

        Args:
            access: The ways to the guest.
            probed: What it is.
            memory: Name of the memory source, or `auto`.
            opened: Gets the memory to close.
            pause: For which it stands still.
        """
        super().__init__()
        self._search_seconds = _SEARCH_SECONDS
        self.probed = probed
        self.pause = pause
        self.remarks = tuple(access.remarks)
        self.architecture = probed.architecture
        self.core = probed.architecture.select_core(
            probed.vcpus, probed.ram_blocks, MENDED, probed.machine
        )
        self.ram_blocks = probed.ram_blocks
        self.vcpus = probed.vcpus
        self._access = access
        self._context = access.source_context(probed.ram_blocks, probed.dumps_forbidden)
        self._choice = memory
        self._stack = opened
        self._opened: OpenedMemory | SourceError | None = None

    def _open(self) -> OpenedMemory:
        # When it is asked for: what is refused before needs none.
        if self._opened is None:
            try:
                self._opened = self._stack.enter_context(open_memory(self._choice, self._context))
            except SourceError as error:
                self._opened = error
        if isinstance(self._opened, SourceError):
            raise self._opened
        return self._opened

    @property
    def memory(self) -> GuestMemory:
        """Guest physical memory, opened when it is first asked for.

        Raises:
            SourceError: It cannot be read, or the guest has none.
            RequestError: There is no such memory source.
        """
        return self._open().memory

    @property
    def passed_over(self) -> Sequence[tuple[str, str]]:
        """Faster memory sources, and why each was not taken; errors as `memory`."""
        return self._open().passed_over

    def memory_source_states(self) -> Sequence[tuple[str, str | None]]:
        """Return every memory source, and why it cannot be used or None; the fastest first."""
        known = self._opened.tried if isinstance(self._opened, OpenedMemory) else {}
        return tuple(memory_source_states(self._context, known))

    def _known_vmcoreinfo(self) -> Vmcoreinfo | None:
        note = self.probed.guest_note
        return Vmcoreinfo(note, vmcoreinfo_text(note, self.core.byte_order)) if note else None

    def located(self) -> LocatedGuest:
        """Return what it is, and where QEMU's process has its RAM, for when it does not answer.

        Raises:
            SourceError: The monitor does not tell.
        """
        probed = self.probed
        return LocatedGuest(
            probed.architecture.name,
            probed.architecture.cores.index(self.core),
            probed.machine,
            probed.version,
            len(probed.vcpus),
            host_addresses(self._context),
        )

    def find_process(self) -> QemuProcess:
        """Return its QEMU.

        Raises:
            SourceError: It is not on this host, or cannot be seen.
        """
        pid = self._access.pid or find_qemu_process(self._access.addresses)
        process = qemu_process(pid)
        if process is None:
            raise SourceError(f"process {pid} is no QEMU that can be seen here")
        return process

    def check_undisturbed(self) -> None:
        """Notice when somebody else let the guest run, or reset it, since it was stopped.

        Raises:
            SourceError: It runs, or a register changed: what was read does not fit together.
        """
        self.pause.check()
        check_undisturbed(self._access.monitor, self.probed)


class UnansweredGuest(StoppedGuest):
    """A guest whose monitor does not answer: memory, as its QEMU has it, and no registers."""

    def __init__(
        self, access: GuestAccess, silent: SilentGuest, memory: str, opened: ExitStack
    ) -> None:
        """Use what is known.

        Args:
            access: None of its ways leads there.
            silent: What is known.
            memory: Name of the memory source, or `auto`.
            opened: Gets the memory to close.

        Raises:
            SourceError: What is known is of no guest that can be; or another source is wanted.
        """
        located = silent.located
        architecture = architectures_of_target(located.architecture).get(located.architecture)
        if architecture is None or located.core >= len(architecture.cores):
            raise SourceError(f"{located.architecture} guests are not known")
        blocks = tuple(located.blocks)
        super().__init__(
            access,
            ProbedGuest(
                located.version,
                architecture,
                blocks,
                [(block.gpa, block.end) for block in blocks],
                vcpus=(),
                guest_note=b"",
                native_refusal=None,
                machine=located.machine,
                doubts=tuple(silent.doubts),
            ),
            memory,
            opened,
            NoPause(),
        )
        self._silent = silent
        self._process = qemu_process(silent.pid)
        # Its mode when it was asked may have been that of its firmware.
        order = architecture.cores[located.core].byte_order
        self.core = next(core for core in architecture.cores if core.byte_order == order)
        self.remarks = tuple(silent.remarks)
        self.lacking = (f"registers: {silent.reason}",)
        self.stands_still = silent.stands_still
        if memory not in {AUTO, PROCESS.name}:
            raise SourceError(
                f"memory by {memory}: {silent.reason}", hint=f"--memory {PROCESS.name}"
            )

    def _open(self) -> OpenedMemory:
        if self._opened is None:
            silent = self._silent
            opened = self._stack.enter_context(open_located(silent.pid, silent.located.blocks))
            self._opened = OpenedMemory(opened, (), {PROCESS.name: None})
        return super()._open()

    def memory_source_states(self) -> Sequence[tuple[str, str | None]]:
        """Return every memory source, and why it cannot be used or None; the fastest first."""
        reason = self._silent.reason
        return [(name, None if name == PROCESS.name else reason) for name in all_memory_sources()]

    def complete(self, snapshot: GuestSnapshot) -> GuestSnapshot:
        """Return what a dump is planned from, with what is known of the vCPUs: how many."""
        known = EarlierDump(
            self.core, b"", self._silent.located.vcpus or 1, b"", absent=PageSet(1, ())
        )
        return replace(snapshot, earlier=known)

    def check_undisturbed(self) -> None:
        """Notice when QEMU has ended meanwhile.

        Raises:
            SourceError: It has.
        """
        process = qemu_process(self._silent.pid)
        if process is None or self._process is None or process.started != self._process.started:
            raise SourceError("the guest is gone: QEMU's process has ended")


def import_plug_ins(access: GuestAccess, *others: str) -> None:
    """Import what a guest may turn out to need, and ask what lasts, while it still runs.

    Args:
        access: The ways to the guest.
        others: Modules of the package that this use of the guest needs besides.
    """
    ask_before_stopping(access)
    load_before_stopping(read_memory_size(access.lasting))
    architectures_of_target(target_by_qmp(access))
    with suppress(MonitorAnswerError):  # who needs it is told
        find_machine(access)
    all_memory_sources()
    for name in others:
        importlib.import_module(f"qemu_dump_ext.{name}")


@contextmanager
def stopped_guest(
    access: GuestAccess,
    memory: str,
    limit: PauseLimit | None = None,
    *,
    inherits: bool = True,
) -> Iterator[StoppedGuest]:
    """Keep a guest stopped for the time of a `with` block.

    One that ran runs again afterwards, also after an error or an interrupt; one that was stopped
    stays as it was. One whose monitor does not answer is left as it is.

    Args:
        access: The ways to the guest.
        memory: Name of the memory source, or `auto`.
        limit: Of the pause, or None.
        inherits: A guest that a killed dump has left stopped runs afterwards.

    Raises:
        SourceError: The guest cannot be reached, stopped, or resumed.
        RequestError: QEMU refuses a dump in its run state.
        PauseLimitError: The limit was reached; the guest runs.
        UnsupportedTargetError: No architecture file describes it.
    """
    if access.silent is not None:
        load_before_stopping()
        all_memory_sources()
        with ExitStack() as opened:
            yield UnansweredGuest(access, access.silent, memory, opened)
        return
    import_plug_ins(access)
    with stopped(access, limit=limit, inherits=inherits) as pause, ExitStack() as opened:
        yield StoppedGuest(access, probe_guest(access), memory, opened, pause)
