"""`qemu-hmp-proxy`: QEMU's human monitor for many clients, with a better dump-guest-memory."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from qemu_dump_ext.connections.target import (
    add_target_arguments,
    find_monitor,
    managed_by,
    target_of_arguments,
)
from qemu_dump_ext.errors import (
    EXIT_INTERRUPTED,
    EXIT_SUCCESS,
    DumpError,
    RequestError,
    SourceError,
)
from qemu_dump_ext.memory_sources import AUTO, all_memory_sources
from qemu_dump_ext.options.parsers import OneLineParser, epilog_of
from qemu_dump_ext.printable import printable
from qemu_dump_ext.qemu.address import is_loopback, tcp_address
from qemu_dump_ext.qemu.command_line import QMP
from qemu_dump_ext.standard_error import tell
from qemu_dump_ext.third_party import require_extra

from .dump_manager import DumpManager
from .human.interpreter import DumpDefaults, Interpreter
from .human.session import HmpSession
from .human.terminal import PipeFront, PlainFront, TerminalFront
from .sockets.connection import Connection
from .sockets.listener import Listener
from .upstream.upstream import Upstream

PROGRAM = "qemu-hmp-proxy"
Front = PipeFront | PlainFront | TerminalFront
_NEEDS_QMP = "--qmp-listen needs a QEMU that is reached by QMP"
_STATUSES = "0; 2 impossible request; 3 QEMU cannot be reached; 130 interrupted"
_EXAMPLES = (
    "--qmp /run/vm.qmp",
    "--qmp /run/vm.qmp --listen /run/vm/monitor --qmp-listen /run/vm/qmp",
    "--qmp /run/vm.qmp <commands.txt",
)


def proxy_parser(program: str = PROGRAM) -> OneLineParser:
    """Return the parser of the command line."""
    parser = OneLineParser(
        prog=program,
        description="QEMU's human monitor, in which dump-guest-memory is that of qemu_dump_ext. At"
        " a terminal, the monitor is there as well; input from a pipe is taken line by line.",
        epilog=epilog_of(program, _EXAMPLES, _STATUSES),
    )
    add_target_arguments(parser)
    parser.add_argument(
        "--listen",
        metavar="SOCKET",
        action="append",
        default=[],
        help="serve the human monitor here, to any number of clients: unix path or HOST:PORT;"
        " may be repeated",
    )
    parser.add_argument(
        "--qmp-listen",
        metavar="SOCKET",
        action="append",
        default=[],
        help="serve QMP here, to any number of clients: unix path or HOST:PORT",
    )
    parser.add_argument(
        "--allow-remote",
        action="store_true",
        help="let --listen and --qmp-listen take addresses that other machines can reach",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="edit lines at the terminal as QEMU's own monitor does, byte for byte",
    )
    parser.add_argument(
        "--mended",
        action="store_true",
        help="write dumps as readers want them, not byte for byte as QEMU would",
    )
    parser.add_argument(
        "--memory",
        default=AUTO,
        choices=(AUTO, *all_memory_sources()),
        help="where guest memory comes from; auto takes the fastest that works",
    )
    return parser


class _Proxy:
    """Everything that runs, and how it ends."""

    def __init__(self, arguments: argparse.Namespace, upstream: Upstream) -> None:
        self.upstream = upstream
        self.dumps = DumpManager(upstream)
        defaults = DumpDefaults(arguments.memory, arguments.mended)
        self.interpreter = Interpreter(upstream, self.dumps, defaults)
        self.sessions: set[HmpSession | PipeFront | TerminalFront] = set()
        upstream.on_state.append(self._state_changed)
        upstream.on_text = self._tell_all
        self._background: set[asyncio.Task[None]] = set()

    async def serve_hmp(self, connection: Connection, *, at_terminal: bool = False) -> None:
        """Serve a client of the human monitor; what one at a terminal gets is printable."""
        session = HmpSession(connection, self.interpreter, at_terminal=at_terminal)
        self.sessions.add(session)
        try:
            await session.serve()
        finally:
            self.sessions.discard(session)

    def spawn(self, work: Callable[[], object]) -> None:
        """Run a coroutine function in the background."""
        task = asyncio.ensure_future(work())  # type: ignore[call-overload]
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _state_changed(self) -> None:
        for session in list(self.sessions):
            session.state_changed()
        if self.upstream.connected:
            self.spawn(self._learn)

    async def _learn(self) -> None:
        with contextlib.suppress(SourceError):
            await self.interpreter.learn()

    def _tell_all(self, text: bytes) -> None:
        for session in list(self.sessions):
            session.tell(text)


def _upstream(arguments: argparse.Namespace) -> Upstream:
    target = target_of_arguments(arguments)
    if (domain := managed_by(target)) is not None:
        if arguments.qmp_listen:
            raise RequestError(_NEEDS_QMP)
        from .upstream.by_libvirt import LibvirtUpstream  # noqa: PLC0415

        return LibvirtUpstream(*domain)
    found = find_monitor(target)
    if found.use == QMP:
        from .upstream.by_qmp import QmpUpstream  # noqa: PLC0415 - needs qemu.qmp

        return QmpUpstream(found.address)
    if arguments.qmp_listen:
        raise RequestError(_NEEDS_QMP)
    from .upstream.by_hmp import HmpUpstream  # noqa: PLC0415

    return HmpUpstream(found.address, found.pid)


def _qmp_door(proxy: _Proxy) -> Callable[[Connection], Awaitable[None]]:
    from .qmp.door import QmpDoor  # noqa: PLC0415
    from .upstream.by_qmp import QmpUpstream  # noqa: PLC0415 - needs qemu.qmp

    if not isinstance(proxy.upstream, QmpUpstream):
        raise RequestError(_NEEDS_QMP)
    door = QmpDoor(proxy.upstream, proxy.interpreter)
    proxy.upstream.on_state.append(door.state_changed)
    return door.serve


def _front(arguments: argparse.Namespace, proxy: _Proxy) -> Front | None:
    if _at_terminal():
        if _is_plain(arguments):
            return PlainFront(partial(proxy.serve_hmp, at_terminal=True))
        return TerminalFront(proxy.interpreter)
    if arguments.listen or arguments.qmp_listen:
        return None
    return PipeFront(proxy.interpreter)


def _at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _is_plain(arguments: argparse.Namespace) -> bool:
    return arguments.plain or os.environ.get("TERM", "dumb") == "dumb"


async def _serve(arguments: argparse.Namespace) -> int:
    if _at_terminal() and not _is_plain(arguments):
        require_extra("proxy", "a terminal without --plain")
    asyncio.get_running_loop().set_exception_handler(_ignore_lost_connection)
    upstream = _upstream(arguments)
    _warn_of_remote(arguments)
    proxy = _Proxy(arguments, upstream)
    await upstream.start()
    front = _front(arguments, proxy)
    listeners: list[Listener] = []
    doors: list[tuple[str, Callable[[Connection], Awaitable[None]]]] = [
        (address, proxy.serve_hmp) for address in arguments.listen
    ]
    if arguments.qmp_listen:
        serve_qmp = _qmp_door(proxy)
        doors += [(address, serve_qmp) for address in arguments.qmp_listen]
    watcher = asyncio.create_task(upstream.keep_connected())
    ended = _Ending(front, proxy.dumps)
    try:
        for address, serve in doors:
            listener = Listener(address, serve, allow_remote=arguments.allow_remote)
            listeners.append(listener)
        if front is not None:
            if not isinstance(front, PlainFront):
                proxy.sessions.add(front)
            ended.after(front.serve())
        await ended.wait()
        if isinstance(front, PipeFront):
            ended.status = ended.status or front.status
    finally:
        await proxy.dumps.close()
        for listener in listeners:
            await listener.close()
        watcher.cancel()
        await asyncio.wait({watcher})
        await upstream.close()
    return ended.status


class _Ending:
    """Waits for a signal, or for the front to be through."""

    def __init__(self, front: Front | None, dumps: DumpManager) -> None:
        self.status = EXIT_SUCCESS
        self._front = front
        self._dumps = dumps
        self._event = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            loop.add_signal_handler(number, self._interrupt, number)

    def after(self, work: Coroutine[Any, Any, None]) -> None:
        """End when `work` does."""
        self._task = asyncio.ensure_future(work)
        self._task.add_done_callback(lambda _task: self._event.set())

    async def wait(self) -> None:
        """Wait; an error of the front is raised."""
        await self._event.wait()
        if self._task is not None:
            if not self._task.done():
                self._task.cancel()
                await asyncio.wait({self._task})
            elif not self._task.cancelled() and (error := self._task.exception()) is not None:
                raise error

    def _interrupt(self, number: int) -> None:
        # Ctrl-C ends a dump that is awaited at the terminal, and not the proxy.
        awaited = self._front is not None and self._front.interrupt()
        if number == signal.SIGINT and awaited and isinstance(self._front, TerminalFront):
            return
        if number != signal.SIGTERM or self._dumps.active:
            self.status = EXIT_INTERRUPTED
        self._event.set()


def _ignore_lost_connection(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # qemu.qmp leaves the end of a connection to whoever collects its tasks.
    error = context.get("exception")
    if not isinstance(error, (EOFError, OSError)):
        _complain(f"internal error: {context.get('message')}: {error!r}")


def _warn_of_remote(arguments: argparse.Namespace) -> None:
    for address in (*arguments.listen, *arguments.qmp_listen):
        target = tcp_address(address)
        if target and arguments.allow_remote and not is_loopback(target[0]):
            _complain(f"warning: whoever reaches {address} has full control of the guest")


def _complain(text: str) -> None:
    tell(f"{PROGRAM}: {printable(text)}")


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Entry point; returns the exit status."""
    try:
        arguments = proxy_parser(program).parse_args(sys.argv[1:] if argv is None else list(argv))
        return asyncio.run(_serve(arguments))
    except DumpError as error:
        _complain(str(error))
        return error.exit_status
    except KeyboardInterrupt:
        _complain("interrupted")
        return EXIT_INTERRUPTED
