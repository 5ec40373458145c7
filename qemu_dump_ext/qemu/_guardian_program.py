"""What a guardian runs: `PROGRAM KIND ADDRESS FILE [THING [STREAM]]`, standard library alone.

Standard input tells what to do: a byte, that nothing is left to do; its end without one, that the
guest is to be let run, and FILE to be removed then, or that the thing is to be taken back, unless
it is empty, when the stream, a descriptor, has been read to its end. It is a capability of
migrations, or `gdbstub:PATH`, of a gdbstub that was opened there.
"""

from __future__ import annotations

import io
import json
import os
import re
import select
import socket
import stat
import sys
import time
import tty
from collections.abc import Callable
from typing import Any

_LINE_MAX = 1 << 20
_ACKNOWLEDGEMENTS = (b"+", b"-")
_RETRY_SECONDS = 0.3
_COMES_BACK_SECONDS = 600.0
STREAM_NAME = "qemu-dump-live"
"""By which QEMU has the descriptor of a stream, until a migration takes it."""
_STUB = "gdbstub:"
_IN_PROCESS = "dump in process"
_MIGRATION_ENDED = frozenset((None, "none", "cancelled", "completed", "failed"))
_PAUSED = re.compile(r"VM status: paused(?: \(single step mode\))?\s*$", re.MULTILINE)


class GoneError(Exception):
    """QEMU has closed the connection."""


class _Qmp:
    """QMP; QEMU answers there, too, what it still did for who was connected before."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._count = 0
        self._lines = connection.makefile("rb")
        self._message()  # the greeting: QEMU is there, and for us
        self.execute("qmp_capabilities")

    def is_paused(self) -> bool:
        answer = self.execute("query-status").get("return")
        return isinstance(answer, dict) and answer.get("status") == "paused"

    def resume(self) -> bool:
        """Tell whether QEMU has taken it: it does not while it dumps the guest itself."""
        return _IN_PROCESS not in json.dumps(self.execute("cont").get("error"))

    def monitor(self, command: str) -> str:
        arguments = {"command-line": command}
        return str(self.execute("human-monitor-command", arguments).get("return"))

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        self._count += 1
        mine = f"guardian {os.getpid()} {self._count}"
        request = {"execute": command, "id": mine} | ({"arguments": arguments} if arguments else {})
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        while (answer := self._message()).get("id") != mine:
            pass
        return answer

    def _message(self) -> dict[str, Any]:
        line = self._lines.readline(_LINE_MAX)
        if not line:
            raise GoneError
        return _object(line.decode("utf-8", "replace"))


class StubPeer:
    """QEMU's monitor behind a gdbstub that was connected to.

    Attributes:
        told_of_stop: It has said that it stopped the guest, which ran until then.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._bytes = connection.makefile("rb")
        self.told_of_stop = False

    def is_paused(self) -> bool:
        """Tell whether the guest is paused, as a connection to the stub leaves it."""
        return _PAUSED.search(self.execute("info status")) is not None

    def resume(self) -> bool:
        """Tell whether QEMU has taken it: it does not while it dumps the guest itself."""
        return _IN_PROCESS not in self.execute("cont")

    def execute(self, command: str) -> str:
        """Return the answer of a command of the human monitor."""
        data = b"qRcmd," + command.encode().hex().encode()
        self._connection.sendall(b"$%s#%02x" % (data, sum(data) & 0xFF))
        text = ""
        while (packet := self._packet()) not in {b"OK", b""} and not packet.startswith(b"E"):
            if packet[:1] in {b"T", b"S"}:
                self.told_of_stop = True
            if packet.startswith(b"O"):
                text += bytes.fromhex(packet[1:].decode("ascii", "replace")).decode(
                    "utf-8", "replace"
                )
        return text

    def _packet(self) -> bytes:
        while (byte := self._bytes.read(1)) != b"$":
            if byte not in _ACKNOWLEDGEMENTS:
                raise GoneError  # or it is no stub
        packet = b""
        while (byte := self._bytes.read(1)) != b"#":
            if not byte or len(packet) > _LINE_MAX:
                raise GoneError
            packet += byte
        self._bytes.read(2)
        self._connection.sendall(b"+")
        return packet


