"""A guest as it was at one moment, copied, while it runs on: out of QEMU's stream, or stopped.

What is done with it is done as with a guest that stands still, and the guest knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from qemu_dump_ext.engine.guest_view import GuestView, Vmcoreinfo
from qemu_dump_ext.engine.stopped_guest import StoppedGuest, import_plug_ins
from qemu_dump_ext.errors import GuestMemoryFaultError, NotLiveError
from qemu_dump_ext.guest.access import GuestAccess, QmpMonitor
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.host_limits import require_room
from qemu_dump_ext.pages.copied_memory import room_for_copy
from qemu_dump_ext.pages.streamed_memory import StreamedMemory
from qemu_dump_ext.qemu.background_snapshot import (
    LiveStream,
    hangs_when_ended,
    require_streamable,
    stream_running_guest,
)
from qemu_dump_ext.qemu.probe import ProbedGuest, probe_running_guest
from qemu_dump_ext.qemu.run_state import PauseLimit
from qemu_dump_ext.registers.from_migration import registers_without_note, vcpus_of_stream
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.structures.dialect import MENDED
from qemu_dump_ext.structures.migration import MigrationStream
from qemu_dump_ext.structures.vmcoreinfo import note_at_page_start, vmcoreinfo_text
from qemu_dump_ext.structures.win_dmp import is_windows_note
from qemu_dump_ext.value import Value

_NOTE_SIZE_MAX = 1 << 20


class PastPause(Value):
    """How long the guest stood still, which is over.

    Attributes:
        duration: In seconds.
        left: What somebody else made of the guest meanwhile: nothing that is known.
        taken_over: Who had stopped it before and could not let it run again: nobody.
    """

    duration: float
    left: str | None = None
    taken_over: str | None = None

    def seconds(self) -> float:
        """Return for how long it has stood still."""
        return self.duration

    def check(self, _size: int = 0) -> None:
        """Find nothing: what was taken stays as it is."""


class CopiedGuest(GuestView):
    """A guest as it was when it was copied, while it runs on."""

    def __init__(self, probed: ProbedGuest, memory: GuestMemory, pause_seconds: float) -> None:
        """Use a copy.

        Args:
            probed: What the guest was.
            memory: The copy of its memory.
            pause_seconds: How long it stood still.
        """
        super().__init__()
        self.probed = probed
        self.pause = PastPause(pause_seconds)
        self.architecture = probed.architecture
        self.core = probed.architecture.select_core(
            probed.vcpus, probed.ram_blocks, MENDED, probed.machine
        )
        self.ram_blocks = probed.ram_blocks
        self.vcpus = probed.vcpus
        self._memory = memory

    @property
    def memory(self) -> GuestMemory:
        """The copy."""
        return self._memory

    def _known_vmcoreinfo(self) -> Vmcoreinfo | None:
        note = self.probed.guest_note
        return Vmcoreinfo(note, vmcoreinfo_text(note, self.core.byte_order)) if note else None

    def find_vmcoreinfo(
        self,
        kernel: str | None = None,
        advance: Callable[[int], None] = lambda _size: None,
        *,
        everywhere: bool = True,  # noqa: ARG002 - nobody waits for it
    ) -> Vmcoreinfo:
        """Return the kernel's VMCOREINFO; all of memory is searched, for the guest runs."""
        return super().find_vmcoreinfo(kernel, advance, everywhere=True)


class LiveGuest(CopiedGuest):
    """A guest as it was; `live_guest` takes one.

    Attributes:
        protected_seconds: How long it was slow to write memory behind the pause.
    """

    def __init__(
        self,
        probed: ProbedGuest,
        memory: StreamedMemory,
        live: LiveStream,
        remarks: Sequence[str] = (),
    ) -> None:
        """Use what was streamed.

        Args:
            probed: What the guest is, its vCPUs as they are in the stream.
            memory: Of the guest.
            live: What the stream tells.
            remarks: What is to be said of the way to it.
        """
        super().__init__(probed, memory, live.pause_seconds)
        self.protected_seconds = live.protected_seconds
        times = f"{1e3 * live.pause_seconds:.1f} ms", f"{live.protected_seconds:.1f} s"
        self.remarks = (
            *remarks,
            f"the guest stood still for {times[0]}, and was slow to write memory for {times[1]}",
            f"{memory.size >> 20} MiB of guest memory were copied {memory.where}",
        )


