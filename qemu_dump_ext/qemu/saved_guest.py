"""What a guest is, written down while its monitor answers, for when it does not any more.

It is of one process: a QEMU that was started later is another one. The crash collector keeps one
for each guest where every dump of this host looks; users save one where they like.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.guest.silent import LocatedGuest
from qemu_dump_ext.qemu.qemu_processes import QemuProcess
from qemu_dump_ext.qemu.runtime_folder import own_folder, runtime_folders, speaks_for
from qemu_dump_ext.value import Value

_SUFFIX = ".guest"
_SIZE_MAX = 1 << 20
_BLOCKS_MAX = 4096
_ADDRESS_END = 1 << 64
_NAME_MAX = 256
_TOLERANCE_SECONDS = 0.011  # of a start, which the kernel counts in hundredths
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_FORM = "a guest of QEMU's, 1"


class SavedGuest(Value):
    """A guest as it was when it was asked.

    Attributes:
        pid: Of QEMU's process.
        started: When that was started, as `QemuProcess.started` has it.
        boot: Which start of the host that counts from.
        saved: When it was asked, in seconds since 1970.
        located: What it was.
    """

    pid: int
    started: float
    boot: str
    saved: float
    located: LocatedGuest

    def is_of(self, process: QemuProcess) -> bool:
        """Tell whether a QEMU is the one that was asked."""
        return (
            self.pid == process.pid
            and self.boot == _boot()
            and abs(self.started - process.started) < _TOLERANCE_SECONDS
        )

    @property
    def when(self) -> str:
        """Say when it was asked."""
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.saved))

    def to_json(self) -> str:
        """Say it to `parse_saved_guest`."""
        located = self.located
        content = {
            "form": _FORM,
            "pid": self.pid,
            "started": self.started,
            "boot": self.boot,
            "saved": self.saved,
            "architecture": located.architecture,
            "core": located.core,
            "machine": located.machine,
            "version": located.version,
            "vcpus": located.vcpus,
            "blocks": [
                [block.gpa, block.size, block.name, block.region_offset, hva]
                for block, hva in located.blocks.items()
            ],
        }
        return json.dumps(content)


def saved_now(process: QemuProcess, located: LocatedGuest) -> SavedGuest:
    """Return what is to be saved of a guest that was just asked."""
    return SavedGuest(process.pid, process.started, _boot(), time.time(), located)


def keep(saved: SavedGuest) -> None:
    """Write it where every dump of this host looks; what is of QEMUs that are gone is removed.

    Raises:
        OSError: It cannot be written.
    """
    folder = own_folder()
    for path in folder.glob(f"*{_SUFFIX}"):
        # By their names: an agent of hundreds of guests keeps each of them.
        if not Path("/proc", path.stem).exists():
            with contextlib.suppress(OSError):
                path.unlink()
    path = _place(folder, saved.pid)
    aside = folder / f".{saved.pid}.{os.getpid()}"
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="ascii") as file:  # noqa: PTH123 - of a descriptor
        file.write(saved.to_json())
    aside.replace(path)


def kept_of(process: QemuProcess) -> SavedGuest | None:
    """Return what was kept last of a QEMU that is there, or None."""
    found = [
        saved
        for folder in runtime_folders()
        if (saved := _kept(_place(folder, process.pid), process)) is not None
    ]
    return max(found, key=lambda saved: saved.saved, default=None)


def load(path: Path) -> SavedGuest:
    """Return what a user has saved.

    Raises:
        RequestError: The file cannot be read, or is no such file.
    """
    try:
        return parse_saved_guest(_read(path))
    except OSError as error:
        raise RequestError(f"cannot read {path}: {os.strerror(error.errno or 0)}") from error
    except ValueError as error:
        raise RequestError(
            f"{path} is no description of a guest: {error}",
            hint="'qemu-dump info --save FILE' writes one while the guest answers",
        ) from error


def parse_saved_guest(text: bytes) -> SavedGuest:
    """Return what `SavedGuest.to_json` has written.

    Raises:
        ValueError: It is something else, or of no guest that can be.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error
    if not isinstance(content, dict) or content.get("form") != _FORM:
        raise ValueError("it has another form")
    blocks = {}
    end = 0
    for entry in _list(content, "blocks", _BLOCKS_MAX):
        if not isinstance(entry, list) or len(entry) != 5:
            raise ValueError("a RAM block has five values")
        gpa, size, offset, hva = (_number(entry[index]) for index in (0, 1, 3, 4))
        block = RamBlock(gpa, size, _text(entry[2]), offset)
        if not size or gpa < end or block.end > _ADDRESS_END or hva + size > _ADDRESS_END >> 1:
            raise ValueError(f"there is no such RAM block: {entry!r:.100}")
        end = block.end
        blocks[block] = hva
    version = [_number(part) for part in _list(content, "version", 3)]
    if not blocks or len(version) != 3:
        raise ValueError("RAM or version are missing")
    vcpus = content.get("vcpus")
    located = LocatedGuest(
        _text(content.get("architecture")),
        _number(content.get("core"), 64),
        _text(content.get("machine")),
        (version[0], version[1], version[2]),
        None if vcpus is None else _number(vcpus, 1 << 16),
        blocks,
    )
    return SavedGuest(
        _number(content.get("pid"), 1 << 31),
        _seconds(content.get("started")),
        _text(content.get("boot")),
        _seconds(content.get("saved")),
        located,
    )


def _number(value: object, end: int = _ADDRESS_END) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < end:
        raise ValueError(f"{value!r:.40} is no number that can be")
    return value


def _seconds(value: object) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value < _ADDRESS_END:
        raise ValueError(f"{value!r:.40} is no time")
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _NAME_MAX:
        raise ValueError(f"{value!r:.40} is no name")
    return value


def _list(content: dict[str, Any], name: str, most: int) -> list[Any]:
    value = content.get(name)
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"{name} is no list of at most {most}")
    return value


def _read(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - of a descriptor
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no regular file")
        text = file.read(_SIZE_MAX + 1)
    if len(text) > _SIZE_MAX:
        raise ValueError("it is too large")
    return text


def _place(folder: Path, pid: int) -> Path:
    return folder / f"{pid}{_SUFFIX}"


def _kept(path: Path, process: QemuProcess) -> SavedGuest | None:
    """Return what is kept of a QEMU at a path, by somebody who may speak for it; or None."""
    with contextlib.suppress(OSError, ValueError):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and speaks_for(status.st_uid, process):
            saved = parse_saved_guest(_read(path))
            return saved if saved.is_of(process) else None
    return None


def _boot() -> str:
    with contextlib.suppress(OSError):
        return _BOOT.read_text("ascii").strip()
    return ""
