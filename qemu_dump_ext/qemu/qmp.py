"""A blocking QMP client: qemu.qmp, whose event loop runs in a thread of its own.

An interrupt is raised in the thread that waits for an answer, never inside the client: the
connection survives it, and with it the guest is resumed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, TypeVar

from qemu_dump_ext.errors import ConnectError, MonitorAnswerError, SourceError
from qemu_dump_ext.host_limits import start_needed_thread
from qemu_dump_ext.interrupts import leave_signals_to_main_thread, uninterrupted
from qemu_dump_ext.qemu.address import tcp_address
from qemu_dump_ext.qemu.command_line import QMP
from qemu_dump_ext.qemu.qmp_client import new_client, new_listener
from qemu_dump_ext.qemu.qmp_message import bad_reply, monitor_text, target_of
from qemu_dump_ext.qemu.socket_kind import GREETING_SECONDS, QMP_HINT, open_socket
from qemu_dump_ext.third_party import import_package

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

_ANSWER_SECONDS = 120.0
_INTERRUPTED_ANSWER_SECONDS = 2.0
_WAKE_SECONDS = 0.5
_LATE_SECONDS = 10.0
_CLOSED = "the QMP connection was closed"

ResultT = TypeVar("ResultT")


class _Questions(Generic[ResultT]):
    """Some that are asked in this order, none of which waits for another's answer."""

    # One lock of C: an interrupt inside concurrent.futures leaves its locks taken, and the
    # thread of the client hangs.
    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        works: Sequence[Callable[[], Coroutine[Any, Any, ResultT]]],
        seconds: float,
    ) -> None:
        self._loop = loop
        self._deadline = time.monotonic() + seconds + _LATE_SECONDS
        self._answered = threading.Lock()
        self._answered.acquire()
        self._answers: list[Callable[[], ResultT]] = []
        asked = False
        try:
            with uninterrupted():
                # One coroutine for all: one for each takes half as much CPU time again.
                question = self._ask(works, seconds)
                try:
                    asyncio.run_coroutine_threadsafe(question, loop)
                except RuntimeError as error:
                    question.close()
                    raise SourceError(_CLOSED) from error
                except MemoryError:
                    question.close()
                    raise
                asked = True
        except KeyboardInterrupt:
            if asked:
                self._settle()
            raise

    async def _ask(
        self, works: Sequence[Callable[[], Coroutine[Any, Any, ResultT]]], seconds: float
    ) -> None:
        try:
            asked = [asyncio.ensure_future(work()) for work in works]
            _, late = await asyncio.wait(asked, timeout=seconds)
            for one in late:
                one.cancel()
            results = await asyncio.gather(*asked, return_exceptions=True)
            self._answers = [
                _outcome(TimeoutError() if one in late else result)
                for one, result in zip(asked, results, strict=True)
            ]
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            self._answers = [partial(_raise, error)] * len(works)
        finally:
            self._answered.release()

    def answer(self, number: int = 0) -> ResultT:
        """Wait for all of them; return the answer to one."""
        try:
            while not self._answers:
                # The loop's own clock ends it before, unless the loop has no memory for that.
                if self._loop.is_closed() or time.monotonic() > self._deadline:
                    raise SourceError(_CLOSED)
                # Woken now and then: gdb's handler of SIGINT does not end a wait.
                self._answered.acquire(timeout=_WAKE_SECONDS)
        except KeyboardInterrupt:
            self._settle()
            raise
        return self._answers[number]()

    def _settle(self) -> None:
        # The next question is asked when this one has been answered.
        with uninterrupted():
            if not self._answers:
                self._answered.acquire(timeout=_INTERRUPTED_ANSWER_SECONDS)


class QmpQuestion(NamedTuple):
    """A QMP command with its arguments, and what messages call it."""

    command: str
    arguments: dict[str, object] | None
    told: str