@contextmanager
def snapshot_guest(
    guest: StoppedGuest, directory: Path, advance: Callable[[int], None]
) -> Iterator[CopiedGuest]:
    """Copy a guest that stands still, so that it may run; use the copy in a `with` block.

    Args:
        guest: Need not stand still any more when this yields.
        directory: For the copy, where memory is short.
        advance: Is told of every piece that is copied; may raise.

    Raises:
        SourceError: Its memory cannot be read.
        DumpWriteError: There is no room for the copy.
    """
    with room_for_copy(guest.memory, guest.ram_blocks, directory) as memory:
        memory.take(guest.memory, guest.ram_blocks, advance)
        guest.check_undisturbed()
        yield CopiedGuest(guest.probed, memory, guest.pause.seconds())


@contextmanager
def live_guest(
    access: GuestAccess,
    directory: Path,
    *,
    advance: Callable[[int], None] = lambda _size: None,
    limit: PauseLimit | None = None,
    gently: bool = False,
) -> Iterator[LiveGuest]:
    """Take a running guest as it is at one moment; use it in a `with` block.

    Args:
        access: The ways to the guest.
        directory: For the copy, where memory is short.
        advance: Is told of every piece that is copied; may raise.
        limit: Of the pause.
        gently: Not where QEMU would hang the guest if somebody else ended its stream.

    Raises:
        NotLiveError: It cannot be taken while it runs; it was not touched.
        RequestError: QEMU refuses any dump in its run state.
        SourceError: The stream failed; the guest runs.
        PauseLimitError: The pause was longer; the guest runs.
        DumpWriteError: There is no room for the copy; the guest runs.
        UnsupportedTargetError: No architecture file describes it.
    """
    import_plug_ins(access)
    qmp = require_streamable(access)
    if gently and hangs_when_ended(access):
        raise NotLiveError(
            "this QEMU hangs the guest if anything ends its stream before its end",
            hint="--live streams it all the same, and reads on whatever happens",
        )
    size = _memory_size(qmp)
    probed = probe_running_guest(access)
    if probed.architecture.migrated is None:
        raise NotLiveError(
            f"the registers of {probed.architecture.name} are not known in QEMU's stream"
        )
    require_room()
    with closing(StreamedMemory(probed.ram_blocks, directory, advance)) as memory:
        live = stream_running_guest(access, memory)
        memory.end()
        if limit is not None and live.pause_seconds > limit.seconds:
            raise limit.error()
        streamed = _as_streamed(probed, live.stream, memory)
        if (now := _memory_size(qmp)) != size:
            streamed = replace(streamed, doubts=(*streamed.doubts, _plugged(size, now)))
        yield LiveGuest(streamed, memory, live, access.remarks)


def _memory_size(qmp: QmpMonitor) -> int:
    """Return how many bytes of memory the guest has, what is plugged among them."""
    answer = qmp.begin_qmp("query-memory-size-summary")()
    sizes = answer.values() if isinstance(answer, Mapping) else ()
    return sum(size for size in sizes if isinstance(size, int))


def _plugged(before: int, now: int) -> str:
    # No question and the stream are of one moment, and a stream does not say where its memory lies.
    return (
        f"the guest had {before >> 20} MiB of memory when it was asked, and has {now >> 20} MiB:"
        " what was plugged meanwhile is not in the dump"
    )


def _as_streamed(
    probed: ProbedGuest, stream: MigrationStream, memory: StreamedMemory
) -> ProbedGuest:
    """Put into what is known of a guest what its stream says."""
    vcpus = vcpus_of_stream(stream, probed.architecture, probed.properties)
    doubts = list(probed.doubts)
    if stream.undescribed is not None:
        doubts.append(f"registers: {stream.undescribed}")
    unread = registers_without_note(stream, probed.architecture, vcpus)
    doubts += [
        f"{owner}: the stream does not have {', '.join(names)}" for owner, names in unread.items()
    ]
    core = probed.architecture.select_core(vcpus, probed.ram_blocks, MENDED, probed.machine)
    return replace(
        probed,
        vcpus=vcpus or probed.vcpus,  # of that moment: some may have been plugged since
        guest_note=_guest_note(stream, memory, core.byte_order),
        doubts=tuple(doubts),
    )


def _guest_note(stream: MigrationStream, memory: StreamedMemory, byte_order: ByteOrder) -> bytes:
    """Return the note that the guest has told its vmcoreinfo device of; empty without one."""
    for device in stream.find("vmcoreinfo"):
        facts: Mapping[str, int] = {
            name: device.fields.integer(f"vmcoreinfo.{name}") or 0 for name in ("paddr", "size")
        }
        if not facts["paddr"] or not 0 < facts["size"] <= _NOTE_SIZE_MAX:
            continue
        note = bytearray(facts["size"])
        try:
            memory.read_into(facts["paddr"], memoryview(note))
        except GuestMemoryFaultError:
            continue
        if is_windows_note(bytes(note)):
            return bytes(note)
        if (found := note_at_page_start(bytes(note), byte_order)) is not None:
            return found
    return b""
