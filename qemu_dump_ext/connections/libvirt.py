"""A guest through libvirt, which has its QMP socket: by virsh, on this host or another.

QEMU's monitors are asked through libvirt; what changes the state of the guest is done by libvirt's
own operations, so that what libvirt says of the domain stays true. Whoever else has libvirt do
something with the domain keeps it: libvirt does one thing after the other.

Source: libvirt docs/manpages/virsh.rst; include/libvirt/libvirt-qemu.h.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

from qemu_dump_ext.connections._virsh import Virsh, ask_once, quoted, virsh_program
from qemu_dump_ext.errors import (
    ConnectError,
    GuestBusyError,
    MonitorAnswerError,
    RequestError,
    SourceError,
)
from qemu_dump_ext.host_limits import refused_as, start_thread
from qemu_dump_ext.interrupts import leave_signals_to_main_thread, uninterrupted
from qemu_dump_ext.qemu.qemu_processes import find_qemu_processes
from qemu_dump_ext.qemu.qmp_message import (
    bad_reply,
    monitor_text,
    nonsense,
    parse_message,
    target_of,
)

_LOCAL = re.compile(r"^[a-z]+(?:\+unix)?:///")
_FIELD = re.compile(r"^(?P<name>[A-Za-z ]+):[ \t]+(?P<value>\S.*?)[ \t]*$", re.MULTILINE)
_EVENT = re.compile(
    r"^event (?P<name>[A-Z_]+) at (?P<seconds>\d{1,12})\.(?P<microseconds>\d{6}) for domain .*?:"
    r" (?P<data>\{.*\}|<null>)$"
)
_TAINTED = (
    "libvirt marks the domain as tainted (custom-monitor) until it is shut off, for its monitor"
    " was used"
)
_PASSES = "--pass-fds"
_LOCKED = "state change lock"
# What libvirt does by itself, so that its own idea of the domain is true afterwards.
_OPERATIONS: Mapping[str, str] = {
    "stop": "suspend",
    "cont": "resume",
    "system_reset": "reset",
    "quit": "destroy",
}
_NO_JOB = "None"
_UUID = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_REPEATABLE = re.compile(r"query-|(?:info|xp|print|qom-list|qom-get|gpa2hva|pmemsave)\b")
_HARMLESS_AGAIN = frozenset(("stop", "cont"))
_LIST_SECONDS = 10.0
_EVENT_LINE_MAX = 1 << 20

Hearer = Callable[[Mapping[str, Any]], None]
Answer = Callable[[], Any]


class LibvirtMonitor:
    """QEMU's monitors through libvirt; `connect_libvirt` gives one.

    Attributes:
        uri: Of libvirt's connection.
        name: Of the domain.
        uuid: Of the domain.
        pid: Of QEMU's process, or None: it is not on this host, or not to be seen.
        remarks: What is to be said of this way.
        asks_at_once: libvirt does one thing after the other, and each takes a virsh of its own.
    """

    asks_at_once = 1

    def __init__(self, uri: str, uuid: str) -> None:
        """Use a domain.

        Args:
            uri: Of libvirt's connection.
            uuid: Of the domain.
        """
        self.uri = uri
        self.uuid = uuid
        self.name = uuid
        self._virsh = Virsh(uri)
        self._events = _Events(uri, uuid)
        self._asking: Callable[[str], AbstractContextManager[None]] = _unlimited
        self.pid: int | None = None
        self.remarks: Sequence[str] = ()

    @property
    def address(self) -> str:
        """What messages call it."""
        return f"libvirt:{self.name}"

    @property
    def rescue(self) -> tuple[Literal["libvirt"], str]:
        """Where somebody else lets the guest run if this process is killed."""
        return "libvirt", json.dumps([virsh_program(), self.uri, self.uuid, self.pid or 0])

    def connect(self) -> None:
        """See whether the domain can be asked, and is not busy.

        Raises:
            ConnectError: It is not running, or this connection must not use its monitor.
            GuestBusyError: Somebody has libvirt do something with it that takes long.
        """
        # First: it listens when what is asked below has been answered.
        self._events.start()
        self.name = self._ask("domname")
        state = self.state()
        if state.startswith("shut off"):
            raise ConnectError(f"domain {self.name} is shut off: there is no guest")
        self._require_idle()
        try:
            self.begin_qmp("query-status")()
        except MonitorAnswerError as error:
            raise ConnectError(
                f"libvirt does not let {self.uri} use the monitor of {self.name}: {error.answer}",
                hint="connect with the right to change domains: as root, or as libvirt's group",
            ) from error
        remarks = [_TAINTED]
        try:
            self.pid = self._find_process()
        except SourceError as error:
            remarks.append(f"{error}: memory comes by pmemsave, or not at all")
        self.remarks = tuple(remarks)

    @property
    def passes_descriptors(self) -> bool:
        """Whether libvirt is on this host, and its virsh knows how: since 8.2."""
        if not _LOCAL.match(self.uri):
            return False
        with contextlib.suppress(SourceError):
            return _PASSES in ask_once(self.uri, "help", "qemu-monitor-command")
        return False

    @property
    def hears_events(self) -> bool:
        """Whether QEMU's events come; they end when libvirtd does."""
        return self._events.is_alive

    def close(self) -> None:
        """Disconnect; harmless when repeated."""
        self._events.close()
        self._virsh.close()

    def state(self) -> str:
        """Return what libvirt says of the domain, such as `paused (user)`.

        Raises:
            SourceError: libvirt does not answer.
        """
        return self._ask("domstate --reason")

    def asked_within(self, asking: Callable[[str], AbstractContextManager[None]]) -> LibvirtMonitor:
        """Return the same domain, of which QEMU is asked inside `with` blocks.

        Args:
            asking: Returns one for each question: a QMP command, or a line of the human monitor.
        """
        other = copy.copy(self)
        other._asking = asking  # noqa: SLF001 - it is one of us
        return other

    def qmp(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Execute a QMP command and return what it returns.

        Raises:
            MonitorAnswerError: It is refused.
            SourceError: libvirt does not answer.
        """
        return self._qmp(command, arguments)

    def begin_qmp(self, command: str, arguments: dict[str, object] | None = None) -> Answer:
        """Have a QMP command executed; what is returned waits for what it returns."""
        return _later(partial(self._qmp, command, arguments))

    def begin(self, command: str) -> Callable[[], str]:
        """Have a command of the human monitor executed; what is returned waits for its answer."""
        return _later(partial(self.execute, command))

    def execute(self, command: str, cpu_index: int | None = None) -> str:
        """Execute a command of the human monitor.

        Args:
            command: One line.
            cpu_index: The vCPU that it is about; None: the first.

        Raises:
            MonitorAnswerError: It is refused.
            SourceError: libvirt does not answer.
        """
        if command in _OPERATIONS:
            self._operate(command)
            return ""
        arguments: dict[str, object] = {"command-line": command}
        if cpu_index is not None:
            arguments["cpu-index"] = cpu_index
        return monitor_text(command, self._asked_of_qemu("human-monitor-command", arguments))

    def target_name(self) -> str | None:
        """Return QEMU's name of the target, such as `mipsel`, or None where it does not tell."""
        try:
            return target_of(self.begin_qmp("query-target")())
        except MonitorAnswerError:
            return None

    def hand_over(self, descriptor: int, name: str) -> None:
        """Give QEMU a descriptor, which a command can ask for by `name`; ours stays open.

        Raises:
            SourceError: libvirt, or QEMU, does not take it.
        """
        # By a virsh of its own, which inherits it.
        request = json.dumps({"execute": "getfd", "arguments": {"fdname": name}})
        words = ("qemu-monitor-command", "--domain", self.uuid, _PASSES, str(descriptor), request)
        self._result("getfd", ask_once(self.uri, *words, descriptor=descriptor))

    @contextmanager
    def listening(self, hear: Hearer) -> Iterator[None]:
        """Have `hear` called with each event of QEMU's, in another thread, inside the block."""
        self._events.hearers = (*self._events.hearers, hear)
        try:
            yield
        finally:
            self._events.hearers = tuple(one for one in self._events.hearers if one is not hear)

    def _find_process(self) -> int:
        if not _LOCAL.match(self.uri):
            raise SourceError(f"{self.name} is where {self.uri} leads to, not on this host")
        found = [
            process.pid
            for process in find_qemu_processes()
            if process.command_line.uuid.lower() == self.uuid
        ]
        if len(found) > 1:  # as while a domain migrates on its host
            noted = self._noted_pid()
            found = [pid for pid in found if pid == noted]
        if not found:
            raise SourceError(f"no QEMU is to be seen here that has the UUID of {self.name}")
        return found[0]

    def _noted_pid(self) -> int | None:
        runtime = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")
        is_session = self.uri.partition("?")[0].endswith("/session")
        folder = f"{runtime}/libvirt/qemu/run" if is_session else "/run/libvirt/qemu"
        with contextlib.suppress(OSError, ValueError):
            return int(Path(folder, f"{self.name}.pid").read_text("ascii"))
        return None

    def _qmp(self, command: str, arguments: Mapping[str, object] | None) -> Any:
        if command in _OPERATIONS:
            self._operate(command)
            return {}
        return self._asked_of_qemu(command, arguments)

    def _operate(self, command: str) -> None:
        try:
            self._ask(_OPERATIONS[command], again=command in _HARMLESS_AGAIN)
        except MonitorAnswerError as error:
            if _LOCKED not in error.answer:
                raise
            raise GuestBusyError(error.command, error.answer) from error

    def _message(self, command: str, asked: str, request: str, *, again: bool) -> dict[str, Any]:
        with self._asking(asked):
            answer = self._ask("qemu-monitor-command", request, again=again)
        try:
            return parse_message(answer.encode())
        except ValueError as error:
            if again:  # virsh that connects anew may have printed something else
                return self._message(command, asked, request, again=False)
            raise MonitorAnswerError(command, f"the answer makes no sense: {error}") from error

    def _require_idle(self) -> None:
        job = {match["name"]: match["value"] for match in _FIELD.finditer(self._ask("domjobinfo"))}
        if job.get("Job type", _NO_JOB) != _NO_JOB:
            what = job.get("Operation", job["Job type"]).lower()
            raise GuestBusyError(
                "domjobinfo",
                f"libvirt is busy with domain {self.name}: {what}",
                hint=f"wait until 'virsh domjobinfo {self.name}' says None",
            )

    def _asked_of_qemu(self, command: str, arguments: Mapping[str, object] | None) -> Any:
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        asked = str((arguments or {}).get("command-line", command))
        again = _REPEATABLE.match(asked) is not None
        return self._returned(
            command, self._message(command, asked, json.dumps(request), again=again)
        )

    def _result(self, command: str, answer: str) -> Any:
        try:
            return self._returned(command, parse_message(answer.encode()))
        except ValueError as error:
            raise nonsense(command, answer[:200]) from error

    def _returned(self, command: str, message: Mapping[str, Any]) -> Any:
        if "return" in message:
            return message["return"]
        problem = message.get("error")
        if not isinstance(problem, Mapping):
            raise bad_reply(command)
        text = problem.get("desc")
        if not isinstance(text, str):
            raise nonsense(command, text)
        raise MonitorAnswerError(command, text)

    def _ask(self, command: str, *words: str, again: bool = True) -> str:
        line = " ".join((command, "--domain", self.uuid, *map(quoted, words)))
        return self._virsh.ask(line, again=again)


class DomainList:
    """Which domains of one connection run now."""

    def __init__(self, uri: str) -> None:
        self._virsh = Virsh(uri)

    def names(self, pattern: str) -> list[str]:
        """Return the names that fit a pattern, ascending.

        Raises:
            SourceError: libvirt is not there.
        """
        listed = self._virsh.ask("list --name", again=True, seconds=_LIST_SECONDS).splitlines()
        return sorted(name.strip() for name in listed if fnmatchcase(name.strip(), pattern))

    def close(self) -> None:
        """Disconnect."""
        self._virsh.close()


class _Events:
    """A virsh that prints the events of a domain's QEMU.

    Attributes:
        hearers: Each gets every event, in a thread of its own.
    """

    def __init__(self, uri: str, uuid: str) -> None:
        self._words = (
            *("-q", "-c", uri, "qemu-monitor-event"),
            *("--domain", uuid, "--loop"),
        )
        self._child: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self.hearers: Sequence[Hearer] = ()

    def start(self) -> None:
        """Begin to listen; without, what others do is noticed by looking."""
        with uninterrupted(), refused_as(SourceError, "start virsh"):
            self._child = subprocess.Popen(
                [virsh_program(), *self._words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"LC_ALL": "C"},
                start_new_session=True,
            )
        thread = threading.Thread(
            target=self._listen, args=(self._child,), name="libvirt", daemon=True
        )
        if start_thread(thread):
            self._thread = thread

    @property
    def is_alive(self) -> bool:
        """Whether events come."""
        return self._child is not None and self._child.poll() is None

    def _listen(self, child: subprocess.Popen[bytes]) -> None:
        leave_signals_to_main_thread()
        while child.stdout is not None and (line := child.stdout.readline(_EVENT_LINE_MAX)):
            event = parse_event(line.decode("utf-8", "replace"))
            if event is not None:
                for hear in self.hearers:
                    hear(event)

    def close(self) -> None:
        """End it; harmless when repeated."""
        child, self._child = self._child, None
        if child is None:
            return
        with uninterrupted():
            child.kill()
            child.wait()
            if self._thread is not None:
                self._thread.join()
            if child.stdout is not None:
                child.stdout.close()


def parse_event(line: str) -> Mapping[str, Any] | None:
    """Return an event of QEMU's as QMP has it, by what virsh prints of it; None: it is none."""
    match = _EVENT.match(line.rstrip("\r\n"))
    if match is None:
        return None
    stamp = {name: int(match[name]) for name in ("seconds", "microseconds")}
    event: dict[str, Any] = {"event": match["name"], "timestamp": stamp}
    with contextlib.suppress(ValueError):
        event["data"] = parse_message(match["data"].encode())
    return event


def _later(work: Callable[[], Any]) -> Answer:
    # virsh does one thing after the other: done now, told when it is asked for.
    try:
        result = work()
    except SourceError as error:
        failure = error

        def fail() -> Any:
            raise failure

        return fail
    return lambda: result


def _unlimited(_told: str) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


@contextmanager
def connect_libvirt(domain: str, uri: str | None = None) -> Iterator[LibvirtMonitor]:
    """Connect to a domain of libvirt's for the time of a `with` block.

    Args:
        domain: Its name, UUID or ID.
        uri: Of libvirt's connection, such as `qemu:///system`; None: virsh's default.

    Raises:
        ConnectError: There is no such domain, it is not running, or libvirt refuses.
        GuestBusyError: Somebody has libvirt do something with it that takes long.
    """
    if not domain or "\n" in domain or "\n" in (uri or ""):
        raise RequestError(f"{domain!r} is no name of a domain")
    known = uri or ask_once(None, "uri")
    # Not by dominfo, for which libvirt may look at every emulator of the host first.
    uuid = domain.lower()
    if not _UUID.fullmatch(domain):
        uuid = ask_once(known, "domuuid", "--domain", domain)
    monitor = LibvirtMonitor(known, uuid)
    try:
        monitor.connect()
        yield monitor
    finally:
        monitor.close()