class SharedQmp:
    """QEMU's monitors through a QMP client that lives in an event loop of another thread.

    Attributes:
        address: Of the socket.
    """

    def __init__(
        self,
        client: QMPClient,
        loop: asyncio.AbstractEventLoop,
        address: str,
        *,
        answer_seconds: float = _ANSWER_SECONDS,
    ) -> None:
        """Use a client.

        Args:
            client: Connected by whoever owns it.
            loop: In which it lives; runs in another thread than this one.
            address: Of the socket.
            answer_seconds: How long QEMU may take for a command.
        """
        # Not at module level: gdb's own Python may lack the package.
        from qemu.qmp import QMPError, qmp_client  # noqa: PLC0415

        self._client = client
        self._loop = loop
        self.address = address
        self._answer_seconds = answer_seconds
        self._qmp_error = QMPError
        self._execute_error = qmp_client.ExecuteError
        self._bad_reply_error = qmp_client.BadReplyError

    @property
    def passes_descriptors(self) -> bool:
        """Whether the socket is one that passes descriptors: a unix socket."""
        return tcp_address(self.address) is None

    def qmp(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """Execute a QMP command and return what it returns.

        Raises:
            MonitorAnswerError: QEMU refuses the command.
            SourceError: The connection is lost, or QEMU does not answer.
        """
        return self.begin_qmp(command, arguments)()

    def begin_qmp(
        self, command: str, arguments: dict[str, object] | None = None
    ) -> Callable[[], Any]:
        """Have a QMP command executed; what is returned waits for what it returns."""
        return self._begin_all([QmpQuestion(command, arguments, command)])[0]

    def _begin_all(self, questions: Sequence[QmpQuestion]) -> list[Callable[[], Any]]:
        works = [partial(self._client.execute, one.command, one.arguments) for one in questions]
        asked: _Questions[Any] = _Questions(self._loop, works, self._answer_seconds)
        return [
            partial(self._answer, one.told, partial(asked.answer, number))
            for number, one in enumerate(questions)
        ]

    def _answer(self, command: str, answer: Callable[[], Any]) -> Any:
        try:
            return answer()
        except self._execute_error as error:
            raise MonitorAnswerError(command, str(error)) from error
        except self._bad_reply_error as error:
            raise bad_reply(command) from error
        except TimeoutError as error:
            raise SourceError(
                f"QEMU does not answer {command} in {self._answer_seconds:.0f} s"
            ) from error
        except asyncio.CancelledError as error:
            raise SourceError(_CLOSED) from error
        except (self._qmp_error, OSError, EOFError) as error:
            raise SourceError("the guest is gone: QEMU closed the QMP connection") from error

    def execute(self, command: str) -> str:
        """Execute a command of the human monitor."""
        return self.begin(command)()

    def begin(self, command: str) -> Callable[[], str]:
        """Have a command of the human monitor executed; what is returned waits for its answer."""
        return self.begin_all([command])[0]

    def begin_all(self, commands: Sequence[str]) -> list[Callable[[], str]]:
        """Have commands of the human monitor executed in this order, all at once; as `begin`."""
        answers = self._begin_all(
            [
                QmpQuestion("human-monitor-command", {"command-line": command}, command)
                for command in commands
            ]
        )
        return [partial(_text_of, *pair) for pair in zip(commands, answers, strict=True)]

    def target_name(self) -> str | None:
        """Return QEMU's name of the target, such as `mipsel`, or None where it does not tell."""
        try:
            return target_of(self.qmp("query-target"))
        except MonitorAnswerError:
            return None

    def hand_over(self, descriptor: int, name: str) -> None:
        """Give QEMU a descriptor, which a command can ask for by `name`; ours stays open.

        Raises:
            SourceError: The socket passes none.
        """
        if not self.passes_descriptors:
            raise SourceError(
                "a QMP socket of TCP passes no descriptors", hint="a unix socket does"
            )
        try:
            self._run(lambda: self._send_descriptor(descriptor), self._answer_seconds)
        except (self._qmp_error, OSError) as error:
            raise SourceError(f"the QMP socket passes no descriptor: {_reason(error)}") from error
        self.qmp("getfd", {"fdname": name})

    @contextmanager
    def listening(self, hear: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
        """Have `hear` called with each event, in the thread of the client, inside the block."""
        listener = new_listener(hear)
        self._loop.call_soon_threadsafe(self._client.register_listener, listener)
        try:
            yield
        finally:
            with contextlib.suppress(RuntimeError):  # it was closed
                self._loop.call_soon_threadsafe(self._client.remove_listener, listener)

    async def _send_descriptor(self, descriptor: int) -> None:
        self._client.send_fd_scm(descriptor)

    def _run(self, work: Callable[[], Coroutine[Any, Any, ResultT]], seconds: float) -> ResultT:
        return _Questions(self._loop, [work], seconds).answer()


class QmpMonitor(SharedQmp):
    """QEMU's monitors through one QMP socket.

    Use `connect_qmp` to get one.
    """

    def __init__(self, address: str) -> None:
        import_package("qemu.qmp", "QMP")
        loop = asyncio.new_event_loop()
        # What ends the connection is told to who asks; asyncio would write it to standard error.
        loop.set_exception_handler(lambda _loop, _context: None)
        super().__init__(new_client(), loop, address)
        self._thread = threading.Thread(target=self._serve, name="qmp", daemon=True)

    def connect(self) -> None:
        """Connect and negotiate.

        Raises:
            ConnectError: Nobody listens, or somebody else is connected: QEMU serves one client.
        """
        with uninterrupted():
            start_needed_thread(self._thread, ConnectError)
        connection = open_socket(self.address, QMP)
        connection.setblocking(False)
        try:
            self._run(partial(self._client.connect, connection), GREETING_SECONDS)
        except TimeoutError as error:
            connection.close()
            raise ConnectError(
                f"cannot connect to QMP socket {self.address}:"
                f" no whole greeting in {GREETING_SECONDS:.0f} s"
            ) from error
        except (self._qmp_error, OSError) as error:
            connection.close()
            raise ConnectError(
                f"cannot connect to QMP socket {self.address}: {_reason(error)}",
                hint=QMP_HINT,
            ) from error

    def close(self) -> None:
        """Disconnect; harmless when repeated."""
        if self._loop.is_closed():
            return
        with uninterrupted():
            if self._thread.is_alive():
                try:
                    with contextlib.suppress(
                        self._qmp_error, OSError, EOFError, TimeoutError, SourceError
                    ):
                        self._run(self._client.disconnect, GREETING_SECONDS)
                finally:
                    self._loop.call_soon_threadsafe(self._loop.stop)
                    self._thread.join()

    def _serve(self) -> None:
        leave_signals_to_main_thread()
        try:
            self._loop.run_forever()
            # Whoever still waits in another thread is told; nobody can ask from here on.
            self._loop.run_until_complete(_cancel_all())
        except MemoryError:
            pass  # who waits sees that it is closed
        finally:
            self._loop.close()


async def _cancel_all() -> None:
    waiting = asyncio.all_tasks() - {asyncio.current_task()}
    for task in waiting:
        if task is not None:
            task.cancel()
    await asyncio.gather(*filter(None, waiting), return_exceptions=True)


def _text_of(command: str, answer: Callable[[], Any]) -> str:
    return monitor_text(command, answer())


def _outcome(result: ResultT | BaseException) -> Callable[[], ResultT]:
    return partial(_raise, result) if isinstance(result, BaseException) else lambda: result


def _raise(error: BaseException) -> NoReturn:
    raise error


def _reason(error: BaseException) -> str:
    # The first cause that says something: the client's own words tell little.
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, EOFError):
        return "it was closed at once"
    if isinstance(cause, OSError) and cause.errno is not None:
        return os.strerror(cause.errno)
    return (str(cause) or type(cause).__name__).splitlines()[0]


@contextmanager
def connect_qmp(address: str) -> Iterator[QmpMonitor]:
    """Connect to a QMP socket for the time of a `with` block.

    Args:
        address: Path of a unix socket, or HOST:PORT.

    Raises:
        ConnectError: It cannot be connected to.
    """
    monitor = QmpMonitor(address)
    try:
        monitor.connect()
        yield monitor
    finally:
        monitor.close()
