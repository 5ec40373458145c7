"""The HMP proxy as its users come to it: started as a program, reached by sockets."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.support.doors import child_environment
from tests.support.waiting import SECONDS, wait_until

PROMPT = b"(qemu) "
GONE_PROMPT = b"(qemu gone) "
_MAIN = "import sys; from qemu_dump_ext.cli.hmp_proxy_command import main; sys.exit(main())"


def proxy_argv(*words: object) -> list[str]:
    """Return the command line of `qemu-hmp-proxy` with these words behind it."""
    return [sys.executable, "-c", _MAIN, *map(str, words)]


def run_proxy(*words: object, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run `qemu-hmp-proxy` with `text` as its input, to its end."""
    return subprocess.run(
        proxy_argv(*words),
        input=text,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=child_environment(),
    )


def monitor_arguments(path: Path) -> list[str]:
    """Return arguments that give QEMU a human monitor at `path`."""
    chardev = f"socket,id=monitor,path={path},server=on,wait=off"
    return ["-chardev", chardev, "-mon", "chardev=monitor,mode=readline"]


class Proxy:
    """A running proxy that listens at a unix socket, and if wished at one for QMP.

    Attributes:
        socket: Of the human monitor.
        qmp_socket: Of QMP.
    """

    def __init__(self, folder: Path, *words: object, qmp: bool = False) -> None:
        self.socket, self.qmp_socket = folder / "proxy", folder / "proxy-qmp"
        argv = proxy_argv(*words, "--listen", self.socket)
        if qmp:
            argv += ["--qmp-listen", str(self.qmp_socket)]
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment(),
        )
        wanted = [self.socket, *([self.qmp_socket] if qmp else [])]
        wait_until(lambda: self._has_ended() or all(map(listens_at, wanted)), "the proxy listens")
        assert not self._has_ended(), self.stop()

    def _has_ended(self) -> bool:
        return self.process.poll() is not None

    def peak_kib(self) -> int:
        """Return the most memory that the proxy has had."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text("utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    def stop(self) -> tuple[int, str]:
        """End it; return its exit status and what it complained of."""
        self.process.terminate()
        complaints = self.process.communicate(timeout=SECONDS)[1]
        return self.process.returncode, complaints

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        complaints = self.stop()[1]
        assert "Traceback" not in complaints, complaints


def listens_at(path: Path) -> bool:
    """Tell whether somebody listens at a unix socket, by connecting to it."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


class HmpSocket:
    """A client of a human monitor, QEMU's or the proxy's: raw bytes."""

    def __init__(self, path: Path, prompt: bytes = PROMPT) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        self._socket.connect(str(path))
        self.banner = self.wait(prompt)

    def send(self, data: bytes) -> None:
        """Send keys."""
        self._socket.sendall(data)

    def receive(self) -> bytes:
        """Return some bytes, b"" at the end."""
        return self._socket.recv(1 << 16)

    def wait(self, ending: bytes = PROMPT) -> bytes:
        """Return everything up to `ending`."""
        received = b""
        while not received.endswith(ending):
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError(received)
            received += data
        return received

    def exchange(self, line: str) -> bytes:
        """Enter a line and return all bytes up to the next prompt."""
        self.send(line.encode() + b"\n")
        return self.wait()

    def command(self, line: str) -> str:
        """Enter a line and return its answer, with plain line ends."""
        answer = self.exchange(line).partition(b"\r\n")[2].removesuffix(PROMPT)
        return answer.decode().replace("\r\n", "\n")

    def close(self) -> None:
        """Leave."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class QmpSocket:
    """A client of QMP that keeps everything in the order in which it came, but for timestamps."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        try:
            self.greeting = self.message()
        except EOFError:
            self.close()
            raise

    def message(self) -> dict[str, Any]:
        """Return the next message."""
        line = self._lines.readline()
        if not line:
            raise EOFError
        message: dict[str, Any] = json.loads(line)
        message.pop("timestamp", None)
        return message

    def raw(self, text: str, descriptors: list[int] | None = None) -> list[dict[str, Any]]:
        """Send text and return all up to the answer of it."""
        socket.send_fds(self._socket, [text.encode()], descriptors or [])
        messages: list[dict[str, Any]] = []
        while not messages or "event" in messages[-1]:
            messages.append(self.message())
        return messages

    def execute(
        self, command: str, descriptors: list[int] | None = None, **arguments: Any
    ) -> list[dict[str, Any]]:
        """Execute a command and return all up to its answer."""
        request: dict[str, Any] = {"execute": command, "id": "an id"}
        if arguments:
            request["arguments"] = arguments
        return self.raw(json.dumps(request), descriptors)

    def until_event(self, name: str) -> list[dict[str, Any]]:
        """Return all up to an event."""
        messages = [self.message()]
        while messages[-1].get("event") != name:
            messages.append(self.message())
        return messages

    def close(self) -> None:
        """Leave."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def partial_files(folder: Path) -> list[str]:
    """Name what a dump that did not become complete has left behind."""
    return [path.name for path in folder.iterdir() if path.name.endswith(".partial")]


def assert_sound(path: Path) -> None:
    """Walk a whole dump."""
    with open_dump(path) as dump:
        assert verify_dump(dump).problems == []


def hmp_of(machine: QemuMachine, line: str) -> str:
    """Ask QEMU itself, at its second QMP socket."""
    from tests.support.raw_qmp import RawQmp  # noqa: PLC0415

    with RawQmp(machine.qmp_sockets[1]) as qmp:
        answer: str = qmp.execute("human-monitor-command", **{"command-line": line})
    return answer.replace("\r\n", "\n")
