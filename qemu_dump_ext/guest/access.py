"""What the engine wants from a door: the monitor, the gdbstub and QMP of one guest.

There is one constructor for each way to a guest: by QMP, which carries the human monitor as well,
by a connection to the human monitor, and by whatever else carries that; a gdbstub may come to each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import field, replace
from typing import Any, Literal, Protocol, Self, runtime_checkable

from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.guest.silent import NoMonitor, SilentGuest
from qemu_dump_ext.value import Value

_AT_ONCE = 16
"""Commands that a monitor is given before it has answered."""


class Monitor(Protocol):
    """QEMU's human monitor, whatever carries it."""

    def execute(self, command: str) -> str:
        """Return the answer of one HMP command, with plain line ends.

        Raises:
            SourceError: The monitor cannot be reached.
        """


@runtime_checkable
class AsyncMonitor(Monitor, Protocol):
    """A monitor that need not be waited for.

    Optional: other work is done one after the other. So is what `execute_all` is given where a
    monitor has `asks_at_once`, and it is 1.
    """

    def begin(self, command: str) -> Callable[[], str]:
        """Have a command executed; what is returned waits for its answer, as `execute` does."""


@runtime_checkable
class BatchMonitor(AsyncMonitor, Protocol):
    """A monitor to which it is less work to be given several commands at once. Optional."""

    def begin_all(self, commands: Sequence[str]) -> list[Callable[[], str]]:
        """Have commands executed in this order; each that is returned waits for one answer."""


class HmpMonitor(AsyncMonitor, Protocol):
    """QEMU's human monitor, through a socket or a pty of its own."""

    @property
    def address(self) -> str:
        """Where QEMU listens: a path or HOST:PORT."""


class DescriptorMonitor(Protocol):
    """QEMU's QMP, through a socket that may pass descriptors."""

    @property
    def passes_descriptors(self) -> bool:
        """Whether the socket is one that passes descriptors: a unix socket."""

    def begin_qmp(
        self, command: str, arguments: dict[str, object] | None = None
    ) -> Callable[[], Any]:
        """Have a QMP command executed.

        Returns:
            Waits for its answer, and returns that; raises MonitorAnswerError where QEMU refuses
            the command, SourceError where the monitor cannot be reached.
        """

    def hand_over(self, descriptor: int, name: str) -> None:
        """Give QEMU a descriptor, which a command can ask for by `name`; ours stays open.

        Raises:
            SourceError: It cannot be passed this way.
        """


class QmpMonitor(DescriptorMonitor, Monitor, Protocol):
    """QEMU's QMP, and its human monitor through the same socket."""

    @property
    def address(self) -> str:
        """Where QEMU listens: a path or HOST:PORT."""

    def listening(self, hear: Callable[[Mapping[str, Any]], None]) -> AbstractContextManager[None]:
        """Have `hear` called with each event of QEMU's, in any thread, inside a `with` block."""


class ManagedQmp(QmpMonitor, Protocol):
    """QEMU's monitors through somebody who manages the guest."""

    @property
    def rescue(self) -> tuple[Literal["libvirt"], str]:
        """Where somebody else lets the guest run if this process is killed."""

    @property
    def pid(self) -> int | None:
        """Of QEMU's process, or None: it is not on this host, or not to be seen."""

    @property
    def remarks(self) -> Sequence[str]:
        """What is to be said of this way, in words."""


class Stub(Protocol):
    """A gdbstub of QEMU with a debugger in front of it."""

    def addresses(self) -> Sequence[str]:
        """Return where QEMU listens, as far as it is known."""

    def packet(self, text: str) -> str:
        """Send one packet of the remote protocol and return the reply; "" where unsupported."""

    def read(self, address: int, buffer: memoryview) -> None:
        """Fill `buffer` from `address` on, in the address space that the stub is set to."""

    def flush(self) -> None:
        """Drop what the debugger has cached of memory."""

    def vcpus(self) -> Iterator[int]:
        """Yield the cpu_index of each vCPU; until the next one, packets are about it."""


