"""Take a dump by a gdb of our own: start it, attach it to a gdbstub, let it run our command."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

import qemu_dump_ext
from qemu_dump_ext.errors import (
    EXIT_INTERRUPTED,
    ConnectError,
    DumpError,
    RequestError,
    SourceError,
)
from qemu_dump_ext.monitor_text import parse_status
from qemu_dump_ext.sync_qmp import connect_qmp

_GDB_PROGRAMS = ("gdb-multiarch", "gdb")
_CONNECT_SECONDS = 10
_POLL_SECONDS = 0.5
# The state that attaching to the stub leaves a running guest in.
_STOPPED_BY_ATTACHING = "paused"


def gdb_script_path() -> Path:
    """Return the file that loads our commands into gdb.

    Raises:
        SourceError: It was not installed.
    """
    package = Path(qemu_dump_ext.__file__).resolve().parent
    for directory in (package / "gdb_scripts", package.parent / "gdb"):
        script = directory / "qemu_dump.py"
        if script.is_file():
            return script
    raise SourceError("the gdb scripts are not installed", hint="reinstall qemu_dump_ext")


class _CommandError(DumpError):
    """Gdb answered a command with an error."""


class _Controller(Protocol):
    # What we use of pygdbmi's GdbController, which is untyped.
    gdb_process: Any

    def write(self, mi_cmd_to_write: str, *, read_response: bool) -> object: ...

    def get_gdb_response(
        self, *, timeout_sec: float, raise_error_on_timeout: bool
    ) -> list[dict[str, Any]]: ...

    def exit(self) -> None: ...


class _Gdb:
    """A gdb behind its machine interface."""

    def __init__(self, output: TextIO) -> None:
        from pygdbmi.gdbcontroller import GdbController

        program = next((name for name in _GDB_PROGRAMS if shutil.which(name)), None)
        if program is None:
            raise ConnectError("there is no gdb on this machine", hint="install gdb-multiarch")
        # In a session of its own: an interrupt reaches it once, from us.
        self._controller: _Controller = GdbController(
            ["setsid", program, "--nx", "--quiet", "--interpreter=mi3"]
        )
        self._output = output

    def run(self, command: str, *, show: bool = False) -> dict[str, Any]:
        """Run one MI command; return its results.

        Raises:
            _CommandError: With gdb's message.
            SourceError: gdb ended.
        """
        self._controller.write(command, read_response=False)
        interrupted = False
        while True:
            try:
                for record in self._controller.get_gdb_response(
                    timeout_sec=_POLL_SECONDS, raise_error_on_timeout=False
                ):
                    if record["type"] == "console" and show:
                        self._output.write(record["payload"])
                        self._output.flush()
                    elif record["type"] == "result" and record["message"] == "error":
                        raise _CommandError(record["payload"]["msg"])
                    elif record["type"] == "result":
                        return record["payload"] or {}
                if self._controller.gdb_process.poll() is not None:
                    raise SourceError("gdb ended unexpectedly")
            except KeyboardInterrupt:
                # gdb cleans up and answers; a second interrupt gives up waiting for it.
                if interrupted:
                    raise
                interrupted = True
                os.kill(self._controller.gdb_process.pid, signal.SIGINT)

    def console(self, command: str, *, show: bool = False) -> None:
        """Run a command as a user would type it."""
        escaped = command.replace("\\", "\\\\").replace('"', '\\"')
        self.run(f'-interpreter-exec console "{escaped}"', show=show)

    def monitor(self, command: str) -> str:
        """Run a command of QEMU's monitor and return its answer."""
        escaped = command.replace("\\", "\\\\").replace('"', '\\"')
        code = f"gdb.execute('monitor {escaped}', to_string=True)"
        self.console(f"python gdb.set_convenience_variable('_qemu_dump_answer', {code})")
        value = str(self.run("-data-evaluate-expression $_qemu_dump_answer")["value"])
        return value.strip('"').replace("\\r\\n", "\n").replace("\\n", "\n")

    def close(self) -> None:
        """End gdb."""
        self._controller.exit()


def dump_through_gdb(arguments: argparse.Namespace) -> int:
    """Take the dump that the options of `qemu-dump-guest-memory` ask for.

    Returns:
        The exit status of the command inside gdb.

    Raises:
        RequestError: FILE is something that gdb cannot write to.
        ConnectError: There is no gdb, or no gdbstub.
    """
    if arguments.file == "-" or arguments.file.startswith("fd:"):
        raise RequestError(
            f"{arguments.file}: gdb has its own descriptors", hint="name a file or '|COMMAND'"
        )
    ran_before = None if arguments.qmp is None else _is_running(arguments.qmp)
    gdb = _Gdb(sys.stdout if arguments.json else sys.stderr)
    try:
        with _attached(gdb, arguments.gdb, ran_before=ran_before):
            gdb.console(f"source {gdb_script_path()}")
            try:
                gdb.console(f"qemu-dump-guest-memory {_command_words(arguments)}", show=True)
            except _CommandError as error:
                status = int(gdb.run("-data-evaluate-expression $_qemu_dump_status")["value"])
                if status == EXIT_INTERRUPTED:
                    raise KeyboardInterrupt from error
                error.exit_status = status
                raise
            return int(gdb.run("-data-evaluate-expression $_qemu_dump_status")["value"])
    finally:
        gdb.close()


def _is_running(qmp: str) -> bool:
    with connect_qmp(qmp) as monitor:
        return parse_status(monitor.execute("info status")) == "running"


@contextmanager
def _attached(gdb: _Gdb, address: str, *, ran_before: bool | None) -> Iterator[None]:
    # Attaching stops the guest, and gdb's own `detach` lets it run even if it did not before.
    for setting in ("confirm off", "pagination off", f"tcp connect-timeout {_CONNECT_SECONDS}"):
        gdb.run(f"-gdb-set {setting}")
    try:
        gdb.run(f"-target-select remote {address}")
    except _CommandError as error:
        raise ConnectError(
            f"gdb cannot connect to {address}: {error.message}",
            hint="it is the ADDRESS behind QEMU's -gdb, and serves one debugger at a time",
        ) from error
    try:
        if ran_before is None:
            ran_before = parse_status(gdb.monitor("info status")) == _STOPPED_BY_ATTACHING
        yield
    finally:
        if ran_before or ran_before is None:
            gdb.monitor("cont")
        gdb.console("disconnect")


def _command_words(arguments: argparse.Namespace) -> str:
    target = arguments.file
    if not target.startswith(("|", "file:", "/")):
        target = str(Path(target).expanduser().absolute())
    watched = (
        sys.stderr.isatty() if arguments.progress == "auto" else arguments.progress == "always"
    )
    words: Sequence[str] = (
        *(("-z", arguments.codec) if arguments.codec else ()),
        *(("-R",) if arguments.raw else ()),
        *(("-p",) if arguments.paging else ()),
        *(("--range", *arguments.range) if arguments.range else ()),
        *(("--exact",) if arguments.exact else ()),
        *(("--force",) if arguments.force else ()),
        *(("--json",) if arguments.json else ()),
        *(("--qmp", str(Path(arguments.qmp).absolute())) if arguments.qmp else ()),
        "--memory",
        arguments.memory,
        "--progress",
        "always" if watched and not arguments.json else "never",
        target,
        *arguments.bounds,
    )
    return shlex.join(words)
