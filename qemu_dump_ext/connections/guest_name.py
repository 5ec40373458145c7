"""A guest by its name, its UUID, its PID, or by the beginning of one of them, as users say it."""

from __future__ import annotations

from collections.abc import Sequence

from qemu_dump_ext.errors import ConnectError, RequestError
from qemu_dump_ext.qemu.qemu_processes import QemuProcess, find_qemu_processes, qemu_process

_LISTED_MAX = 10
_HINT = "'qemu-dump guests' shows what there is"


def find_by_pid(pid: int) -> QemuProcess:
    """Return the QEMU that is a process of this host.

    Raises:
        ConnectError: There is no such process, or it is no QEMU.
    """
    process = qemu_process(pid)
    if process is None:
        raise ConnectError(f"process {pid} is no QEMU that can be seen here", hint=_HINT)
    return process


def find_by_name(word: str) -> QemuProcess:
    """Return the one QEMU of this host that a word names.

    Args:
        word: A name, a UUID, a PID, the number or the domain of a manager; or the beginning of a
            name or UUID that no other guest has.

    Raises:
        ConnectError: No guest is called so.
        RequestError: Several are.
    """
    processes = find_qemu_processes()
    for fits in (_is_called, _begins):
        found = [process for process in processes if fits(process, word)]
        if len(found) > 1:
            raise RequestError(
                f"several guests are called {word!r}: {_listed(found)}", hint="--pid tells one"
            )
        if found:
            return found[0]
    there_are = f": there are {_listed(processes)}" if processes else ": none runs here"
    raise ConnectError(f"no guest is called {word!r}{there_are}", hint=_HINT)


def words_for(process: QemuProcess) -> Sequence[str]:
    """Return by which words a guest is called."""
    line = process.command_line
    words = [line.name, line.uuid, line.identifier, str(process.pid)]
    words += [name for kind, name in process.belongs_to if kind == "libvirt domain"]
    return tuple(dict.fromkeys(filter(None, words)))


def _is_called(process: QemuProcess, word: str) -> bool:
    return word in words_for(process)


def _begins(process: QemuProcess, word: str) -> bool:
    line = process.command_line
    return bool(word) and (line.name.startswith(word) or line.uuid.startswith(word.lower()))


def _listed(processes: Sequence[QemuProcess]) -> str:
    names = [
        f"{one.command_line.name} (PID {one.pid})" if one.command_line.name else f"PID {one.pid}"
        for one in processes
    ]
    more = len(names) - _LISTED_MAX
    return ", ".join(names[:_LISTED_MAX]) + (f" and {more} more" if more > 0 else "")
