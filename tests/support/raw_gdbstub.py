"""A client of the gdb remote protocol of a few lines, independent of the package's own."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from tests.support.waiting import SECONDS


class RawGdbstub:
    """Connected; closing leaves the guest as it is, stopped."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        self._socket.connect(str(path))
        self._input = self._socket.makefile("rb")

    def packet(self, text: str) -> str:
        data = text.encode()
        self._socket.sendall(b"$%s#%02x" % (data, sum(data) & 0xFF))
        while self._byte() != b"$":
            pass
        reply = bytearray()
        while not reply.endswith(b"#"):
            waiting = self._input.peek()
            if not waiting:
                raise RuntimeError("QEMU closed the gdbstub")
            reply += self._input.read(waiting.find(b"#") + 1 or len(waiting))
        del reply[-1]
        self._input.read(2)
        self._socket.sendall(b"+")
        # Repeated characters are sent once, with their number.
        return re.sub(rb"(.)\*(.)", lambda m: m[1] * (m[2][0] - 28), bytes(reply)).decode("latin-1")

    def _byte(self) -> bytes:
        byte = self._input.read(1)
        if not byte:
            raise RuntimeError("QEMU closed the gdbstub")
        return byte

    def described_registers(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, number and size in bytes of each register; nothing without a description."""
        number = 0
        top = self._document("target.xml")
        for document in [top, *map(self._document, re.findall(r'include href="([^"]+)"', top))]:
            for element in re.findall(r"<reg\s[^>]*>", document):
                attributes = dict(re.findall(r'(\w+)="([^"]*)"', element))
                number = int(attributes.get("regnum", number))
                yield attributes["name"], number, int(attributes["bitsize"]) // 8
                number += 1

    def _document(self, name: str) -> str:
        text = ""
        while (part := self.packet(f"qXfer:features:read:{name}:{len(text):x},f00"))[:1] in "ml":
            text += part[1:]
            if part[:1] != "m":
                break
        return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._input.close()
        self._socket.close()
