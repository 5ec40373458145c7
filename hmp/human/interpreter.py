"""Decide for each line of the human monitor: QEMU's, or ours."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from qemu_dump_ext.dump_formats import find_dump_format, format_by_words, format_words
from qemu_dump_ext.engine.report import DumpReport
from qemu_dump_ext.errors import (
    EXIT_FAILURE,
    EXIT_SUCCESS,
    CodecUnavailableError,
    DumpError,
    RequestError,
    UnsupportedTargetError,
)
from qemu_dump_ext.memory_sources import AUTO, all_memory_sources
from qemu_dump_ext.options.expressions import parse_expressions, registers_in, with_register
from qemu_dump_ext.plan.request import WINDOWS_FORMAT, DumpRequest, MemoryRange
from qemu_dump_ext.printable import printable
from qemu_dump_ext.qemu.run_states import MIGRATION_REFUSED
from qemu_dump_ext.value import Value

from ..dump_job import IN_PROCESS, DumpJob
from ..dump_manager import DumpManager
from ..dump_target import DumpTarget, is_for_qemu_alone
from ..upstream.upstream import Upstream
from .command_table import (
    CANCEL_COMMAND,
    CANCEL_HELP,
    DUMP_COMMAND,
    CommandTable,
    parse_tables,
    with_our_help,
)
from .dump_line import BadExtension, DumpLine, NativeLine, parse_dump_line

_RUN_STATE_NAMES = frozenset(("stop", "s", "cont", "c"))
_MIGRATION_NAMES = frozenset(("migrate", "savevm"))
_CHANGING_NAMES = _RUN_STATE_NAMES | _MIGRATION_NAMES
_HELP_NAMES = frozenset(("help", "?"))
_QUIT_NAMES = frozenset(("quit", "q"))
_QUIT_SECONDS = 2.0
_STATUS_OF_OURS = "VM status: paused"


class DumpDefaults(Value):
    """What the command line of the proxy says about dumps.

    Attributes:
        memory: Name of the memory source, or `auto`.
        mended: Not byte for byte as QEMU writes them.
    """

    memory: str = AUTO
    mended: bool = False


class HmpClient:
    """What the interpreter knows of the client whose line it is.

    Attributes:
        cpu_index: Chosen by the client's `cpu`; None: QEMU's default.
        history: Returns the client's lines, for `info history`.
        gone: Waits until the client is gone; a dump that it waits for ends then.
        watch: Shows a foreground dump's progress as long as it is awaited, or None.
        told: Gets what the client is to know of a detached dump.
        quit: The client asked QEMU to end.
        status: What the last line would be as a program: an exit status.
    """

    def __init__(
        self,
        history: Callable[[], list[bytes]],
        gone: Callable[[], Awaitable[object]],
        told: Callable[[bytes], None],
        watch: Callable[[DumpJob], Awaitable[None]] | None = None,
    ) -> None:
        self.cpu_index: int | None = None
        self.history = history
        self.gone = gone
        self.told = told
        self.watch = watch
        self.quit = False
        self.status = EXIT_SUCCESS


class Interpreter:
    """Runs lines for every client.

    Attributes:
        upstream: QEMU.
        dumps: Ours.
        defaults: Of our dumps.
        table: Of QEMU's commands; empty until it was learned.
    """

    def __init__(self, upstream: Upstream, dumps: DumpManager, defaults: DumpDefaults) -> None:
        self.upstream = upstream
        self.dumps = dumps
        self.defaults = defaults
        self.table = CommandTable()

    async def learn(self) -> None:
        """Ask QEMU what it knows.

        Raises:
            SourceError: QEMU is gone.
        """
        self.table = parse_tables(
            await self.upstream.execute_hmp("help"), await self.upstream.execute_hmp("help info")
        )

    def is_ours(self, line: str) -> bool:
        """Tell whether QEMU alone would answer this line differently."""
        words = line.split()
        name = words[0].partition("/")[0] if words else ""
        return (
            name in {DUMP_COMMAND, CANCEL_COMMAND, *_HELP_NAMES}
            or words == ["info", "dump"]
            or (self.dumps.active and (name in _CHANGING_NAMES or words == ["info", "status"]))
        )

    async def run(self, line: str, client: HmpClient) -> str:
        """Run one line and return what QEMU would show, with CR LF."""
        try:
            answer = await self._run(line, client)
        except DumpError as error:
            client.status = error.exit_status
            # Which package a codec needs, QEMU has nothing to say of.
            return _error(str(error) if isinstance(error, CodecUnavailableError) else error.message)
        client.status = EXIT_FAILURE if _is_refusal(answer) else EXIT_SUCCESS
        return answer

    async def _run(self, line: str, client: HmpClient) -> str:
        words = line.split()
        name = words[0].partition("/")[0] if words else ""
        if not name:
            return ""
        if name == DUMP_COMMAND:
            return await self._dump(line, client)
        if name == CANCEL_COMMAND:
            return self._cancel(words)
        if name in _RUN_STATE_NAMES and self.dumps.active:
            raise RequestError(IN_PROCESS)
        if name in _MIGRATION_NAMES and self.dumps.active:
            raise RequestError(MIGRATION_REFUSED)
        if words == ["info", "dump"] and not self.dumps.latest_is_native and self.dumps.job:
            return self.dumps.lines()
        if words == ["info", "history"]:
            return "".join(
                f"{index}: '{entry.decode('utf-8', 'replace')}'\r\n"
                for index, entry in enumerate(client.history())
            )
        client.quit = name in _QUIT_NAMES and len(words) == 1
        answer = await self.upstream.execute_hmp(line, client.cpu_index)
        if client.quit:
            # No prompt follows: QEMU answers first and ends then.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.upstream.gone.wait(), _QUIT_SECONDS)
        return self._adapt(answer, words, client)

    def _adapt(self, answer: str, words: list[str], client: HmpClient) -> str:
        if words[0] in _HELP_NAMES:
            if words[1:] == [CANCEL_COMMAND]:
                return CANCEL_HELP + "\r\n"
            return with_our_help(answer, format_words())
        if words[0] == "cpu" and len(words) > 1 and not answer:
            # QEMU forgets it between two lines that come by QMP.
            try:
                client.cpu_index = parse_expressions(" ".join(words[1:]), "cpu", 1)[0]
            except RequestError:
                client.cpu_index = None
        if words == ["info", "status"] and self.dumps.active:
            job = self.dumps.job
            if job is not None and job.stopped_guest and answer.startswith(_STATUS_OF_OURS):
                return f"{_STATUS_OF_OURS} (save-vm)\r\n"
        return answer

    def _cancel(self, words: list[str]) -> str:
        if len(words) > 1:
            return (
                f"{CANCEL_COMMAND}: extraneous characters at the end of line\r\n"
                f'Try "help {CANCEL_COMMAND}" for more information\r\n'
            )
        self.dumps.cancel()
        return ""

    async def _native(self, line: str, client: HmpClient) -> str:
        if self.dumps.active:
            raise RequestError(IN_PROCESS)
        await self.dumps.require_native_allowed()
        answer = await self.upstream.execute_hmp(line, client.cpu_index)
        if not answer:
            self.dumps.latest_is_native = True
        return answer

    async def _dump(self, line: str, client: HmpClient) -> str:
        parsed = parse_dump_line(line, format_words(), all_memory_sources())
        if isinstance(parsed, BadExtension):
            raise RequestError(parsed.message)
        if isinstance(parsed, NativeLine):
            return await self._native(parsed.line, client)
        try:
            request = await self._request_of(parsed, client)
        except _LeftToQemuError:
            return await self._native(line, client)
        target = DumpTarget(parsed.filename, self.upstream.qemu_directory() / parsed.filename)
        memory = parsed.memory or self.defaults.memory
        try:
            job = await self.dumps.start(request, target, memory, release=_nothing_to_release)
        except UnsupportedTargetError:
            return await self._native(line, client)
        except CodecUnavailableError as error:
            if find_dump_format(request.format).is_of_qemu:
                raise RequestError(f"kdump-{parsed.codec} is not available now") from error
            raise
        if "d" in parsed.flags:
            job.finished.add_done_callback(lambda done: client.told(_conclusion(target, done)))
            return ""
        await self._wait(job, client)
        return ""

    async def _wait(self, job: DumpJob, client: HmpClient) -> None:
        gone: asyncio.Future[Any] = asyncio.ensure_future(client.gone())
        watcher = asyncio.ensure_future(client.watch(job)) if client.watch else None
        ends: set[asyncio.Future[Any]] = {job.finished, gone}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not job.finished.done():
                job.cancel()
            await asyncio.shield(job.finished)
        except asyncio.CancelledError:
            job.cancel()
            raise
        finally:
            gone.cancel()
            if watcher is not None:
                watcher.cancel()
                await asyncio.wait({watcher})

    async def _request_of(self, parsed: DumpLine, client: HmpClient) -> DumpRequest:
        if is_for_qemu_alone(parsed.filename, self.upstream.qemu_directory()):
            if not parsed.extends_qemu:
                raise _LeftToQemuError
            raise RequestError(
                f"{parsed.filename} is opened by QEMU alone, which knows no codec behind -z and no"
                " option of two dashes"
            )
        mended = self.defaults.mended if parsed.mended is None else parsed.mended
        memory_range = None
        if parsed.bounds:
            bounds = await self._with_registers(parsed.bounds, client)
            try:
                values = parse_expressions(bounds, DUMP_COMMAND, 2)
            except RequestError as error:
                raise _LeftToQemuError from error
            if len(values) < 2 or (min(values) < 0 and not parsed.extends_qemu):
                raise _LeftToQemuError
            memory_range = MemoryRange(values[0], values[1])
        request = DumpRequest(
            format=(
                WINDOWS_FORMAT
                if parsed.windows
                else format_by_words(parsed.codec, raw="R" in parsed.flags)
            ),
            exact=not mended,
            paging="p" in parsed.flags,
            memory_range=memory_range,
            snapshot=parsed.snapshot,
            live=parsed.live,
            dump_level=parsed.dump_level.number,
            mini=parsed.mini,
            max_bytes=parsed.max_bytes,
            dump_level_required=parsed.dump_level.required,
        )
        find_dump_format(request.format).check(request)
        return request

    async def _with_registers(self, text: str, client: HmpClient) -> str:
        for register in registers_in(text):
            answer = await self.upstream.execute_hmp(f"print {register}", client.cpu_index)
            try:
                text = with_register(text, register, answer)
            except RequestError as error:
                raise _LeftToQemuError from error
        return text


class _LeftToQemuError(Exception):
    """QEMU is to take the dump, or to say what is wrong with the line."""


def _nothing_to_release() -> None:
    pass


def _is_refusal(answer: str) -> bool:
    # As monitor/hmp.c and error-report.c of QEMU word them.
    return answer.startswith(("Error: ", "unknown command: ")) or '\r\nTry "help ' in answer


def _error(message: str) -> str:
    return f"Error: {printable(message)}\r\n"


def _conclusion(target: DumpTarget, done: asyncio.Future[DumpReport]) -> bytes:
    error = done.exception()
    if error is not None:
        message = error.message if isinstance(error, DumpError) else str(error)
        return _error(message).encode()
    return f"{DUMP_COMMAND}: {target.name} is complete\r\n".encode()
