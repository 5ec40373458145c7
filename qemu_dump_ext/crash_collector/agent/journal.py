"""What the agent has under way, on the disk before it happens: lines of JSON, only appended.

After a kill or a power cut, the next agent knows from it which guest it must let run again, which
crash it must take up again, and which guest that stands still was looked at already.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qemu_dump_ext.crash_collector.record import CrashCause
from qemu_dump_ext.errors import DumpWriteError

_SIZE_MAX = 1 << 20

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GuestState:
    """What there is to know about one guest.

    Attributes:
        qemu: Which QEMU it is about, as `GuestSession.instance` has it.
        cause: Of a crash that is being collected.
        time: When that happened, as in records.
        stopped: We stopped it, or were about to, and owe it to let it run again.
        stored: The crash is stored under this id, and the after-action is still to be done.
        handled: The run state in which the guest was left once its crash had been stored.
    """

    qemu: str
    cause: CrashCause | None = None
    time: str = ""
    stopped: bool = False
    stored: str | None = None
    handled: str | None = None

    @property
    def is_idle(self) -> bool:
        """Tell whether it need not be remembered."""
        return not (self.cause or self.stopped or self.stored or self.handled)


class Journal:
    """The file, and what follows from it. May be used by several threads.

    Attributes:
        states: By the guest's name.
    """

    def __init__(self, path: Path) -> None:
        """Read what an earlier agent left; nothing is written yet.

        Raises:
            DumpWriteError: The file cannot be read.
        """
        self._path = path
        self._lock = threading.Lock()
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            lines = []
        except OSError as error:
            raise DumpWriteError(f"cannot read {path}: {error.strerror}") from error
        self.states: dict[str, GuestState] = replay(lines)

    def set(self, guest: str, state: GuestState) -> None:
        """Remember, on the disk when this returns.

        Raises:
            DumpWriteError: It cannot be written; what was remembered before holds.
        """
        with self._lock:
            if self.states.get(guest, GuestState("")) == state:
                return
            try:
                if self._size() > _SIZE_MAX:
                    self._compact()
                self._append(guest, state)
            except OSError as error:
                raise DumpWriteError(f"cannot write {self._path}: {error.strerror}") from error
            self._remember(guest, state)

    def change(self, guest: str, **changes: Any) -> None:
        """Change what is remembered about a guest; as `set`."""
        self.set(guest, replace(self.states.get(guest, GuestState("")), **changes))

    def _remember(self, guest: str, state: GuestState) -> None:
        if state.is_idle:
            self.states.pop(guest, None)
        else:
            self.states[guest] = state

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0

    def _append(self, guest: str, state: GuestState) -> None:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            end = os.lseek(descriptor, 0, os.SEEK_END)
            torn = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"
            line = (b"\n" if torn else b"") + _line(guest, state)
            try:
                written = os.write(descriptor, line)
                while written < len(line):  # the next one says why
                    written += os.write(descriptor, line[written:])
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)

    def _compact(self) -> None:
        aside = self._path.with_name(f"{self._path.name}.new")
        with aside.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            for guest, state in self.states.items():
                file.write(_line(guest, state))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self._path)


def _line(guest: str, state: GuestState) -> bytes:
    return json.dumps({"guest": guest} | asdict(state)).encode() + b"\n"


def replay(lines: Iterable[bytes]) -> dict[str, GuestState]:
    """Return what holds after these lines; a line that was cut off or damaged does not count."""
    states: dict[str, GuestState] = {}
    for line in lines:
        if not line.strip():
            continue
        try:
            guest, state = _parse(json.loads(line))
        except (ValueError, TypeError, KeyError):
            _logger.warning("a damaged line of the journal is passed over: %r", line[:80])
            continue
        if state.is_idle:
            states.pop(guest, None)
        else:
            states[guest] = state
    return states


def _parse(content: Any) -> tuple[str, GuestState]:
    if not isinstance(content, Mapping):
        raise TypeError("no mapping")
    fields = dict(content)
    guest = fields.pop("guest")
    cause = fields.pop("cause", None)
    return str(guest), GuestState(cause=CrashCause(**cause) if cause else None, **fields)