class GuestAccess(Value):
    """The ways to a guest that a door has.

    Made by `by_qmp`, `by_hmp`, `by_manager`, `by_monitor` or `by_memory`.

    Attributes:
        monitor: QEMU's human monitor.
        stub: The gdbstub, or None.
        qmp: QEMU's QMP, or None.
        addresses: Of QEMU's sockets to which this process is connected: a path or HOST:PORT.
        rescue: Where somebody else lets the guest run if this process is killed: what is spoken
            there, and the address; None: nowhere.
        pid: Of QEMU's process where it is known otherwise than by the connection.
        remarks: What is to be said of these ways, in words.
        silent: What is known of a guest whose monitor does not answer; None: it does.
        targets: QEMU's name of the target, once it is known: None where it does not tell.
        answers: What the monitor has answered, by question, of what `lasting` is asked.
    """

    monitor: Monitor
    stub: Stub | None
    qmp: QmpMonitor | None
    addresses: Sequence[str]
    rescue: tuple[Literal["qmp", "hmp", "libvirt"], str] | None = None
    pid: int | None = None
    remarks: Sequence[str] = ()
    silent: SilentGuest | None = None
    targets: list[str | None] = field(default_factory=list, compare=False)
    answers: dict[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def by_memory(cls, silent: SilentGuest) -> Self:
        """Reach a guest by the memory of QEMU's process alone."""
        monitor = NoMonitor(silent.reason)
        return cls(monitor, None, None, (), pid=silent.pid, silent=silent)

    @classmethod
    def by_qmp(cls, qmp: QmpMonitor, stub: Stub | None = None, pid: int | None = None) -> Self:
        """Reach a guest by its QMP socket.

        Args:
            qmp: Connected.
            stub: The gdbstub, where there is a debugger.
            pid: Of QEMU's process, if it is known.
        """
        addresses = (qmp.address, *(stub.addresses() if stub else ()))
        return cls(qmp, stub, qmp, addresses, ("qmp", qmp.address), pid)

    @classmethod
    def by_monitor(
        cls, monitor: Monitor, addresses: Sequence[str] = (), stub: Stub | None = None
    ) -> Self:
        """Reach a guest by its human monitor alone, and by its gdbstub where there is a debugger.

        Args:
            monitor: Whatever carries it.
            addresses: Where QEMU listens for this connection, if that is known.
            stub: The gdbstub.
        """
        return cls(monitor, stub, None, (*addresses, *(stub.addresses() if stub else ())))

    @classmethod
    def by_hmp(cls, monitor: HmpMonitor, stub: Stub | None = None, pid: int | None = None) -> Self:
        """Reach a guest by a human monitor of its own.

        Args:
            monitor: Connected.
            stub: The gdbstub, where there is a debugger.
            pid: Of QEMU's process, if it is known.
        """
        addresses = (monitor.address, *(stub.addresses() if stub else ()))
        return cls(monitor, stub, None, addresses, ("hmp", monitor.address), pid)

    @classmethod
    def by_manager(cls, qmp: ManagedQmp, stub: Stub | None = None) -> Self:
        """Reach a guest through who manages it, and by its gdbstub where there is a debugger."""
        addresses = stub.addresses() if stub else ()
        return cls(qmp, stub, qmp, addresses, qmp.rescue, qmp.pid, tuple(qmp.remarks))

    def anew(self) -> Self:
        """Return the same ways, of whose guest nothing has been asked yet.

        For who keeps them: libvirt may start another QEMU for the guest.
        """
        return replace(self, targets=[], answers={})

    @property
    def lasting(self) -> AskedOnce:
        """The monitor, asked once what does not change while QEMU runs."""
        return AskedOnce(self.monitor, self.answers)

    def source_context(
        self, ram_blocks: Sequence[RamBlock], dumps_forbidden: str | None
    ) -> SourceContext:
        """Return what memory sources may use to get at `ram_blocks`.

        Args:
            ram_blocks: By ascending gpa.
            dumps_forbidden: Why QEMU must not be asked for dumps of its own, or None.
        """
        return SourceContext(
            self.monitor,
            self.stub,
            ram_blocks,
            self.addresses,
            self.qmp,
            dumps_forbidden=dumps_forbidden,
            pid=self.pid,
        )


class SourceContext(Value):
    """What a source may use to get at memory.

    Attributes:
        monitor: QEMU's human monitor.
        stub: The gdbstub, where the door has one.
        ram_blocks: Of the guest, by ascending gpa.
        addresses: Of QEMU's sockets to which this process is connected: a path or HOST:PORT.
        qmp: QEMU's QMP, where the door has one.
        dumps_forbidden: Why QEMU must not be asked for dumps of its own, or None: it may.
        answers: What the monitor has answered, by question: the guest stands still.
        pid: Of QEMU's process where it is known otherwise than by a connection.
    """

    monitor: Monitor
    stub: Stub | None
    ram_blocks: Sequence[RamBlock]
    addresses: Sequence[str] = ()
    qmp: DescriptorMonitor | None = None
    dumps_forbidden: str | None = None
    answers: dict[str, str] = field(default_factory=dict, compare=False)
    pid: int | None = None

    @property
    def still(self) -> AskedOnce:
        """The monitor, asked once while the guest stands still."""
        return AskedOnce(self.monitor, self.answers)


class AskedOnce:
    """A monitor that is asked each question once; all that are known before, at once.

    For answers that do not change as long as they are used. It is a `Monitor`, so that who asks
    need not know what was asked before.
    """

    def __init__(self, monitor: Monitor, answers: dict[str, str] | None = None) -> None:
        """Ask a monitor.

        Args:
            monitor: Is asked what is not known.
            answers: What is known, by question; grows.
        """
        self._monitor = monitor
        self._answers = {} if answers is None else answers

    def ask(self, questions: Sequence[str]) -> list[str]:
        """Return the answers.

        Raises:
            SourceError: The monitor cannot be reached.
        """
        new = [question for question in dict.fromkeys(questions) if question not in self._answers]
        self._answers.update(zip(new, execute_all(self._monitor, new), strict=True))
        return [self._answers[question] for question in questions]

    def execute(self, command: str) -> str:
        """Return the answer to one; errors as `ask`."""
        return self.ask([command])[0]


def execute_all(monitor: Monitor, commands: Sequence[str]) -> list[str]:
    """Return the answers of commands that need not wait for each other, executed in this order.

    Raises:
        SourceError: The monitor cannot be reached.
    """
    if isinstance(monitor, AskedOnce):
        return monitor.ask(commands)
    at_once: int = getattr(monitor, "asks_at_once", _AT_ONCE)
    if at_once == 1 or not isinstance(monitor, AsyncMonitor):
        return [monitor.execute(command) for command in commands]
    answers: list[str] = []
    for first in range(0, len(commands), at_once):
        some = commands[first : first + at_once]
        if isinstance(monitor, BatchMonitor):
            begun = monitor.begin_all(some)
        else:
            begun = [monitor.begin(command) for command in some]
        answers += [answer() for answer in begun]
    return answers
