"""A blocking client of QEMU's human monitor: a unix socket, TCP, telnet or a pty.

The answer of a command is what stands between the end of the line that the monitor echoes and the
next prompt. A thread of its own asks, one command after the other: an interrupt is raised in the
thread that waits for an answer, and the guest can be let run through the same connection.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from qemu_dump_ext.errors import ConnectError, RequestError, SourceError
from qemu_dump_ext.host_limits import start_needed_thread
from qemu_dump_ext.interrupts import leave_signals_to_main_thread, uninterrupted
from qemu_dump_ext.qemu.address import tcp_address
from qemu_dump_ext.qemu.command_line import HMP
from qemu_dump_ext.qemu.socket_kind import GREETING_SECONDS, TelnetFilter, open_socket

_PROMPT = b"(qemu) "
_LINE_MAX = 4095
_ANSWER_SECONDS = 120.0
_ANSWER_MAX = 64 << 20
_READ_SIZE = 1 << 16
_WAKE_SECONDS = 0.5
_INTERRUPTED_ANSWER_SECONDS = 2.0
_WHOLE_LINE = b"\x05\x15\n"
"""To the end of the line, delete it, enter: whatever somebody has typed at a pty before."""
_SIGN, _SIGNED = b"print 70000+3112\n", b"0x11d98"
"""What no other answer has: at a pty, QEMU may greet late, when it finds it open again."""
_STALE_MAX = 64
_GONE = "the guest is gone: QEMU closed the connection of its monitor"


class _Question:
    # One lock of C, which an interrupt cannot leave half taken.
    def __init__(self, command: str) -> None:
        self.command = command
        self._answers: list[Callable[[], str]] = []
        self._answered = threading.Lock()
        self._answered.acquire()

    def settle(self, answer: Callable[[], str]) -> None:
        """Know what it returns, or raises."""
        self._answers.append(answer)
        self._answered.release()

    def answer(self) -> str:
        """Wait for it."""
        try:
            while not self._answers:
                # Woken now and then: gdb's handler of SIGINT does not end a wait.
                self._answered.acquire(timeout=_WAKE_SECONDS)
        except KeyboardInterrupt:
            with uninterrupted():
                if not self._answers:
                    self._answered.acquire(timeout=_INTERRUPTED_ANSWER_SECONDS)
            raise
        return self._answers[0]()


class HmpMonitor:
    """QEMU's human monitor; use `connect_hmp` to get one.

    Attributes:
        address: A path of a socket or of a pty, or HOST:PORT.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._descriptor = -1
        self._telnet: TelnetFilter | None = None
        self._questions: SimpleQueue[_Question | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="hmp", daemon=True)
        self._lost: SourceError | MemoryError | None = None
        self._closing = False
        self._is_terminal = False

    def connect(self) -> None:
        """Connect, and wait for the prompt.

        Raises:
            ConnectError: It is no human monitor, or serves somebody else.
        """
        self._is_terminal = tcp_address(self.address) is None and is_terminal(self.address)
        if self._is_terminal:
            self._open_terminal()
        else:
            connection = open_socket(self.address, HMP)
            self._telnet = TelnetFilter.of(connection)
            self._descriptor = connection.detach()
        os.set_blocking(self._descriptor, False)
        try:
            self._up_to_prompt(GREETING_SECONDS, "no prompt")
            if self._is_terminal:
                self._skip_stale()
        except SourceError as error:
            raise ConnectError(
                f"monitor {self.address} is busy, or no monitor: {error}",
                hint="QEMU serves one client on a monitor; end the other one or add a monitor",
            ) from error
        with uninterrupted():
            start_needed_thread(self._thread, ConnectError)

    def _open_terminal(self) -> None:
        try:
            flags = os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
            self._descriptor = os.open(self.address, flags)
            tty.setraw(self._descriptor)
            self._send(_WHOLE_LINE)  # it says nothing until a line is entered
        except (OSError, termios.error) as error:
            reason = os.strerror(int(error.args[0])) if error.args else str(error)
            raise ConnectError(f"cannot connect to monitor {self.address}: {reason}") from error

    def _skip_stale(self) -> None:
        self._send(_SIGN)
        for _ in range(_STALE_MAX):
            if _SIGNED in self._up_to_prompt(GREETING_SECONDS, "no answer"):
                return
        raise SourceError("what it says answers nothing")

    def execute(self, command: str) -> str:
        """Return the answer of a command, with plain line ends.

        Raises:
            SourceError: QEMU is gone, or does not answer.
        """
        return self.begin(command)()

    def begin(self, command: str) -> Callable[[], str]:
        """Have a command executed; what is returned waits for its answer."""
        if len(command.encode()) > _LINE_MAX or not command.isprintable():
            raise RequestError(f"the monitor takes no such line: {command[:60]!r}")
        question = _Question(command)
        self._questions.put(question)
        return question.answer

    def close(self) -> None:
        """Disconnect; harmless when repeated."""
        with uninterrupted():
            self._closing = True
            if self._thread.is_alive():
                self._questions.put(None)
                self._thread.join()
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def _serve(self) -> None:
        leave_signals_to_main_thread()
        while (question := self._questions.get()) is not None:
            try:
                answer = self._exchange(question.command)
            except (SourceError, MemoryError) as error:
                # What has been read of an answer is lost with the memory for it.
                self._lost = error
                question.settle(self._raise_lost)
            else:
                question.settle(partial(str, answer))

    def _raise_lost(self) -> str:
        raise self._lost or SourceError(_GONE)

    def _exchange(self, command: str) -> str:
        if self._lost is not None:
            raise self._lost
        self._send(command.encode() + b"\n")
        answer = self._up_to_prompt(_ANSWER_SECONDS, f"QEMU does not answer {command}")
        # The line that was typed is shown key by key, and ends where it was entered.
        return answer.partition(b"\n")[2].decode("utf-8", "replace").replace("\r\n", "\n")

    def _send(self, data: bytes) -> None:
        deadline = time.monotonic() + _ANSWER_SECONDS
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [], _WAKE_SECONDS)
                if time.monotonic() > deadline or self._closing:
                    raise SourceError("QEMU's monitor takes no more") from None
            except OSError as error:
                raise SourceError(_GONE) from error

    def _up_to_prompt(self, seconds: float, failure: str) -> bytes:
        received = bytearray()
        deadline = time.monotonic() + seconds
        while not _ends_with_prompt(received):
            left = deadline - time.monotonic()
            if left <= 0:
                raise SourceError(f"{failure} in {seconds:.0f} s")
            if self._closing:
                raise SourceError(_GONE)
            if len(received) > _ANSWER_MAX:
                raise SourceError("an answer of QEMU's monitor never ends")
            poll = select.poll()
            poll.register(self._descriptor, select.POLLIN)
            if poll.poll(min(left, _WAKE_SECONDS) * 1000):
                received += self._receive()
        return bytes(received).removesuffix(_PROMPT)

    def _receive(self) -> bytes:
        try:
            data = os.read(self._descriptor, _READ_SIZE)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            raise SourceError(_GONE)
        return data if self._telnet is None else self._telnet.take(data)


def is_terminal(path: str) -> bool:
    """Tell whether a path is that of a character device, such as a pty."""
    with contextlib.suppress(OSError):
        return stat.S_ISCHR(Path(path).stat().st_mode)
    return False


def _ends_with_prompt(received: bytearray) -> bool:
    if not received.endswith(_PROMPT):
        return False
    before = len(received) - len(_PROMPT)
    return before == 0 or received[before - 1 : before] == b"\n"


@contextmanager
def connect_hmp(address: str) -> Iterator[HmpMonitor]:
    """Connect to a human monitor for the time of a `with` block.

    Args:
        address: Path of a unix socket or of a pty, or HOST:PORT.

    Raises:
        ConnectError: It cannot be connected to, or is no human monitor.
    """
    monitor = HmpMonitor(address)
    try:
        monitor.connect()
        yield monitor
    finally:
        monitor.close()
