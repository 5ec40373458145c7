"""The QEMUs of this host, as `/proc` tells: nothing is connected to, nothing is stopped.

A QEMU is known by the program that its process runs, whatever the process is called. Paths on its
command line are those of its mount namespace and its working directory.

Source: proc(5).
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.host_limits import refused_as
from qemu_dump_ext.qemu.command_line import CommandLine, parse_command_line
from qemu_dump_ext.value import Value

if TYPE_CHECKING:
    from qemu_dump_ext.qemu.control_group import Belonging

_PROGRAM = re.compile(r"\.?qemu-system-([a-z0-9_]+)(?:[-.].*)?")
_OF_THE_HOST = frozenset(("qemu-kvm", "kvm"))
_LOADER = re.compile(r"ld(?:-linux|-musl|64)?[-.\w]*\.so(?:\.\d+)?")
_DELETED = " (deleted)"
_LOADER_WORDS_MAX = 16
_COMMAND_LINE_MAX = 1 << 20
_CONFIGURATION_MAX = 1 << 20
_START_TIME_FIELD = 19  # of /proc/PID/stat, behind the name in parentheses
_NAMESPACES = ("mnt", "net", "pid", "user")
_BZIMAGE_MAGIC, _BZIMAGE_MAGIC_AT = b"HdrS", 0x202
_BZIMAGE_VERSION_AT = 0x20E
_BZIMAGE_HEAD = 0x8200
_RELEASE_MAX = 200


class QemuProcess(Value):
    """One QEMU.

    Attributes:
        pid: Of its process, as this one sees it.
        words: Its command line.
        target: QEMU's name of what it emulates, such as `x86_64`.
    """

    pid: int
    words: Sequence[str]
    target: str

    @cached_property
    def command_line(self) -> CommandLine:
        """What its command line says."""
        return parse_command_line(self.words[1:], self._read_configuration)

    @cached_property
    def started(self) -> float:
        """Return seconds since the host was started until it was: no two processes share both."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = self._read("stat").rpartition(")")[2].split()
            return int(fields[_START_TIME_FIELD]) / os.sysconf("SC_CLK_TCK")
        return 0.0

    @property
    def uptime_seconds(self) -> float:
        """For how long it has been there."""
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - self.started)

    def main_thread_state(self) -> str:
        """Return the state of the thread that serves monitors, as proc(5) has it; empty: gone."""
        return self._state_of(self.pid)

    def thread_states(self) -> frozenset[str]:
        """Return the states of all its threads, as proc(5) has them."""
        with contextlib.suppress(OSError):
            names = os.listdir(f"/proc/{self.pid}/task")  # noqa: PTH208 - names are all
            return frozenset(self._state_of(int(name)) for name in names)
        return frozenset()

    def _state_of(self, thread: int) -> str:
        with contextlib.suppress(OSError):
            return self._read(f"task/{thread}/stat").rpartition(")")[2].split()[0]
        return ""

    @property
    def user(self) -> int | None:
        """The user that it runs as, or None where it is gone."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(self._read("status").partition("\nUid:")[2].split()[0])
        return None

    @cached_property
    def belongs_to(self) -> tuple[Belonging, ...]:
        """A domain, a container, a unit that it is of, the outermost first."""
        from qemu_dump_ext.qemu.control_group import Belonging, belongings  # noqa: PLC0415 - for few

        try:
            found = belongings(self._read("cgroup"))
        except OSError:
            found = ()
        devices = {channel.device for channel in self.command_line.channels}
        domain = Belonging("libvirt domain", self.command_line.name)
        if "charmonitor" in devices and not any(entry.kind == domain.kind for entry in found):
            found = (*found, domain)
        return found

    @cached_property
    def other_namespaces(self) -> tuple[str, ...]:
        """Kinds of namespaces in which it is and this process is not, as far as can be seen."""
        return tuple(kind for kind in _NAMESPACES if self._shares(kind) is False)

    @property
    def shares_network(self) -> bool:
        """Tell whether its sockets are listed among those of this process's own namespace."""
        return self._shares("net") is not False

    def _shares(self, kind: str) -> bool | None:
        with contextlib.suppress(OSError):
            return _link(f"/proc/{self.pid}/ns/{kind}") == _link(f"/proc/self/ns/{kind}")
        return None

    def path_from_here(self, path: str) -> str:
        """Return how this process reaches what is at a path of QEMU's."""
        if path.startswith("@"):
            return path
        foreign = self._shares("mnt") is False
        if path.startswith("/"):
            return f"/proc/{self.pid}/root{path}" if foreign else path
        directory = f"/proc/{self.pid}/cwd"
        if not foreign:
            with contextlib.suppress(OSError):
                directory = _link(directory)
        return f"{directory}/{path}"

    @cached_property
    def descriptors(self) -> Mapping[int, str]:
        """What its descriptors are, as `socket:[INODE]` or a path; none where nobody may look."""
        return descriptors_of(self.pid)

    @cached_property
    def socket_inodes(self) -> frozenset[int]:
        """The inodes of its sockets; none where nobody may look."""
        return frozenset(filter(None, map(socket_inode, self.descriptors.values())))

    def terminals(self) -> Iterator[str]:
        """Yield the ptys of which it has the other side, in the order of their making."""
        for number, name in sorted(self.descriptors.items()):
            if not name.endswith("ptmx"):
                continue
            with contextlib.suppress(OSError):
                text = self._read(f"fdinfo/{number}")
                if index := re.search(r"^tty-index:\s*(\d{1,9})$", text, re.MULTILINE):
                    yield f"/dev/pts/{index[1]}"

    def why_unreadable(self) -> str | None:
        """Return why its memory cannot be read by this process, or None: it can."""
        try:
            os.close(os.open(f"/proc/{self.pid}/mem", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            return os.strerror(error.errno or 0)
        return None

    def kernel_release(self) -> str | None:
        """Return the release of the kernel that QEMU boots, as a bzImage's header has it."""
        path = self.command_line.kernel
        if path is None:
            return None
        head = _read_file(self.path_from_here(path), _BZIMAGE_HEAD)
        if head is None or head[_BZIMAGE_MAGIC_AT : _BZIMAGE_MAGIC_AT + 4] != _BZIMAGE_MAGIC:
            return None
        offset = int.from_bytes(head[_BZIMAGE_VERSION_AT : _BZIMAGE_VERSION_AT + 2], "little")
        text = head[offset + 0x200 :][:_RELEASE_MAX].partition(b"\0")[0]
        return text.decode("ascii", "replace").split(" ")[0] or None if offset else None

    def _read_configuration(self, path: str) -> str | None:
        content = _read_file(self.path_from_here(path), _CONFIGURATION_MAX)
        return None if content is None else content.decode("utf-8", "surrogateescape")

    def _read(self, name: str) -> str:
        return Path(f"/proc/{self.pid}/{name}").read_text("utf-8", "surrogateescape")


def _read_file(path: str, most: int) -> bytes | None:
    """Return what a regular file begins with; None where it is none, or cannot be read.

    The path is a stranger's: to open a FIFO may never end, and to open a device does something.
    """
    with contextlib.suppress(OSError, ValueError):
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(found).st_mode):
                with Path(f"/proc/self/fd/{found}").open("rb") as file:
                    return file.read(most)
        finally:
            os.close(found)
    return None


def socket_inode(link: str) -> int | None:
    """Return the inode in a link of `/proc/PID/fd`, or None: it is no socket."""
    digits = link.removeprefix("socket:[").removesuffix("]")
    return int(digits) if link.startswith("socket:[") and digits.isdecimal() else None


def find_qemu_processes() -> list[QemuProcess]:
    """Return the QEMUs that can be seen, by ascending pid.

    Raises:
        SourceError: There is no /proc.
    """
    return [process for pid in all_pids() if (process := qemu_process(pid)) is not None]


def all_pids() -> list[int]:
    """Return the IDs of the processes that can be seen, ascending.

    Raises:
        SourceError: There is no /proc.
    """
    with refused_as(SourceError, "look at /proc"):
        names = os.listdir("/proc")  # noqa: PTH208 - names are all that is wanted
    return sorted(int(name) for name in names if name.isdecimal())


def descriptors_of(pid: int) -> dict[int, str]:
    """Return what the descriptors of a process are; none where nobody may look."""
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 - as above
            with contextlib.suppress(OSError):
                found[int(name)] = _link(f"/proc/{pid}/fd/{name}")
    return found


def _link(path: str) -> str:
    return os.readlink(path)  # noqa: PTH115 - of thousands of descriptors


def process_at_terminal(path: str) -> int | None:
    """Return the pid of the QEMU that has the other side of a pty, or None."""
    with contextlib.suppress(SourceError, OSError):
        wanted = str(Path(path).resolve())
        found = (one for one in find_qemu_processes() if wanted in one.terminals())
        return next((one.pid for one in found), None)
    return None


def qemu_process(pid: int) -> QemuProcess | None:
    """Return the QEMU that is a process, or None: it is none, or has ended."""
    program = None
    with contextlib.suppress(OSError):
        program = Path(_link(f"/proc/{pid}/exe").removesuffix(_DELETED)).name
    if program is not None and not (_target(program) or _LOADER.fullmatch(program)):
        return None
    words = _command_line(pid)
    if not words:
        return None
    if program is not None and (target := _target(program)):
        return QemuProcess(pid, words, target)
    # Where the program cannot be seen, it is what the command line says.
    if program is None and not _LOADER.fullmatch(Path(words[0]).name):
        target = _target(Path(words[0]).name)
        return QemuProcess(pid, words, target) if target else None
    for index, word in enumerate(words[1:_LOADER_WORDS_MAX], start=1):
        if target := _target(Path(word).name):
            return QemuProcess(pid, words[index:], target)
    return None


def _target(program: str) -> str | None:
    if program in _OF_THE_HOST:
        return os.uname().machine
    match = _PROGRAM.fullmatch(program)
    return match[1] if match else None


def _command_line(pid: int) -> list[str]:
    text = command_line_text(pid)
    return text.removesuffix("\0").split("\0") if text else []


def command_line_text(pid: int) -> str:
    """Return the words of a process, each with a zero behind it; empty where nobody may look."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:  # noqa: PTH123 - of thousands
            return os.fsdecode(file.read(_COMMAND_LINE_MAX))
    except OSError:
        return ""
