"""The human monitor in the terminal that the proxy was started in, or on a pipe."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import termios
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_dump_ext.printable import printable
from qemu_dump_ext.progress import OneLine
from qemu_dump_ext.standard_error import tell

from ..dump_job import DumpJob
from ..sockets.connection import Connection
from .interpreter import HmpClient, Interpreter

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completion
    from prompt_toolkit.document import Document

_PROMPT, _GONE_PROMPT = "(qemu) ", "(qemu gone) "
_LINE_MAX = 4095
_LINES_AHEAD = 8
_PROGRESS_SECONDS = 0.2
_READ_SIZE = 4096
_INPUT_FLAGS, _LOCAL_FLAGS = 0, 3  # in the list of termios.tcgetattr


class _Front:
    # What a terminal and a pipe have in common.
    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.lines: list[bytes] = []
        self._interrupted = asyncio.Event()
        self._running = False
        self.client = HmpClient(
            history=lambda: self.lines,
            gone=self._interrupted.wait,
            told=self.tell,
            watch=self.watch,
        )

    def interrupt(self) -> bool:
        """Cancel the dump that is awaited here; return whether there was a command to wait for."""
        self._interrupted.set()
        return self._running

    def tell(self, text: bytes) -> None:
        """Show `text`."""
        _show(text.decode("utf-8", "replace"))

    def state_changed(self) -> None:
        """Say that QEMU is gone, or back."""
        upstream = self.interpreter.upstream
        if upstream.connected:
            _write(f"QEMU {upstream.version_text} is back\n")
        elif not self.client.quit:
            _write("QEMU is gone; waiting for it\n")

    async def run(self, line: str) -> bool:
        """Run one line; return whether there may be another one."""
        if line.strip():
            self.lines = [entry for entry in self.lines if entry != line.encode()][-63:]
            self.lines.append(line.encode("utf-8", "replace"))
        self._interrupted.clear()
        self._running = True
        try:
            answer = await self.interpreter.run(line[:_LINE_MAX], self.client)
        finally:
            self._running = False
        quits = self.client.quit
        if not (quits and not self.interpreter.upstream.connected):
            self.show(answer)
        return not quits

    def show(self, answer: str) -> None:
        """Show an answer of QEMU's, or ours."""
        _show(answer)

    async def watch(self, job: DumpJob) -> None:
        """Show the progress of a dump until cancelled."""


class PipeFront(_Front):
    """Lines from standard input; answers to standard output, and refusals to standard error."""

    @property
    def status(self) -> int:
        """Exit status of the last line."""
        return self.client.status

    def show(self, answer: str) -> None:
        """Show an answer where it belongs."""
        if self.client.status:
            tell(printable(answer.replace("\r\n", "\n")), end="")
        else:
            super().show(answer)

    async def watch(self, job: DumpJob) -> None:
        """Say what came of a dump, once it is not awaited any more."""
        try:
            await asyncio.Event().wait()
        finally:
            if job.finished.done() and not job.finished.exception():
                _show("\n".join(job.finished.result().lines()) + "\n")

    async def serve(self) -> None:
        """Serve until the input ends."""
        queue: asyncio.Queue[bytes] = asyncio.Queue(_LINES_AHEAD)
        loop = asyncio.get_running_loop()

        def read_lines() -> None:
            # Nothing waits for this thread: a pipe may never end.
            while line := sys.stdin.buffer.readline(_LINE_MAX + 1):
                asyncio.run_coroutine_threadsafe(queue.put(line), loop).result()
            asyncio.run_coroutine_threadsafe(queue.put(b""), loop)

        threading.Thread(target=read_lines, daemon=True).start()
        while line := await queue.get():
            if not await self.run(line.decode("utf-8", "replace").rstrip("\r\n")):
                return


