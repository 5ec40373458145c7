"""Where a dump of the proxy goes, in the words of QEMU."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qemu_dump_ext.dump_formats import find_dump_format
from qemu_dump_ext.errors import DumpWriteError
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.sinks import Sink, open_sink
from qemu_dump_ext.structures.dialect import QemuVersion
from qemu_dump_ext.value import Value

CREATE_SINCE: QemuVersion = (8, 0, 0)  # `Could not create`; 7.2 says open, 11.1 create
_DESCRIPTORS_OF_QEMU = "/dev/fdset/"
_LINKS_MAX = 40


class DumpTarget(Value):
    """Where a dump goes.

    Attributes:
        name: The name as the client wrote it.
        path: Absolute; or None for a descriptor.
        descriptor: Ours to close; or None for a path.
    """

    name: str
    path: Path | None
    descriptor: int | None = None


def is_for_qemu_alone(name: str, directory: Path) -> bool:
    """Tell whether a name means what it means to QEMU only if QEMU itself opens it.

    Such are `/dev/fdset/N`, which is no file but QEMU's name for descriptors that it was given by
    add-fd, and what the kernel shows of the process that looks: `/dev/fd/3`, `/proc/self/fd/3`.

    Args:
        name: The name as the client wrote it.
        directory: QEMU's working directory.
    """
    return name.startswith(_DESCRIPTORS_OF_QEMU) or _leads_into_own_process(directory / name)


def _leads_into_own_process(path: Path) -> bool:
    # One link after the other: behind the last one, the process is not to be seen any more.
    for _ in range(_LINKS_MAX):
        try:
            folder = path.parent.resolve()
            if folder.is_relative_to(f"/proc/{os.getpid()}"):
                return True
            path = folder / (folder / path.name).readlink()
        except (OSError, RuntimeError):
            return False
    return False


@contextmanager
def opened(target: DumpTarget, version: QemuVersion, request: DumpRequest) -> Iterator[Sink]:
    """Keep the target of a dump open for the time of a `with` block.

    Raises:
        DumpWriteError: It cannot be opened, in the words of a QEMU of this version.
        RequestError: The format cannot be written to it.
    """
    verb = "create" if version >= CREATE_SINCE else "open"
    failure = f"Could not {verb} '{target.name}'"
    with contextlib.ExitStack() as stack:
        if target.path is None:
            name = f"fd:{target.descriptor}"
        else:
            name = f"file:{target.path}"
            if reason := _why_not(target.name, target.path):
                raise DumpWriteError(f"{failure}: {reason}")
        try:
            sink = stack.enter_context(open_sink(name, force=True, standard_output=None))
        except DumpWriteError as error:
            cause = error.__cause__
            reason = (cause.strerror if isinstance(cause, OSError) else None) or error.message
            raise DumpWriteError(f"{failure}: {reason}") from error
        find_dump_format(request.format).check_sink(sink)
        yield sink


def _why_not(name: str, path: Path) -> str | None:
    # What the kernel says to whoever opens it; we write aside, and would notice later.
    try:
        number = _error_of(name, path)
    except OSError as error:
        return error.strerror
    return os.strerror(number) if number else None


def _error_of(name: str, path: Path) -> int:
    if not name:
        return errno.ENOENT
    if not stat.S_ISDIR(path.parent.stat().st_mode):
        return errno.ENOTDIR
    if name.endswith("/"):
        return errno.EISDIR  # whatever is there, or is not
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return 0
    if stat.S_ISDIR(mode):
        return errno.EISDIR
    return 0 if os.access(path, os.W_OK) else errno.EACCES


def in_words_of_qemu(error: DumpWriteError, sink: Sink, request: DumpRequest) -> DumpWriteError:
    """Return what QEMU would say where the target could not be written."""
    cause = error.__cause__
    if not isinstance(cause, OSError):
        return error
    failure = find_dump_format(request.format).failure
    return DumpWriteError(failure(sink.bytes_written > 0, str(cause.strerror)))