class _Hmp:
    """A human monitor at a socket, also behind telnet, or at a pty."""

    def __init__(self, connection: socket.socket | io.FileIO) -> None:
        self._descriptor = connection.fileno()
        if isinstance(connection, io.FileIO):
            tty.setraw(self._descriptor)
            # It says nothing until a line is entered, and greets when it finds that it is open
            # again, which may be late: behind an answer of its own, it is in step.
            self._write(b"\x05\x15\nprint 70000+3112\n")
            while b"0x11d98" not in self._up_to_prompt():
                pass
        else:
            self._up_to_prompt()

    def is_paused(self) -> bool:
        return _PAUSED.search(self._execute(b"info status")) is not None

    def resume(self) -> bool:
        return _IN_PROCESS not in self._execute(b"cont")

    def monitor(self, command: str) -> str:
        return self._execute(command.encode())

    def _execute(self, command: bytes) -> str:
        self._write(command + b"\n")
        # Behind the echo of the line.
        return self._up_to_prompt().partition(b"\n")[2].decode("utf-8", "replace")

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._descriptor, data) :]

    def _up_to_prompt(self) -> bytes:
        received = b""
        while not received.endswith(b"(qemu) "):
            data = os.read(self._descriptor, 1 << 16)
            if not data or len(received) > _LINE_MAX:
                raise GoneError
            received += data
        return received.replace(b"\r\n", b"\n")


_KINDS: dict[str, Callable[[Any], _Qmp | _Hmp | StubPeer]] = {
    "qmp": _Qmp,
    "hmp": _Hmp,
    "gdb": StubPeer,
}


def _connect(address: object) -> socket.socket | io.FileIO:
    if isinstance(address, str) and stat.S_ISCHR(os.stat(address).st_mode):  # noqa: PTH116
        return io.FileIO(os.open(address, os.O_RDWR | os.O_NOCTTY), "r+")
    if isinstance(address, str):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
        return connection
    host, port = address if isinstance(address, list) else ("", 0)
    return socket.create_connection((host, port))


def _release_by_libvirt(virsh: str, uri: str, domain: str, pid: int) -> None:
    # As long as QEMU lives, or where that is not to be seen, as libvirt may take to come back.
    deadline = time.monotonic() + _COMES_BACK_SECONDS
    while _is_there(pid) if pid else time.monotonic() < deadline:
        state = _virsh(virsh, uri, "domstate", "--reason", "--domain", domain)
        if state is not None and state.split() != ["paused", "(user)"]:
            return
        if state is not None and _virsh(virsh, uri, "resume", "--domain", domain) is not None:
            return
        time.sleep(_RETRY_SECONDS)


def _close_stub(kind: str, address: Any, path: str) -> None:
    """Have QEMU close the gdbstub at a path, and no other one."""
    if kind == "libvirt":
        virsh, uri, domain, _ = address
        ask = ("qemu-monitor-command", "--hmp", "--domain", domain)
        if _has_stub(_virsh(virsh, uri, *ask, "info chardev") or "", path):
            _virsh(virsh, uri, *ask, "gdbserver none")
        return
    with _connect(address) as connection:
        peer = _KINDS[kind](connection)
        if not isinstance(peer, StubPeer) and _has_stub(peer.monitor("info chardev"), path):
            peer.monitor("gdbserver none")


def _has_stub(devices: str, path: str) -> bool:
    here = rf"^gdb: filename=\S*unix:{re.escape(path)}[,\s]"
    return re.search(here, devices, re.MULTILINE) is not None


