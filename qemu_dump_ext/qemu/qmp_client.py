"""The QMP client of all doors: qemu.qmp, to which a peer may send anything.

qemu.qmp ends the connection at the first message that it does not understand, and some messages
end its reader without a word. Here such a message is the answer to one question.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from qemu_dump_ext.qemu.qmp_message import LINE_MAX, parse_message

if TYPE_CHECKING:
    from qemu.qmp import EventListener, QMPClient

_ID = re.compile(rb'"id"\s*:\s*"([^"\\]{1,100})"')
_BLOCK = 1 << 16


class _LongLineError(ValueError):
    def __init__(self, end: bytes) -> None:
        super().__init__(f"it is longer than {LINE_MAX} bytes")
        self.end = end


def _end_of(error: ValueError) -> bytes:
    return error.end if isinstance(error, _LongLineError) else b""


def _description(content: dict[str, Any]) -> str:
    error = content.get("error")
    return str(error.get("desc"))[:200] if isinstance(error, dict) else "it has no id"


def new_listener(hear: Callable[[Mapping[str, Any]], None]) -> EventListener:
    """Return a listener that hands events on at once: qemu.qmp's own keeps them all."""
    from qemu.qmp import EventListener, Message  # noqa: PLC0415 - gdb's own Python may lack it

    class Listener(EventListener):
        async def put(self, event: Message) -> None:
            hear(event)

    return Listener()


def new_client(on_unreadable: Callable[[str], None] | None = None) -> QMPClient:
    """Return a client that is not connected yet.

    Args:
        on_unreadable: Told of messages that make no sense and belong to no question.

    Raises:
        ImportError: The package qemu.qmp is not installed.
    """
    client: QMPClient = client_class()(on_unreadable)
    return client


@cache
def client_class() -> type[Any]:
    """Return the class of all our clients; a door that orders answers by itself derives from it.

    Raises:
        ImportError: The package qemu.qmp is not installed.
    """
    from qemu.qmp import Message, QMPClient  # noqa: PLC0415 - gdb's own Python may lack it
    from qemu.qmp.error import ProtocolError  # noqa: PLC0415

    class Client(QMPClient):
        # What it logs is in its exceptions as well.
        logger = logging.Logger("qemu.qmp", logging.CRITICAL + 1)  # noqa: LOG001 - of nobody else

        def __init__(self, on_unreadable: Callable[[str], None] | None = None) -> None:
            super().__init__(readbuflen=LINE_MAX)
            self._on_unreadable = on_unreadable
            self._own_ids = os.urandom(4).hex()

        def _get_exec_id(self) -> str:
            # QEMU answers here, too, what it still did for who was connected before: who counts
            # as we do would be answered for us.
            return f"{super()._get_exec_id()} {self._own_ids}"

        def waiting_ids(self) -> Iterable[str]:
            # Of questions without an answer, in the order in which they were asked.
            return [key for key in self._pending if key is not None]

        # Its own would build the whole text of every message for a log that nobody reads.
        def _cb_inbound(self, msg: Message) -> Message:
            return msg

        def _cb_outbound(self, msg: Message) -> Message:
            return msg

        async def _do_recv(self) -> Message:
            while True:
                line = b""
                content: dict[str, Any] | None
                try:
                    line = await self._readline()
                    content = self._routed(parse_message(line))
                except ValueError as error:
                    if self._reader_task is None:  # the greeting, or what follows it
                        raise ProtocolError(f"the message makes no sense: {error}") from error
                    content = self._refusal(line or _end_of(error), str(error))
                if content is None or (self._reader_task is None and "id" in content):
                    continue  # the negotiation is without one
                message = Message(content, eager=False)
                if self._reader_task is not None or "event" not in content:
                    return message
                # QEMU sends events before its greeting and behind it where the socket had another
                # client just before.
                await self._on_message(message)

        async def _readline(self) -> bytes:
            if (reader := self._reader) is None:
                raise EOFError
            try:
                line = await reader.readuntil()
            except asyncio.IncompleteReadError as error:
                line = error.partial
            except asyncio.LimitOverrunError:
                await self._skip_line(reader)
            if not line:
                raise EOFError
            return line

        async def _skip_line(self, reader: asyncio.StreamReader) -> NoReturn:
            tail = b""
            while not tail.endswith(b"\n"):
                try:
                    tail = tail[-_BLOCK:] + await reader.readuntil()
                except asyncio.LimitOverrunError as error:
                    tail = tail[-_BLOCK:] + await reader.readexactly(error.consumed)
                except asyncio.IncompleteReadError as error:
                    raise EOFError from error
            raise _LongLineError(tail[-_BLOCK:])

        def _routed(self, content: dict[str, Any]) -> dict[str, Any]:
            is_greeting = self._reader_task is None
            if is_greeting or "event" in content or isinstance(content.get("id"), str):
                return content
            raise ValueError(f"it is the answer to nothing: {_description(content)}")

        def _refusal(self, line: bytes, reason: str) -> dict[str, Any] | None:
            named = {match.decode("utf-8", "replace") for match in _ID.findall(line)}
            # QEMU answers in the order in which it was asked.
            waiting = [key for key in self.waiting_ids() if key in named]
            if not waiting and b'"event"' not in line[:_BLOCK]:
                waiting = list(self.waiting_ids())
            if not waiting:
                if self._on_unreadable is not None:
                    self._on_unreadable(f"a message of QEMU's makes no sense: {reason}")
                return None
            error = {"class": "GenericError", "desc": f"the answer makes no sense: {reason}"}
            return {"id": waiting[0], "error": error}

    return Client
