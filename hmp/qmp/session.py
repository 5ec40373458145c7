"""The QMP door: one QMP client, served as QEMU's monitor would, with dump-guest-memory ours."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from qemu_dump_ext.engine.capabilities import query_capabilities
from qemu_dump_ext.errors import (
    CodecUnavailableError,
    DumpError,
    RequestError,
    SourceError,
    UnsupportedTargetError,
)
from qemu_dump_ext.plan.request import DumpRequest, MemoryRange

from ..dump_job import IN_PROCESS
from ..dump_manager import DumpManager
from ..dump_target import DumpTarget, is_for_qemu_alone
from ..human.command_table import DUMP_COMMAND
from ..human.interpreter import DumpDefaults, HmpClient, Interpreter
from ..sockets.connection import Connection
from ..upstream.by_qmp import QmpUpstream, Reply, formats_of
from ..upstream.upstream import Event
from .json_stream import JsonError, JsonStream

_OOB = "oob"
_NEGOTIATE = "qmp_capabilities"
_HUMAN = "human-monitor-command"
_TAKES_DESCRIPTOR = frozenset(("getfd", "add-fd"))
_CHANGES_RUN_STATE = frozenset(("stop", "cont"))
_QUEUE_MAX = 8
_INT_MAX = (1 << 63) - 1
_GOODBYE_SECONDS = 5.0


class _NotOursError(Exception):
    """QEMU is to answer."""


class QmpDoor:
    """What all QMP clients share.

    Attributes:
        upstream: QEMU.
        dumps: Ours.
        interpreter: For human-monitor-command.
        descriptors: Ours to close, by the name that getfd gave them.
    """

    def __init__(
        self,
        upstream: QmpUpstream,
        dumps: DumpManager,
        interpreter: Interpreter,
        defaults: DumpDefaults,
    ) -> None:
        self.upstream = upstream
        self.dumps = dumps
        self.interpreter = interpreter
        self.defaults = defaults
        self.descriptors: dict[str, int] = {}
        self._sessions: set[QmpSession] = set()
        dumps.on_event = self._publish

    async def serve(self, connection: Connection) -> None:
        """Serve one client."""
        session = QmpSession(connection, self)
        self._sessions.add(session)
        try:
            await session.serve()
        finally:
            self._sessions.discard(session)

    def keep_descriptor(self, name: str, descriptor: int) -> None:
        """Own a descriptor under a name, as QEMU does after getfd."""
        self.drop_descriptor(name)
        self.descriptors[name] = descriptor

    def drop_descriptor(self, name: str) -> None:
        """Close it, if there is one."""
        descriptor = self.descriptors.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

    def state_changed(self) -> None:
        """QEMU's clients lose their connection when QEMU ends, and ours do too."""
        if not self.upstream.connected:
            for session in list(self._sessions):
                session.end()
            for name in list(self.descriptors):
                self.drop_descriptor(name)

    def _publish(self, event: Event) -> None:
        for session in list(self._sessions):
            session.send_event(event)


