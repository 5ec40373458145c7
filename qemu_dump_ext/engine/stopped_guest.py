"""A guest that stands still, looked at once: the beginning of every use case.

Stopping it, asking what it is, opening its memory and finding its VMCOREINFO happen here and
nowhere else. Whatever is done with it then works on the one `StoppedGuest`, also several things
one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.engine.guest_view import GuestView, Vmcoreinfo
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.memory_sources import (
    OpenedMemory,
    all_memory_sources,
    memory_source_states,
    open_memory,
)
from qemu_dump_ext.pages.zero_pages import load_before_stopping
from qemu_dump_ext.qemu.probe import ProbedGuest, check_undisturbed, probe_guest
from qemu_dump_ext.qemu.run_state import Pause, PauseLimit, stopped
from qemu_dump_ext.structures.dialect import MENDED
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_text

_SEARCH_SECONDS = 10.0
"""A guest stands still meanwhile; nobody who asked for a dump wants it to be mostly a search."""


class StoppedGuest(GuestView):
    """A guest that stands still; `stopped_guest` opens one."""

    pause: Pause

    def __init__(
        self,
        access: GuestAccess,
        probed: ProbedGuest,
        memory: str,
        opened: ExitStack,
        pause: Pause,
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

    def check_undisturbed(self) -> None:
        """Notice when somebody else let the guest run, or reset it, since it was stopped.

        Raises:
            SourceError: It runs, or a register changed: what was read does not fit together.
        """
        self.pause.check()
        check_undisturbed(self._access.monitor, self.probed)


def import_plug_ins() -> None:
    """Import what a guest may turn out to need, while it still runs."""
    load_before_stopping()
    all_architectures()
    all_memory_sources()


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
    stays as it was.

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
    import_plug_ins()
    with stopped(access, limit=limit, inherits=inherits) as pause, ExitStack() as opened:
        yield StoppedGuest(access, probe_guest(access), memory, opened, pause)
