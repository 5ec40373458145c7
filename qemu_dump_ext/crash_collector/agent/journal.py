"""What the agent has under way, on the disk before it happens: lines of JSON, only appended.

After a kill or a power cut, the next agent knows from it which guest it must let run again, which
crash it must take up again, and which guest that stands still was looked at already.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from qemu_dump_ext.crash_collector.forms import CRASH_ID
from qemu_dump_ext.crash_collector.record import CrashCause, GuestName, Moment
from qemu_dump_ext.crash_collector.store.files import set_aside
from qemu_dump_ext.errors import DumpWriteError
from qemu_dump_ext.value import Value

_SIZE_MAX = 1 << 20
_READ_MAX = 16 << 20
_ADDRESS_MAX = 5000
_STATUS_MAX = 100

_logger = logging.getLogger(__name__)


class GuestState(Value):
    """What there is to know about one guest.

    Attributes:
        qemu: Which QEMU it is about, as `GuestSession.instance` has it.
        cause: The cause of a crash that is being collected.
        time: When that happened, as in records.
        stopped: We stopped it, or were about to, and owe it to let it run again.
        stored: The crash is stored under this id, and the after-action is still to be done.
        handled: The run state in which the guest was left once its crash had been stored.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    qemu: Annotated[str, Field(max_length=_ADDRESS_MAX)]
    cause: CrashCause | None = None
    time: Moment | Literal[""] = ""
    stopped: bool = False
    stored: Annotated[str, Field(pattern=rf"\A{CRASH_ID.pattern}\z")] | None = None
    handled: Annotated[str, Field(max_length=_STATUS_MAX)] | None = None

    @property
    def is_idle(self) -> bool:
        """Tell whether it need not be remembered."""
        return not (self.cause or self.stopped or self.stored or self.handled)


class _Line(GuestState, kw_only=True):
    guest: GuestName


_LINE = TypeAdapter(_Line)


class Journal:
    """The file, and what follows from it. May be used by several threads.

    Attributes:
        states: The states of guests, by the guest's name.
    """

    def __init__(self, path: Path) -> None:
        """Read what an earlier agent left; a damaged file is set aside, and what is good is kept.

        Raises:
            DumpWriteError: The file cannot be read.
        """
        self._path = path
        self._lock = threading.Lock()
        content = self._read()
        lines = content.splitlines()
        self.states: dict[str, GuestState] = replay(lines)
        is_torn = bool(content) and not content.endswith(b"\n")  # as by a power cut
        bad = sum(_parse(line) is None for line in (lines[:-1] if is_torn else lines))
        if bad:
            set_aside(path, f"{bad} of {len(lines)} lines make no sense")
            self._write_again()

    def _read(self) -> bytes:
        try:
            if self._size() > _READ_MAX:
                set_aside(self._path, f"it has more than {_READ_MAX} bytes")
            with self._path.open("rb") as file:
                return file.read(_READ_MAX)
        except FileNotFoundError:
            return b""
        except IsADirectoryError:
            set_aside(self._path, "it is a directory")
            return b""
        except OSError as error:
            raise DumpWriteError(f"cannot read {self._path}: {error.strerror}") from error

    def _write_again(self) -> None:
        try:
            self._compact()
        except OSError as error:  # as it was, and written before anything is done
            _logger.warning("cannot write %s: %s", self._path, error.strerror)

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
        if (parsed := _parse(line)) is None:
            _logger.warning("a damaged line of the journal is passed over: %r", line[:80])
            continue
        guest, state = parsed
        if state.is_idle:
            states.pop(guest, None)
        else:
            states[guest] = state
    return states


def _parse(text: bytes) -> tuple[str, GuestState] | None:
    try:
        line = _LINE.validate_json(text)
    except ValidationError:
        return None
    values = {one.name: getattr(line, one.name) for one in fields(GuestState)}
    return line.guest, GuestState(**values)
