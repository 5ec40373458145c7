"""One client of QMP, served as QEMU's monitor would serve it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping

from qemu_dump_ext.errors import CodecUnavailableError, DumpError, SourceError
from qemu_dump_ext.qemu.run_states import MIGRATION_REFUSED

from ..dump_job import IN_PROCESS
from ..human.command_table import DUMP_COMMAND
from ..human.interpreter import HmpClient, Interpreter
from ..sockets.connection import Connection
from ..upstream.by_qmp import QmpUpstream
from ..upstream.upstream import Event
from .descriptors import NamedDescriptors
from .dump_commands import CommandHandler, DumpCommands
from .json_stream import JsonError, JsonStream
from .messages import (
    LeftToQemuError,
    Message,
    arguments_of,
    fdname_of,
    name_of,
    refusal,
    with_id,
)
from .negotiation import Negotiation

_HUMAN = "human-monitor-command"
_OUT_OF_BAND = "exec-oob"
_TAKES_DESCRIPTOR = frozenset(("getfd", "add-fd"))
_REFUSED_MEANWHILE = {"stop": IN_PROCESS, "cont": IN_PROCESS, "migrate": MIGRATION_REFUSED}
_QUEUE_MAX = 8
_GOODBYE_SECONDS = 5.0


class QmpSession:
    """One client: its requests are answered in their order, by us or by QEMU."""

    def __init__(
        self,
        connection: Connection,
        upstream: QmpUpstream,
        interpreter: Interpreter,
        descriptors: NamedDescriptors,
    ) -> None:
        self._connection = connection
        self._upstream = upstream
        self._interpreter = interpreter
        self._dumps = interpreter.dumps
        self._descriptors = descriptors
        self._negotiation = Negotiation()
        self._stream = JsonStream()
        self._queue: asyncio.Queue[tuple[Message, asyncio.Future[None]] | None] = asyncio.Queue(
            _QUEUE_MAX
        )
        ours = DumpCommands(
            upstream, self._dumps, interpreter.defaults, descriptors, connection.gone.wait
        )
        self._handlers: Mapping[str, CommandHandler] = {**ours.handlers, _HUMAN: self._human}

    async def serve(self) -> None:
        """Serve until the client leaves."""
        if not self._upstream.connected:
            return
        self._send(self._upstream.greeting)
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
        if self._negotiation.done:
            self._send(event)

    def _send(self, message: Mapping[str, object]) -> None:
        self._connection.write(json.dumps(message).encode() + b"\r\n")

    def _answer(self, answer: Message, request: object) -> None:
        self._send(with_id(answer, request))

    async def _take(self, request: object, tasks: asyncio.TaskGroup) -> None:
        if isinstance(request, JsonError):
            self._answer(refusal(request.message), None)
            return
        if not isinstance(request, dict):
            self._answer(refusal("QMP input must be a JSON object"), None)
            return
        if self._overtakes(request):
            tasks.create_task(self._forward(request))
            return
        done = asyncio.get_running_loop().create_future()
        await self._queue.put((request, done))
        if not self._negotiation.out_of_band:
            await done

    def _overtakes(self, request: Message) -> bool:
        is_out_of_band = _OUT_OF_BAND in request and "execute" not in request
        return is_out_of_band and self._negotiation.done and self._negotiation.out_of_band

    async def _work(self) -> None:
        # In band: one after the other; with oob, a few may wait while others overtake them.
        while (item := await self._queue.get()) is not None:
            request, done = item
            try:
                await self._handle(request)
            finally:
                done.set_result(None)

    async def _handle(self, request: Message) -> None:
        command = name_of(request)
        if self._negotiation.concerns(request):
            offered = self._upstream.greeting["QMP"]["capabilities"]
            self._answer(self._negotiation.answer(request, offered), request)
        elif _OUT_OF_BAND in request and not self._negotiation.out_of_band:
            self._answer(refusal(f"QMP input member '{_OUT_OF_BAND}' is unexpected"), request)
        elif command in _REFUSED_MEANWHILE and self._dumps.active:
            self._answer(refusal(_REFUSED_MEANWHILE[command]), request)
        elif command in self._handlers and not request.keys() - {"execute", "arguments", "id"}:
            await self._handle_here(request, self._handlers[command])
        else:
            await self._forward(request)

    async def _handle_here(self, request: Message, handler: CommandHandler) -> None:
        try:
            answer = {"return": await handler(request)}
        except LeftToQemuError:
            await self._forward(request)
            return
        except CodecUnavailableError as error:
            answer = refusal(str(error))
        except DumpError as error:
            answer = refusal(error.message)
        self._answer(answer, request)

    async def _human(self, request: Message) -> object:
        arguments = arguments_of(request)
        line, index = arguments.get("command-line"), arguments.get("cpu-index")
        if (
            not isinstance(line, str)
            or arguments.keys() - {"command-line", "cpu-index"}
            or not (index is None or isinstance(index, int))
            or not self._interpreter.is_ours(line)
        ):
            raise LeftToQemuError
        client = HmpClient(list, self._connection.gone.wait, lambda _text: None)
        client.cpu_index = index
        return await self._interpreter.run(line, client)

    async def _forward(self, request: Message) -> None:
        command = name_of(request) or name_of(request, _OUT_OF_BAND)
        if command in _TAKES_DESCRIPTOR and self._connection.descriptors:
            await self._forward_descriptor(request)
            return
        if command == "closefd":
            self._descriptors.drop(fdname_of(request))
        if command == DUMP_COMMAND:
            try:
                await self._dumps.require_native_allowed()
            except DumpError as error:
                self._answer(refusal(error.message), request)
                return
        await self._exchange(request)

    async def _forward_descriptor(self, request: Message) -> None:
        descriptor = self._connection.descriptors.popleft()
        try:
            async with self._upstream.descriptor_lock:
                self._upstream.send_descriptor(descriptor)
                reply = await self._exchange(request)
        except SourceError as error:
            os.close(descriptor)
            self._answer(refusal(error.message), request)
            return
        if name_of(request) == "getfd" and "return" in reply:
            self._descriptors.keep(fdname_of(request), descriptor)
        else:
            os.close(descriptor)

    async def _exchange(self, request: Message) -> Message:
        # The answer is written from within the handler: in order with events.
        answered: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        def handle(reply: Message | None) -> None:
            if reply is None:
                self.end()
                reply = {}
            else:
                reply.pop("id", None)
                if name_of(request) == DUMP_COMMAND and "return" in reply:
                    self._dumps.latest_is_native = True
                self._answer(self._adapt(reply, request), request)
            if not answered.done():
                answered.set_result(reply)

        self._upstream.post(request, handle)
        return await answered

    def _adapt(self, reply: Message, request: Message) -> Message:
        job = self._dumps.job
        status = reply.get("return")
        if (
            name_of(request) == "query-status"
            and self._dumps.active
            and job is not None
            and job.stopped_guest
            and isinstance(status, dict)
            and status.get("status") == "paused"
        ):
            return {**reply, "return": {**status, "status": "save-vm"}}
        return reply
