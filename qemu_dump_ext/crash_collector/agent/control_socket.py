"""The agent's socket for people and scripts: one line of JSON in, one line of JSON out."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from qemu_dump_ext.errors import ConnectError, DumpError, RequestError, SourceError
from qemu_dump_ext.qemu.address import bindable, connectable
from qemu_dump_ext.qemu.qmp_message import parse_message

_LINE_MAX = 1 << 16
_CONNECTIONS_MAX = 16
_ASKING_MAX = 64
_IDLE_SECONDS = 10.0

Answer = Mapping[str, Any]
Handler = Callable[[Mapping[str, Any]], Awaitable[Answer]]


class AgentRefusalError(DumpError):
    """What the agent says to a request that it does not grant."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


async def serve_control(path: Path, handle: Handler) -> asyncio.Server:
    """Listen; only our own user may connect, and nobody for long without asking.

    Args:
        path: The path of the socket; an old one is replaced.
        handle: Answers a request; `DumpError` becomes the answer `error`.

    Raises:
        RequestError: There can be no such socket.
    """
    # The backlog waits in the kernel, and costs no descriptor.
    return await asyncio.start_unix_server(
        _Door(handle).serve, sock=_listen(path), limit=_LINE_MAX, backlog=_CONNECTIONS_MAX
    )


class _Door:
    def __init__(self, handle: Handler) -> None:
        self._handle = handle
        # Who has not asked yet, the longest first; the agent needs its descriptors itself.
        self._silent: dict[asyncio.StreamWriter, None] = {}
        self._asking = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await self._line(reader, writer)
            if line:
                answer = await self._answer(line)
                writer.write(json.dumps(answer).encode() + b"\n")
                async with asyncio.timeout(_IDLE_SECONDS):
                    await writer.drain()
        except (OSError, ValueError):  # of time, too
            pass  # who asked is gone, or says nothing, or more than a line
        finally:
            writer.close()

    async def _line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        while len(self._silent) >= _CONNECTIONS_MAX:
            oldest = next(iter(self._silent))
            del self._silent[oldest]
            oldest.transport.abort()
        self._silent[writer] = None
        try:
            async with asyncio.timeout(_IDLE_SECONDS):
                return await reader.readline()
        finally:
            self._silent.pop(writer, None)

    async def _answer(self, line: bytes) -> Answer:
        if self._asking >= _ASKING_MAX:
            return {"error": "too many wait for an answer", "exit_status": SourceError.exit_status}
        self._asking += 1
        try:
            return await _answer(line, self._handle)
        finally:
            self._asking -= 1


def _listen(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        path.unlink(missing_ok=True)
        with bindable(path) as place:
            listening.bind(place)
    except OSError as error:
        listening.close()
        raise RequestError(f"cannot listen at {path}: {error.strerror}") from error
    except ConnectError:
        listening.close()
        raise
    finally:
        os.umask(mask)
    return listening


async def _answer(line: bytes, handle: Handler) -> Answer:
    try:
        request = parse_message(line)
    except ValueError as error:
        text = f"a request is one object of JSON in one line: {error}"
        return {"error": text, "exit_status": RequestError.exit_status}
    try:
        return await handle(request)
    except DumpError as error:
        return {"error": str(error), "exit_status": error.exit_status}


def ask_agent(path: Path, request: Mapping[str, object]) -> Answer:
    """Ask the agent and wait for its answer, which may take as long as a dump.

    Raises:
        ConnectError: No agent listens.
        AgentRefusalError: It refuses.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            with connectable(f"unix:{path}") as place:
                connection.connect(place)
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as lines:
                line = lines.readline()
        except OSError as error:
            raise ConnectError(
                f"no agent listens at {path}: {error.strerror}",
                hint="qemu-crash-collector run, or systemctl start qemu-crash-collector",
            ) from error
    if not line:
        raise ConnectError("the agent ended before it answered")
    answer: Answer = json.loads(line)
    if "error" in answer:
        raise AgentRefusalError(str(answer["error"]), int(answer["exit_status"]))
    return answer
