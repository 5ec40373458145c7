"""A process that undoes what this one has done to a guest, if this one cannot.

This one may be killed, may lose its connection, or may have given up on a QEMU that does not
answer: what it has sent is lost when it ends, and a debugger's connection that QEMU takes later
stops the guest. The guardian waits for QEMU as long as QEMU lives, and lets only a guest run that
is paused as we have paused it. Where a capability of migrations was set instead, it is taken back
when no migration is under way; a gdbstub that was opened is closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Literal

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.host_limits import refused_as
from qemu_dump_ext.interrupts import uninterrupted
from qemu_dump_ext.qemu.address import tcp_address, unix_path
from qemu_dump_ext.qemu.debts import OpenDebt
from qemu_dump_ext.standard_error import open_nowhere
from qemu_dump_ext.third_party import interpreter

_PROGRAM = Path(__file__).with_name("_guardian_program.py")
_NO_INTERPRETER = "false"  # ends at once: there is no guardian then
_DISMISSED = b"d"


class Guardian:
    """Acts when it is not dismissed before this process ends, or is told to act."""

    def __init__(
        self,
        kind: Literal["qmp", "hmp", "gdb", "libvirt"],
        address: str,
        taken_back: str | None = None,
        stream: int | None = None,
        *,
        pid: int | None = None,
    ) -> None:
        """Start it.

        Args:
            kind: What listens at `address`: QMP, a human monitor, a gdbstub; or libvirt.
            address: A path or HOST:PORT; of libvirt: virsh's path, the URI of the connection, the
                UUID of the domain and QEMU's pid or 0, as a list in JSON.
            taken_back: What it takes back: a capability of migrations, by QMP, or `gdbstub:PATH`;
                empty: nothing; None: it lets the guest run.
            stream: Descriptor that it reads to the end before; None: of none.
            pid: Of QEMU's process, if it is known: it is written down who has stopped what.
        """
        with uninterrupted(), refused_as(SourceError, "start what lets the guest run if this ends"):
            self._acts = False
            self._debt = OpenDebt()
            if taken_back is None:
                self._debt.write(pid)
            try:
                self._process = self._start(kind, address, taken_back, stream)
            except BaseException:
                self._debt.settle()
                raise

    def _start(
        self, kind: str, address: str, taken_back: str | None, stream: int | None
    ) -> subprocess.Popen[bytes]:
        where, directory = (address, None) if kind == "libvirt" else _place(address)
        nowhere = open_nowhere()
        try:
            return subprocess.Popen(
                (
                    *(interpreter() or _NO_INTERPRETER, "-I", "-S", str(_PROGRAM)),
                    *(kind, where, str(self._debt.path or "")),
                    *([] if taken_back is None else [taken_back]),
                    *([] if stream is None else [str(stream)]),
                ),
                stdin=subprocess.PIPE,
                stdout=nowhere,
                stderr=nowhere,
                cwd=directory,
                start_new_session=True,  # Ctrl-C is ours
                pass_fds=(*self._debt.descriptors(), *(() if stream is None else (stream,))),
            )
        finally:
            os.close(nowhere)

    def dismiss(self) -> None:
        """End it, also where it acts already: the guest runs, or is not ours any more."""
        with uninterrupted():
            self._recall()
            self._tell(_DISMISSED)
            self._process.wait()
            self._debt.settle()

    def act(self) -> None:
        """Have it let the guest run, when QEMU answers; nobody waits for that."""
        with uninterrupted():
            self._tell(b"")
            self._debt.leave()
            self._acts = self._process.poll() is None
            # Not waited for, nor is it an oversight of ours.
            self._process.returncode = self._process.returncode or 0

    def _recall(self) -> None:
        # It may wait for a monitor that we keep, and act when somebody else has stopped the guest.
        if not self._acts:
            return
        self._acts = False
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._process.pid, signal.SIGKILL)
            os.waitpid(self._process.pid, 0)

    def _tell(self, word: bytes) -> None:
        pipe = self._process.stdin
        if pipe is None or pipe.closed:
            return
        try:
            pipe.write(word)
            pipe.close()
        except BrokenPipeError:
            pass  # it has ended: there was no interpreter


def _place(address: str) -> tuple[str, Path | None]:
    """Return an address as JSON, and the directory from which it leads there."""
    # By its name in its directory: the whole path may be too long for a socket.
    path = Path(unix_path(address)).absolute()
    target = tcp_address(address)
    return json.dumps(target or path.name), None if target else path.parent
