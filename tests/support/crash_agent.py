"""A `qemu-crash-collector run` in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from qemu_dump_ext.crash_collector.agent.control_socket import ask_agent
from qemu_dump_ext.crash_collector.record import CrashRecord
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.errors import ConnectError
from tests.support.doors import child_environment
from tests.support.waiting import SECONDS, wait_until

_MAIN = "import sys; from qemu_dump_ext.entry import qemu_crash_collector as run; sys.exit(run())"
_SECONDS = 300.0


def run_collector(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `qemu-crash-collector` with `words` to its end."""
    defaults: dict[str, Any] = {"timeout": _SECONDS, "env": child_environment(), "text": True}
    argv = [sys.executable, "-c", _MAIN, *map(str, words)]
    return subprocess.run(argv, check=False, capture_output=True, **(defaults | options))


class CrashAgent:
    """The agent; started on entering, killed on leaving.

    Attributes:
        config: Its configuration file.
        store: Its store.
        log: What it logged, one JSON object per line.
    """

    def __init__(self, directory: Path, **configuration: Any) -> None:
        self.config = directory / "collector.yaml"
        self.log = directory / "agent.log"
        configuration.setdefault("store", str(directory / "store"))
        configuration.setdefault("scan_interval", 0.1)
        # The disk of who runs the tests may be as full as it likes.
        configuration["limits"] = {"free": 0, **configuration.get("limits", {})}
        self.store = CrashStore(Path(configuration["store"]))
        self.configure(**configuration)
        self._process: subprocess.Popen[bytes] | None = None

    def configure(self, **configuration: Any) -> None:
        """Write the configuration."""
        self.config.write_text(yaml.safe_dump(configuration, sort_keys=False))

    @property
    def pid(self) -> int:
        """Of the agent."""
        assert self._process is not None
        return self._process.pid

    def start(self, **environment: str) -> None:
        """Start it; returns when it listens to commands."""
        argv = [sys.executable, "-c", _MAIN, "run", "--config", str(self.config)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                argv, stderr=log, env=child_environment(**environment), stdin=subprocess.DEVNULL
            )
        wait_until(lambda: self._process_ended() or self.guests() is not None, "the agent listens")
        assert not self._process_ended(), self.log.read_text()

    def _process_ended(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None

    def signal(self, number: int) -> None:
        """Send a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it, as by SIGKILL."""
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Wait for its end; returns the exit status."""
        assert self._process is not None
        return self._process.wait(_SECONDS)

    def guests(self) -> list[dict[str, Any]] | None:
        """Return what `guests` shows, or None: nobody answers."""
        try:
            answer = ask_agent(self.store.path / ".control", {"command": "guests"})
        except ConnectError:
            return None
        guests: list[dict[str, Any]] = answer["guests"]
        return guests

    def wait_connected(self, count: int = 1, seconds: float = SECONDS) -> None:
        """Wait until so many guests are connected, and paused by QEMU when they panic."""
        wait_until(
            lambda: sum(guest["ready"] for guest in self.guests() or ()) == count,
            f"{count} guests connected",
            seconds,
        )

    def records(self) -> list[CrashRecord]:
        """Return what is stored, the oldest first."""
        return sorted(self.store.records(), key=lambda record: record.time)

    def wait_records(self, count: int = 1, seconds: float = _SECONDS) -> list[CrashRecord]:
        """Return what is stored once there are so many."""
        wait_until(lambda: len(self.records()) >= count, f"{count} crashes", seconds)
        records = self.records()
        assert len(records) == count
        return records

    def lines(self) -> list[dict[str, Any]]:
        """Return what it logged; a line that is just being written is none yet."""
        whole, _, _ = self.log.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def wait_logged(self, text: str, seconds: float = _SECONDS) -> None:
        """Wait until it has logged a message with `text`."""
        wait_until(
            lambda: self.log.exists() and any(text in line["message"] for line in self.lines()),
            text,
            seconds,
        )

    @contextmanager
    def running(self, **environment: str) -> Iterator[CrashAgent]:
        """Start it, and kill it on leaving."""
        self.start(**environment)
        try:
            yield self
        finally:
            if not self._process_ended():
                self.kill()

    def check_sums(self) -> None:
        """Let sha256sum check every crash; nothing else must be there."""
        for directory in self.store.directories():
            subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=directory, check=True)
            lines = (directory / "SHA256SUMS").read_text().splitlines()
            listed = {line.split("  ")[1] for line in lines}
            assert listed | {"SHA256SUMS"} == {path.name for path in directory.iterdir()}
