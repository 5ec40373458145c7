"""A QMP client of a few lines, independent of the package's own."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Self


class RawQmp:
    """Connected and past the negotiation; events are kept in `events`."""

    def __init__(self, path: Path, timeout_seconds: float = 300) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_seconds)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self.events: list[dict[str, Any]] = []
        try:
            self.greeting: dict[str, Any] = self._answer()["QMP"]
            self.execute("qmp_capabilities")
        except BaseException:
            self.__exit__()
            raise

    def execute(self, command: str, **arguments: Any) -> Any:
        """Return the answer; an error of QEMU raises."""
        request = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        answer = self._answer()
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def _answer(self) -> dict[str, Any]:
        # Behind the events: QEMU may send some even before its greeting.
        while "event" in (message := json.loads(self._lines.readline())):
            self.events.append(message)
        return dict(message)

    def wait_for_event(self, name: str) -> dict[str, Any]:
        """Return the first event of a name, past or to come."""
        while True:
            for event in self.events:
                if event["event"] == name:
                    return event
            self.events.append(json.loads(self._lines.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()


def tcp_address_of_qmp(qmp: RawQmp) -> str:
    """Return HOST:PORT of the TCP socket on which QEMU listens, asked through another one."""
    labels = [entry["filename"] for entry in qmp.execute("query-chardev")]
    address = next(label for label in labels if "tcp:" in label).split(",")[0]
    return str(address.rpartition("tcp:")[2])
