"""Guests that a dump has stopped and not let run again: written down, for who comes later.

A process that is killed cannot let its guest run, and its guardian may be killed as well. What they
owe is in a file of which both hold a lock, which the kernel releases when both are gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from qemu_dump_ext.qemu.qemu_processes import QemuProcess, qemu_process
from qemu_dump_ext.qemu.runtime_folder import own_folder, runtime_folders, speaks_for
from qemu_dump_ext.untrusted import parse_unsigned
from qemu_dump_ext.value import Value

_SUFFIX = ".stopped"
_SIZE_MAX = 1 << 14
_FILES_MAX = 1000
_TOLERANCE_SECONDS = 0.011  # of a start, which the kernel counts in hundredths


class Debt(Value):
    """A guest that was stopped, and by whom.

    Attributes:
        path: The file that says so.
        dumper: PID of who stopped it.
        qemu: PID of its QEMU.
        started: When that was started, as `QemuProcess.started` has it.
    """

    path: Path
    dumper: int
    qemu: int
    started: float

    def is_of(self, process: QemuProcess) -> bool:
        """Tell whether a QEMU is the one that was stopped."""
        same = abs(process.started - self.started) < _TOLERANCE_SECONDS
        return self.qemu == process.pid and same

    def is_gone(self) -> bool:
        """Tell whether its QEMU is gone."""
        process = qemu_process(self.qemu)
        return process is None or not self.is_of(process)

    def settle(self) -> None:
        """Forget it: the guest runs, or is gone."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


class OpenDebt:
    """A debt of this process's, until it is settled.

    Attributes:
        path: The file; None: none was written.
        descriptor: Holds the lock, and is inherited by who pays in our stead; -1: there is none.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.descriptor = -1

    def write(self, qemu: int | None) -> None:
        """Write it down; where that cannot be, there is only the guardian.

        It is of a process, not of an address, where another guest may be later.

        Args:
            qemu: PID of its QEMU, if it is known.
        """
        process = None if qemu is None else qemu_process(qemu)
        if process is None:
            return
        content = {
            "dumper": os.getpid(),
            "qemu": process.pid,
            "started": process.started,
        }
        try:
            path = own_folder() / f"{os.urandom(8).hex()}{_SUFFIX}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self.descriptor = os.open(path, flags, 0o600)
            self.path = path
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(self.descriptor, json.dumps(content).encode())
        except OSError:
            self.settle()

    def descriptors(self) -> tuple[int, ...]:
        """Return the descriptor that holds the lock, if there is one."""
        return () if self.descriptor < 0 else (self.descriptor,)

    def settle(self) -> None:
        """Forget it: the guest runs, or is not ours any more."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
            self.path = None
        self.leave()

    def leave(self) -> None:
        """Leave it to who has inherited it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def abandoned_debts() -> list[Debt]:
    """Return what dumps owe that are gone; what is of QEMUs that are gone is removed."""
    found = []
    for folder in runtime_folders():
        for path in _files(folder):
            debt = _abandoned(path)
            if debt is None:
                continue
            if debt.is_gone():
                debt.settle()
            else:
                found.append(debt)
    return found


def debts_of(process: QemuProcess) -> list[Debt]:
    """Return what dumps that are gone owe to the guest of a QEMU."""
    return [debt for debt in abandoned_debts() if debt.is_of(process)]


def _files(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for number, path in enumerate(folder.iterdir()):
            if number < _FILES_MAX and path.name.endswith(_SUFFIX):
                yield path


def _abandoned(path: Path) -> Debt | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return _parsed(path, os.read(descriptor, _SIZE_MAX), status.st_uid)
    except (OSError, ValueError):
        return None  # somebody still has it, or it is none
    finally:
        os.close(descriptor)


def _parsed(path: Path, text: bytes, owner: int) -> Debt | None:
    content = json.loads(text)
    if not isinstance(content, dict):
        return None
    numbers = {name: content.get(name) for name in ("dumper", "qemu")}
    dumper, qemu = (parse_unsigned(str(value), bits=31) for value in numbers.values())
    started = content.get("started")
    if dumper is None or qemu is None or not isinstance(started, (int, float)):
        return None
    if not speaks_for(owner, qemu_process(qemu)):
        return None
    return Debt(path, dumper, qemu, float(started))