class QmpSession:
    """One client."""

    def __init__(self, connection: Connection, door: QmpDoor) -> None:
        self._connection = connection
        self._door = door
        self._negotiated = False
        self._oob = False
        self._stream = JsonStream()
        self._queue: asyncio.Queue[tuple[Reply, asyncio.Future[None]] | None] = asyncio.Queue(
            _QUEUE_MAX
        )
        self._ours: dict[str, Callable[[Reply], Coroutine[Any, Any, Any]]] = {
            DUMP_COMMAND: self._dump,
            "query-dump": self._query_dump,
            "query-dump-guest-memory-capability": self._query_capability,
            _HUMAN: self._human,
        }

    async def serve(self) -> None:
        """Serve until the client leaves."""
        if not self._door.upstream.connected:
            return
        self._send(self._door.upstream.greeting)
        # Whatever goes wrong in one of them ends all: better no connection than a silent one.
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._work())
            while data := await self._connection.read():
                for request in self._stream.feed(data):
                    await self._take(request, tasks)
                await self._connection.drain()
            await self._queue.put(None)
        await self._connection.finish(_GOODBYE_SECONDS)

    def end(self) -> None:
        """Leave the client."""
        self._connection.abort()

    def send_event(self, event: Event) -> None:
        """Pass an event on."""
        if self._negotiated:
            self._send(event)

    def _send(self, message: Mapping[str, object]) -> None:
        self._connection.write(json.dumps(message).encode() + b"\r\n")

    def _fail(self, request: object, text: str, error_class: str = "GenericError") -> None:
        answer: Reply = {"error": {"class": error_class, "desc": text}}
        self._send(_with_id(answer, request))

    async def _take(self, request: object, tasks: asyncio.TaskGroup) -> None:
        if isinstance(request, JsonError):
            self._fail(None, request.message)
            return
        if not isinstance(request, dict):
            self._fail(None, "QMP input must be a JSON object")
            return
        if "exec-oob" in request and "execute" not in request and self._oob and self._negotiated:
            tasks.create_task(self._forward(request))
            return
        done = asyncio.get_running_loop().create_future()
        await self._queue.put((request, done))
        if not self._oob:
            await done

    async def _work(self) -> None:
        # In band: one after the other; with oob, a few may wait while others overtake them.
        while (item := await self._queue.get()) is not None:
            request, done = item
            try:
                await self._handle(request)
            finally:
                done.set_result(None)

    async def _handle(self, request: Reply) -> None:
        command = _name_of(request, "execute")
        if not self._negotiated or command == _NEGOTIATE:
            self._negotiate(request)
            return
        if "exec-oob" in request and not self._oob:
            self._fail(request, "QMP input member 'exec-oob' is unexpected")
            return
        if command in _CHANGES_RUN_STATE and self._door.dumps.active:
            self._fail(request, IN_PROCESS)
            return
        ours = self._ours.get(command)
        if ours is None or request.keys() - {"execute", "arguments", "id"}:
            await self._forward(request)
            return
        try:
            result = await ours(request)
        except _NotOursError:
            await self._forward(request)
        except CodecUnavailableError as error:
            self._fail(request, str(error))
        except DumpError as error:
            self._fail(request, error.message)
        else:
            self._send(_with_id({"return": result}, request))

    def _negotiate(self, request: Reply) -> None:
        if request.get("execute") != _NEGOTIATE:
            if "execute" not in request:
                self._fail(request, "QMP input lacks member 'execute'")
                return
            self._fail(
                request,
                "Expecting capabilities negotiation with 'qmp_capabilities'",
                "CommandNotFound",
            )
            return
        if self._negotiated:
            self._fail(
                request,
                "Capabilities negotiation is already complete, command ignored",
                "CommandNotFound",
            )
            return
        arguments = request.get("arguments") or {}
        wanted = arguments.get("enable", []) if isinstance(arguments, dict) else []
        offered = self._door.upstream.greeting["QMP"]["capabilities"]
        for capability in wanted if isinstance(wanted, list) else []:
            if capability not in offered:
                text = (
                    f"Capability {_OOB} not available"
                    if capability == _OOB
                    else f"Parameter 'enable' does not accept value '{capability}'"
                )
                self._fail(request, text)
                return
            self._oob = self._oob or capability == _OOB
        self._negotiated = True
        self._send(_with_id({"return": {}}, request))

    async def _forward(self, request: Reply) -> None:
        command = _name_of(request, "execute") or _name_of(request, "exec-oob")
        if command in _TAKES_DESCRIPTOR and self._connection.descriptors:
            await self._forward_descriptor(request)
            return
        if command == "closefd":
            self._door.drop_descriptor(_fdname_of(request))
        await self._exchange(request)

    async def _forward_descriptor(self, request: Reply) -> None:
        descriptor = self._connection.descriptors.popleft()
        try:
            async with self._door.upstream.descriptor_lock:
                self._door.upstream.send_descriptor(descriptor)
                reply = await self._exchange(request)
        except SourceError as error:
            os.close(descriptor)
            self._fail(request, error.message)
            return
        if _name_of(request, "execute") == "getfd" and "return" in reply:
            self._door.keep_descriptor(_fdname_of(request), descriptor)
        else:
            os.close(descriptor)

    async def _exchange(self, request: Reply) -> Reply:
        # The answer is written from within the handler: in order with events.
        answered: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

        def handle(reply: Reply | None) -> None:
            if reply is None:
                self.end()
                reply = {}
            else:
                reply.pop("id", None)
                if request.get("execute") == DUMP_COMMAND and "return" in reply:
                    self._door.dumps.latest_is_native = True
                self._send(_with_id(self._adapt(reply, request), request))
            if not answered.done():
                answered.set_result(reply)

        self._door.upstream.post(request, handle)
        return await answered

    def _adapt(self, reply: Reply, request: Reply) -> Reply:
        job = self._door.dumps.job
        status = reply.get("return")
        if (
            request.get("execute") == "query-status"
            and self._door.dumps.active
            and job is not None
            and job.stopped_guest
            and isinstance(status, dict)
            and status.get("status") == "paused"
        ):
            return {**reply, "return": {**status, "status": "save-vm"}}
        return reply

    async def _query_dump(self, request: Reply) -> object:
        dumps = self._door.dumps
        if _arguments(request) or dumps.job is None or dumps.latest_is_native:
            raise _NotOursError
        return dumps.query()

    async def _query_capability(self, request: Reply) -> object:
        if _arguments(request):
            raise _NotOursError
        native = formats_of(await self._door.upstream.call(str(request["execute"])))
        ours = query_capabilities().formats
        return {"formats": [*ours, *(name for name in native if name not in ours)]}

    async def _human(self, request: Reply) -> object:
        arguments = _arguments(request)
        line, index = arguments.get("command-line"), arguments.get("cpu-index")
        if (
            not isinstance(line, str)
            or arguments.keys() - {"command-line", "cpu-index"}
            or not (index is None or isinstance(index, int))
        ):
            raise _NotOursError
        if not self._door.interpreter.is_ours(line):
            raise _NotOursError
        client = HmpClient(list, self._connection.gone.wait, lambda _text: None)
        client.cpu_index = index
        return await self._door.interpreter.run(line, client)

    async def _dump(self, request: Reply) -> object:
        arguments = _arguments(request)
        dump_request = self._request_of(arguments)
        protocol = arguments["protocol"]
        release: Callable[[], None] = _nothing
        if protocol.startswith("fd:"):
            name = protocol.removeprefix("fd:")
            descriptor = self._door.descriptors.get(name)
            if descriptor is None:
                raise _NotOursError
            target = DumpTarget(protocol, None, descriptor)

            def release() -> None:
                self._door.drop_descriptor(name)
                self._door.upstream.post(
                    {"execute": "closefd", "arguments": {"fdname": name}}, lambda _reply: None
                )
        else:
            path, directory = protocol.removeprefix("file:"), self._door.upstream.qemu_directory()
            if is_for_qemu_alone(path, directory):
                raise _NotOursError
            target = DumpTarget(path, directory / path)
        try:
            job = await self._door.dumps.start(
                dump_request, target, self._door.defaults.memory, release=release
            )
        except UnsupportedTargetError as error:
            if target.descriptor is not None:
                self._door.drop_descriptor(protocol.removeprefix("fd:"))
            raise _NotOursError from error
        except CodecUnavailableError as error:
            raise RequestError(f"kdump-{dump_request.codec} is not available now") from error
        if not arguments.get("detach", False):
            gone = asyncio.ensure_future(self._connection.gone.wait())
            ends: set[asyncio.Future[Any]] = {job.finished, gone}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if not job.finished.done():
                job.cancel()
            await asyncio.shield(job.finished)
        return {}

    def _request_of(self, arguments: Mapping[str, Any]) -> DumpRequest:
        # What QEMU would refuse is left to QEMU, for its words.
        known = {"paging", "protocol", "detach", "begin", "length", "format"}
        formats = {*query_capabilities().formats, *query_capabilities().unavailable}
        dump_format = arguments.get("format", "elf")
        begin, length = arguments.get("begin"), arguments.get("length")
        detach, protocol = arguments.get("detach", False), arguments.get("protocol")
        filtered = begin is not None or length is not None
        if (
            arguments.keys() - known
            or not isinstance(arguments.get("paging"), bool)
            or not isinstance(detach, bool)
            or not isinstance(protocol, str)
            or not protocol.startswith(("file:", "fd:"))
            or not isinstance(dump_format, str)
            or dump_format not in formats
            or not _is_bound_or_none(begin)
            or not _is_bound_or_none(length)
            or (begin is None) != (length is None)
            or (dump_format != "elf" and (arguments["paging"] or filtered))
        ):
            raise _NotOursError
        raw = dump_format.startswith("kdump-raw-")
        codec = dump_format.removeprefix("kdump-raw-" if raw else "kdump-")
        return DumpRequest(
            codec=None if dump_format == "elf" else codec,
            raw=raw,
            exact=not self._door.defaults.mended,
            paging=arguments["paging"],
            memory_range=MemoryRange(begin, length or 0) if begin is not None else None,
        )


def _name_of(request: Reply, member: str) -> str:
    name = request.get(member)
    return name if isinstance(name, str) else ""


def _fdname_of(request: Reply) -> str:
    arguments = request.get("arguments")
    return str(arguments.get("fdname")) if isinstance(arguments, dict) else ""


def _arguments(request: Reply) -> dict[str, Any]:
    arguments = request.get("arguments", {})
    if not isinstance(arguments, dict):
        raise _NotOursError
    return arguments


def _is_bound_or_none(value: object) -> bool:
    # QMP's int has 64 bits and a sign; what QEMU makes of a negative one depends on its version.
    if isinstance(value, bool) or not isinstance(value, int):
        return value is None
    return 0 <= value <= _INT_MAX


def _with_id(answer: Reply, request: object) -> Reply:
    # In QEMU's order of members.
    if not isinstance(request, dict) or "id" not in request:
        return answer
    if "error" in answer:
        return {"id": request["id"], **answer}
    return {**answer, "id": request["id"]}


def _nothing() -> None:
    pass
