"""QEMU by its human monitor alone: a unix socket, TCP, or a pty.

The answer of a command is what stands between the echo of the line, which is known to the byte, and
the next prompt. What comes while nothing was asked is passed on to every client.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import termios
import tty

from qemu_dump_ext.errors import ConnectError, SourceError
from qemu_dump_ext.qemu.address import tcp_address
from qemu_dump_ext.qemu.command_line import HMP
from qemu_dump_ext.qemu.hmp import is_terminal
from qemu_dump_ext.qemu.socket_kind import GREETING_SECONDS, TelnetFilter, open_socket

from ..readline import LINE_MAX, PROMPT, LineEditor
from .upstream import Upstream, reason_of

_ANSWER_SECONDS = 120.0
_ANSWER_MAX = 64 << 20
_READ_SIZE = 1 << 16
_BANNER = re.compile(rb"QEMU (\d+)\.(\d+)\.(\d+)\S* monitor - type 'help' for more information")
_ASKS_FOR_PASSWORD = re.compile(r"\s*change\s+vnc\s+passw(or)?d\s*")
_CPU_DEFAULT = 0


class HmpUpstream(Upstream):
    """One connection to QEMU's human monitor."""

    def __init__(self, address: str, pid: int | None = None) -> None:
        super().__init__(address, pid)
        self._descriptor = -1
        self._socket: socket.socket | None = None
        self._telnet: TelnetFilter | None = None
        self._received = bytearray()
        self._asked = False
        self._news = asyncio.Event()
        self._lost = asyncio.Event()
        self._lock = asyncio.Lock()
        self._cpu_index = _CPU_DEFAULT
        self._editor = LineEditor(self.version)

    async def execute_hmp(self, line: str, cpu_index: int | None = None) -> str:
        """Return the answer of a line of the human monitor."""
        if _ASKS_FOR_PASSWORD.fullmatch(line):
            return "terminal does not support password prompting\r\n"  # as by QMP
        async with self._lock:
            index = _CPU_DEFAULT if cpu_index is None else cpu_index
            if index != self._cpu_index:
                # Every client has a vCPU of its own, and QEMU's monitor has one for all of them.
                await self._exchange(f"cpu {index}".encode())
                self._cpu_index = index
            return (await self._exchange(_one_line(line))).decode("utf-8", "replace")

    async def close(self) -> None:
        """Disconnect."""
        if self._descriptor >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._descriptor)
            if self._socket is not None:
                self._socket.close()
                self._socket = None
            else:
                os.close(self._descriptor)
            self._descriptor = -1
        self._lost.set()
        self._news.set()

    async def _exchange(self, line: bytes) -> bytes:
        if self._lost.is_set():
            raise self._gone()
        for key in line:
            self._editor.feed(key)
        self._editor.feed(ord("\n"))
        self._editor.show_prompt()
        echo = self._editor.take_output().removesuffix(PROMPT)
        self._received.clear()
        self._asked = True
        try:
            await self._send(line + b"\n")
            # As long as it takes: savevm, or a dump of QEMU's own, may take minutes.
            answer = await self._up_to_prompt(len(echo))
        finally:
            self._asked = False
        if not answer.startswith(echo):
            await self.close()
            raise SourceError(f"{self.address} does not echo as QEMU's monitor does")
        return answer.removeprefix(echo)

    async def _up_to_prompt(self, echo_size: int) -> bytes:
        while True:
            if len(self._received) >= echo_size and _ends_with_prompt(self._received):
                answer = bytes(self._received).removesuffix(PROMPT)
                self._received.clear()
                return answer
            if self._lost.is_set() or len(self._received) > _ANSWER_MAX:
                raise self._gone()
            self._news.clear()
            await self._news.wait()

    async def _send(self, data: bytes) -> None:
        while data and self._descriptor >= 0:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                await asyncio.sleep(0.001)
            except OSError as error:
                raise self._gone() from error

    def _readable(self) -> None:
        try:
            data = os.read(self._descriptor, _READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data and self._telnet is not None:
            data = self._telnet.take(data)
            if not data:
                return
        if not data:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            self._lost.set()
        elif self._asked or not self.connected:
            self._received += data
        else:
            self.on_text(data)
        self._news.set()

    async def _connect(self) -> None:
        await self.close()
        self._received.clear()
        try:
            self._descriptor = await self._open()
            os.set_blocking(self._descriptor, False)
            asyncio.get_running_loop().add_reader(self._descriptor, self._readable)
            self._lost.clear()
            at_pty = self._socket is None
            if at_pty:
                await self._send(b"\x05\x15\n")  # a pty says nothing until a line is entered
            await asyncio.wait_for(
                self._up_to_prompt_of_banner(has_banner=not at_pty), GREETING_SECONDS
            )
            if at_pty:
                self._take_version(await self._exchange(b"info version"), rb"(\d+)\.(\d+)\.(\d+)")
        except TimeoutError as error:
            await self.close()
            raise ConnectError(
                f"monitor {self.address} is busy: no prompt in {GREETING_SECONDS:.0f} s",
                hint="QEMU serves one client on a monitor; end the other one or add a monitor",
            ) from error
        except ConnectError:
            await self.close()
            raise
        except (OSError, SourceError, termios.error) as error:
            await self.close()
            raise ConnectError(
                f"cannot connect to monitor {self.address}: {reason_of(error)}",
                hint="it is the path behind -monitor unix:PATH,server=on,wait=off",
            ) from error
        self._cpu_index = _CPU_DEFAULT

    async def _up_to_prompt_of_banner(self, *, has_banner: bool) -> None:
        while not _ends_with_prompt(self._received):
            if self._lost.is_set():
                raise self._gone()
            self._news.clear()
            await self._news.wait()
        if has_banner:
            self._take_version(bytes(self._received), _BANNER.pattern)
        self._received.clear()

    def _take_version(self, text: bytes, pattern: bytes) -> None:
        match = re.search(pattern, text)
        if match is None:
            raise ConnectError(f"{self.address} is no monitor of QEMU")
        major, minor, micro = (int(number) for number in match.groups())
        self.version = (major, minor, micro)
        self._editor = LineEditor(self.version)

    async def _open(self) -> int:
        if tcp_address(self.address) is None and is_terminal(self.address):
            descriptor = os.open(self.address, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
            try:
                tty.setraw(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor
        connected = self._socket = await asyncio.to_thread(open_socket, self.address, HMP)
        self._telnet = TelnetFilter.of(connected)
        return connected.fileno()

    async def _wait_lost(self) -> None:
        await self._lost.wait()
        self.connected = False
        await self.close()


def _ends_with_prompt(received: bytearray) -> bool:
    if not received.endswith(PROMPT):
        return False
    before = len(received) - len(PROMPT)
    return before == 0 or received[before - 1 : before] == b"\n"


def _one_line(line: str) -> bytes:
    # Keys that edit would change what is sent.
    return bytes(key for key in line.encode() if key >= 32 and key not in {127, 0x9B})[:LINE_MAX]