class TerminalFront(_Front):
    """A terminal: line editing, history and completion by prompt_toolkit."""

    async def serve(self) -> None:
        """Serve until Ctrl-D, or until `quit` has ended QEMU."""
        from prompt_toolkit.patch_stdout import patch_stdout  # noqa: PLC0415 - only at a terminal

        session = self._session()
        upstream = self.interpreter.upstream
        _write(f"QEMU {upstream.version_text} monitor - type 'help' for more information\n")
        while True:
            try:
                with patch_stdout(raw=True):
                    line = await session.prompt_async(
                        lambda: _PROMPT if upstream.connected else _GONE_PROMPT,
                        handle_sigint=False,
                    )
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if not await self.run(line):
                return

    async def watch(self, job: DumpJob) -> None:
        """Show the progress of a dump until cancelled, and then what came of it."""
        line = OneLine(_write)
        try:
            while True:
                await asyncio.sleep(_PROGRESS_SECONDS)
                if job.has_begun:
                    line.show(job.progress_line(time.monotonic()))
        finally:
            line.clear()
            if job.finished.done() and not job.finished.exception():
                report = job.finished.result()
                _show("\n".join((*report.lines(), *report.opening_line())) + "\n")

    def _session(self) -> PromptSession[str]:
        from prompt_toolkit import PromptSession  # noqa: PLC0415 - only at a terminal
        from prompt_toolkit.completion import Completer, Completion  # noqa: PLC0415
        from prompt_toolkit.history import FileHistory, InMemoryHistory  # noqa: PLC0415

        interpreter = self.interpreter

        class TableCompleter(Completer):
            def get_completions(
                self, document: Document, _complete_event: CompleteEvent
            ) -> Iterable[Completion]:
                words, typed = interpreter.table.complete(
                    document.text_before_cursor, interpreter.upstream.qemu_directory()
                )
                for word in sorted(words):
                    yield Completion(word, start_position=-typed)

        # Not every terminal answers where its cursor is, and a warning helps nobody.
        os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
        path = _history_path()
        return PromptSession(
            history=InMemoryHistory() if path is None else FileHistory(str(path)),
            completer=TableCompleter(),
            complete_while_typing=False,
            enable_history_search=True,
        )


class PlainFront:
    """A terminal with QEMU's own line editor: what `-monitor stdio` shows, byte for byte.

    Only what a terminal would obey in QEMU's answers is shown by its number.
    """

    def __init__(self, serve_client: Callable[[Connection], Awaitable[None]]) -> None:
        self._serve_client = serve_client

    def interrupt(self) -> bool:
        """Never hold up an interrupt."""
        return False

    async def serve(self) -> None:
        """Serve until the terminal or the session ends."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        terminal, screen = sys.stdin.fileno(), sys.stdout.fileno()
        before = termios.tcgetattr(terminal)
        changed = termios.tcgetattr(terminal)
        changed[_INPUT_FLAGS] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR | termios.IXON)
        changed[_LOCAL_FLAGS] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
        termios.tcsetattr(terminal, termios.TCSANOW, changed)

        def typed() -> None:
            data = _read_or_end(terminal)
            if data:
                theirs.sendall(data)
            else:
                loop.remove_reader(terminal)
                theirs.shutdown(socket.SHUT_WR)

        loop.add_reader(terminal, typed)
        session = asyncio.ensure_future(self._serve_client(Connection(ours)))
        session.add_done_callback(lambda _session: ours.close())
        try:
            while data := await loop.sock_recv(theirs, _READ_SIZE):
                os.write(screen, data)
        finally:
            loop.remove_reader(terminal)
            session.cancel()
            await asyncio.wait({session})
            theirs.close()
            termios.tcsetattr(terminal, termios.TCSANOW, before)


def _read_or_end(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, _READ_SIZE)
    except OSError:
        return b""  # the other side of the terminal is gone


def _history_path() -> Path | None:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    folder = Path(state) / "qemu-hmp-proxy"
    path = folder / "history"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return None
    return path


def _show(text: str) -> None:
    # What QEMU says, and with it what guests have chosen; a pipe gets it as it is.
    text = text.replace("\r\n", "\n")
    _write(printable(text) if sys.stdout.isatty() else text)


def _write(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(text)
        sys.stdout.flush()
