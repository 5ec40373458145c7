"""A QMP peer that lies: what a real QEMU says, but for some answers."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

DEEP = b"[" * 100_000 + b"]" * 100_000
WRONG_KINDS: Mapping[str, bytes] = {
    "null": b"null",
    "list": b"[[], null, {}]",
    "number": b"7",
    "empty object": b"{}",
    "wrong members": b'{"status": [], "arch": {}, "name": null, "running": "no"}',
    "deep": DEEP,
}


class LyingQmp:
    """Stands between whoever connects to `path` and a QEMU.

    Attributes:
        path: Of the socket.
        lies: What is behind `return`, by the command; those of the human monitor by their line.
        replies: Whole lines instead of answers, likewise, in which `@ID@` is the id; empty: the
            connection is closed, though QEMU has done what it was told.
        delay: Seconds before each answer.
        held: A command whose answer does not come as long as it stands here.
        told: How often each lie was told.
        connections: How many there were.
        asked: All that was asked.
    """

    def __init__(self, qemu: Path, path: Path) -> None:
        self.path = path
        self.lies: dict[str, bytes] = {}
        self.replies: dict[str, bytes] = {}
        self.delay = 0.0
        self.held = ""
        self.told: dict[str, int] = {}
        self.connections = 0
        self.asked: set[str] = set()
        self._qemu = qemu
        self._client: socket.socket | None = None
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(1)

    @contextmanager
    def running(self) -> Iterator[LyingQmp]:
        """Serve one client after the other until the end of the block."""
        thread = threading.Thread(target=self._serve, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.held = ""
            self._listening.shutdown(socket.SHUT_RDWR)
            thread.join()
            self._listening.close()

    def hang_up(self) -> None:
        """Close the connection that there is."""
        if self._client is not None:
            with suppress(OSError):
                self._client.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            with client, socket.socket(socket.AF_UNIX) as qemu:
                self._client = client
                self.connections += 1
                qemu.connect(str(self._qemu))
                with suppress(OSError):
                    _Conversation(self, client, qemu).run()


class _Conversation:
    def __init__(self, peer: LyingQmp, client: socket.socket, qemu: socket.socket) -> None:
        self._peer = peer
        self._client = client
        self._qemu = qemu
        self._asked: dict[str, str] = {}

    def run(self) -> None:
        back = threading.Thread(target=self._answers, daemon=True)
        back.start()
        try:
            self._questions()
        finally:
            self._qemu.shutdown(socket.SHUT_RDWR)
            back.join()

    def _questions(self) -> None:
        rest = ""
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._client, 1 << 16, 4)
            if not data:
                return
            rest += data.decode()
            with suppress(ValueError):
                while True:  # qemu.qmp ends no line
                    message, end = json.JSONDecoder().raw_decode(rest := rest.lstrip())
                    rest = rest[end:]
                    self._asked[str(message.get("id"))] = _name(message)
                    self._peer.asked.add(_name(message))
            socket.send_fds(self._qemu, [data], descriptors)
            for descriptor in descriptors:
                socket.close(descriptor)

    def _answers(self) -> None:
        with suppress(OSError), self._qemu.makefile("rb") as lines:
            for line in lines:
                said = self._instead_of(line)
                if b'"event"' not in line:
                    time.sleep(self._peer.delay)
                if not said:
                    break
                while self._peer.held and self._peer.held == self._asked_by(line):
                    time.sleep(0.005)
                self._client.sendall(said)
        with suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)

    def _asked_by(self, line: bytes) -> str:
        return self._asked.get(str(json.loads(line).get("id")), "")

    def _instead_of(self, line: bytes) -> bytes:
        answer: dict[str, Any] = json.loads(line)
        name, peer = self._asked_by(line), self._peer
        if "return" not in answer or name not in peer.lies | peer.replies:
            return line
        peer.told[name] = peer.told.get(name, 0) + 1
        if name in peer.replies:
            return peer.replies[name].replace(b"@ID@", answer["id"].encode())
        return b'{"return": %s, "id": "%s"}\n' % (peer.lies[name], answer["id"].encode())


def _name(message: Mapping[str, Any]) -> str:
    name = str(message.get("execute") or message.get("exec-oob"))
    arguments = message.get("arguments") or {}
    return str(arguments["command-line"]) if name == "human-monitor-command" else name