def _is_there(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")  # noqa: PTH110 - as few imports as can be


def _virsh(program: str, uri: str, *words: str) -> str | None:
    """Return what a command prints, or None: libvirt is not there, or does something else."""
    import subprocess  # noqa: PLC0415 - for few, for whom it is here already

    done = subprocess.run(
        [program, "-q", "-c", uri, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=os.environ | {"LC_ALL": "C"},
    )
    if "failed to get domain" in done.stderr:
        raise GoneError
    return None if done.returncode else done.stdout


def release(kind: str, address: object) -> None:
    """Let a guest run if it is paused; waits until QEMU answers, or is gone."""
    if kind == "libvirt" and isinstance(address, list):
        _release_by_libvirt(*address)
        return
    while True:
        with _connect(address) as connection:
            peer = _KINDS[kind](connection)
            if not peer.is_paused() or peer.resume():
                return
        time.sleep(_RETRY_SECONDS)


def take_back(kind: str, address: Any, capability: str, stream: int | None) -> None:
    """Take a capability back; waits until QEMU answers, or is gone.

    Args:
        kind: How QEMU is reached.
        address: Where.
        capability: Which; empty: none, but the stream is read all the same.
        stream: What is to be read to its end before, or None.
    """
    if kind == "libvirt":
        _take_back_by_libvirt(address, capability, stream)
        return
    while stream is not None and os.read(stream, _LINE_MAX):
        pass
    while capability:
        with _connect(address) as connection:
            # Whatever is no socket is a console, which is no QMP.
            if not isinstance(connection, socket.socket):
                return
            if _takes_back(_Qmp(connection).execute, capability):
                return
        time.sleep(_RETRY_SECONDS)


def _take_back_by_libvirt(
    where: tuple[str, str, str, int], capability: str, stream: int | None
) -> None:
    virsh, uri, domain, pid = where

    def ask(command: str, arguments: dict[str, Any] | None = None) -> dict[str, Any] | None:
        request = {"execute": command} | ({"arguments": arguments} if arguments else {})
        words = ("qemu-monitor-command", "--domain", domain, json.dumps(request))
        answer = _virsh(virsh, uri, *words)
        return None if answer is None else _object(answer)

    deadline = time.monotonic() + _COMES_BACK_SECONDS
    while _is_there(pid) if pid else time.monotonic() < deadline:
        if stream is not None and select.select([stream], [], [], _RETRY_SECONDS)[0]:
            stream = stream if os.read(stream, _LINE_MAX) else None
            continue
        if _has_migrated(ask):
            # What libvirt has handed over stays QEMU's where no migration took it.
            ask("closefd", {"fdname": STREAM_NAME})
            if stream is None and (not capability or _takes_back(ask, capability)):
                return
        time.sleep(_RETRY_SECONDS)


def _has_migrated(ask: Callable[..., dict[str, Any] | None]) -> bool:
    """Tell whether QEMU answers, and no migration is under way."""
    answer = ask("query-migrate")
    if answer is None:
        return False
    told = answer.get("return")
    return (told.get("status") if isinstance(told, dict) else None) in _MIGRATION_ENDED


def _takes_back(ask: Callable[..., dict[str, Any] | None], capability: str) -> bool:
    """Tell whether a capability is off: QEMU changes none during a migration."""
    if not _has_migrated(ask):
        return False
    # QEMU takes it once more only when it has let go of guest memory; taken away before, the
    # guest would hang.
    for on in (True, False):
        wanted = {"capabilities": [{"capability": capability, "state": on}]}
        if "return" not in (ask("migrate-set-capabilities", wanted) or {}):
            return False
    return True


def _object(text: str) -> dict[str, Any]:
    message = json.loads(text)
    return message if isinstance(message, dict) else {}


if __name__ == "__main__" and sys.argv[1] == "libvirt":
    import subprocess  # noqa: F401 - now: when it is used, its file may be gone, or another

if __name__ == "__main__" and not sys.stdin.buffer.read(1):
    try:
        if len(sys.argv) > 4:
            if sys.argv[4].startswith(_STUB):
                where = json.loads(sys.argv[2])
                _close_stub(sys.argv[1], where, sys.argv[4].removeprefix(_STUB))
            else:
                descriptor = int(sys.argv[5]) if len(sys.argv) > 5 else None
                take_back(sys.argv[1], json.loads(sys.argv[2]), sys.argv[4], descriptor)
        else:
            release(sys.argv[1], json.loads(sys.argv[2]))
        if sys.argv[3]:  # which says that it is still to be done
            os.unlink(sys.argv[3])  # noqa: PTH108 - as few imports as can be
    except (GoneError, OSError, ValueError):
        sys.exit(1)
