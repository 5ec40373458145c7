"""Take a dump by a gdb of our own: start it, attach it to a gdbstub, let it run our command."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TextIO

import qemu_dump_ext
from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.connections.target import GuestTarget, open_guest, target_of_arguments
from qemu_dump_ext.errors import (
    EXIT_INTERRUPTED,
    ConnectError,
    DumpError,
    MonitorAnswerError,
    RequestError,
    SourceError,
)
from qemu_dump_ext.interrupts import uninterrupted
from qemu_dump_ext.options.dump_options import RESUME, words_of_options
from qemu_dump_ext.qemu.address import connectable, unix_path
from qemu_dump_ext.qemu.command_line import GDBSTUB
from qemu_dump_ext.qemu.guardian import Guardian
from qemu_dump_ext.qemu.monitor_text import parse_status
from qemu_dump_ext.qemu.process import has_client
from qemu_dump_ext.qemu.run_state import require_dumpable
from qemu_dump_ext.qemu.run_states import PAUSED, RESET, Treatment, treatment
from qemu_dump_ext.qemu.socket_kind import (
    busy,
    find_way,
    greeting_kind,
    other_kind,
    ran_until_connected,
    require_kind,
)
from qemu_dump_ext.qemu.target_name import target_name
from qemu_dump_ext.sinks import open_sink
from qemu_dump_ext.standard_error import is_terminal, tell
from qemu_dump_ext.third_party import import_package
from qemu_dump_ext.value import Value

_ANY_TARGET = "gdb-multiarch"
_GDB_PROGRAMS = (_ANY_TARGET, "gdb")
_CODECS = "qemu-query-dump"
"""A command that imports them, and needs no guest."""
_CONNECT_SECONDS = 10
_GREETING_SECONDS = 0.3  # a gdbstub has none
_LET_RUN = (
    "whether the guest ran before gdb connected, nobody could tell: it is let run afterwards"
    " (--stay-stopped leaves it stopped, --qmp or --hmp knows)"
)
_POLL_SECONDS = 0.125
_BATCH_SECONDS = 0.02  # for which pygdbmi waits for more behind an answer
_INTERRUPTED_SECONDS = 30.0
_PASS_ON_SECONDS = 3
_END_SECONDS = 3.0
# What gdb says where it does not understand the stub's registers.
_OTHER_TARGET = re.compile(r"'g' packet|[Tt]runcated register|[Bb]ogus|[Aa]rchitecture")
_LONG_PACKET = re.compile(r": [0-9a-fx]{40,}$")


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


class _CommandError(SourceError):
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
    """A gdb behind its machine interface.

    Attributes:
        knows_any_target: It is no gdb of the machine's own processor alone.
    """

    def __init__(self, output: TextIO) -> None:
        import_package("pygdbmi", "--gdb")
        from pygdbmi.gdbcontroller import GdbController

        program = next((name for name in _GDB_PROGRAMS if shutil.which(name)), None)
        if program is None:
            raise ConnectError("there is no gdb on this machine", hint=f"install {_ANY_TARGET}")
        self.knows_any_target = program == _ANY_TARGET
        # In a session of its own: an interrupt reaches it once, from us. Its Python finds our
        # packages where we find them.
        words = ["env", f"VIRTUAL_ENV={sys.prefix}", "setsid", program]
        self._controller: _Controller = GdbController(
            [*words, "--nx", "--quiet", "--interpreter=mi3"],
            time_to_check_for_additional_output_sec=_BATCH_SECONDS,
        )
        self._output = output

    def run(self, command: str, *, show: bool = False, seconds: float = math.inf) -> dict[str, Any]:
        """Run one MI command; return its results.

        An interrupt is passed on to a command that is shown, and shown commands are what takes
        long; any other is let finish.

        Args:
            command: What to run.
            show: Show what it prints.
            seconds: How long gdb may take.

        Raises:
            _CommandError: With gdb's message.
            SourceError: gdb ended, or does not answer in time.
            KeyboardInterrupt: Once gdb has answered. A shown command tells by its own result how
                far it came.
        """
        record = None
        waiting_for = seconds  # that gdb may still take
        interrupted = False
        try:
            with uninterrupted():
                self._controller.write(command, read_response=False)
        except KeyboardInterrupt:
            interrupted, waiting_for = True, min(waiting_for, _INTERRUPTED_SECONDS)
        while record is None and waiting_for > 0:
            # Again: gdb forgets an interrupt that comes before it has begun with the command.
            if show and interrupted and waiting_for % _PASS_ON_SECONDS == 0:
                os.kill(self._controller.gdb_process.pid, signal.SIGINT)
            try:
                with uninterrupted():  # which would lose what has been read
                    record = self._receive(show=show)
            except KeyboardInterrupt:
                interrupted, waiting_for = True, min(waiting_for, _INTERRUPTED_SECONDS)
            else:
                waiting_for -= _POLL_SECONDS
        if interrupted and (record is None or not show):
            raise KeyboardInterrupt
        if record is None:
            raise SourceError(f"gdb does not answer in {seconds:.0f} s")
        if record["message"] == "error":
            raise _CommandError(record["payload"]["msg"])
        results: dict[str, Any] = record["payload"] or {}
        return results

    def _receive(self, *, show: bool) -> dict[str, Any] | None:
        for record in self._controller.get_gdb_response(
            timeout_sec=_POLL_SECONDS, raise_error_on_timeout=False
        ):
            if record["type"] == "console" and show:
                self._output.write(record["payload"])
                self._output.flush()
            elif record["type"] == "result":
                return record
        if self._controller.gdb_process.poll() is not None:
            raise SourceError("gdb ended unexpectedly")
        return None

    def console(self, command: str, *, show: bool = False, seconds: float = math.inf) -> None:
        """Run a command as a user would type it; for how long as `run`."""
        escaped = command.replace("\\", "\\\\").replace('"', '\\"')
        self.run(f'-interpreter-exec console "{escaped}"', show=show, seconds=seconds)

    def monitor(self, command: str) -> str:
        """Run a command of QEMU's monitor and return its answer."""
        escaped = command.replace("\\", "\\\\").replace('"', '\\"')
        code = f"gdb.execute('monitor {escaped}', to_string=True)"
        # Which waits for a QEMU that is silent as long as it takes.
        self.console(
            f"python gdb.set_convenience_variable('_qemu_dump_answer', {code})",
            seconds=_CONNECT_SECONDS,
        )
        value = str(self.run("-data-evaluate-expression $_qemu_dump_answer")["value"])
        return value.strip('"').replace("\\r\\n", "\n").replace("\\n", "\n")

    def close(self) -> None:
        """End gdb, also one that waits for a QEMU that does not answer."""
        process = self._controller.gdb_process
        if process is not None:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
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
    if "\n" in arguments.file:
        raise RequestError("gdb takes no line break in FILE")
    # Refused here what can be, before the guest is stopped; gdb opens it.
    open_sink(arguments.file, force=arguments.force, standard_output=None)
    return run_through_gdb(
        arguments.gdb,
        target_of_arguments(arguments),
        f"qemu-dump-guest-memory {command_words(arguments)}",
        output=sys.stdout if arguments.json else sys.stderr,
        afterwards=arguments.afterwards,
    )


def run_through_gdb(
    address: str,
    target: GuestTarget,
    command: str,
    *,
    output: TextIO,
    afterwards: str | None = None,
) -> int:
    """Run one of our commands in a gdb that is attached to a guest for it.

    Args:
        address: Of the gdbstub.
        target: The same guest by its monitor, where one is told.
        command: A line for gdb.
        output: Gets what the command prints.
        afterwards: `RESUME`, `STAY_STOPPED`, or None: the guest does what it did before.

    Returns:
        The exit status of the command inside gdb.

    Raises:
        ConnectError: There is no gdb, or no gdbstub.
    """
    known = _ask_monitor(target) if target.is_told else _ask_whoever_knows(address)
    if afterwards is not None:
        known = replace(known, ran=afterwards == RESUME)
    gdb = _Gdb(output)
    try:
        # All that is imported is, before the connection stops the guest.
        name = command.partition(" ")[0]
        for line in (f"source {gdb_script_path()}", _CODECS, f"{name} --version"):
            gdb.console(line)
        with _attached(gdb, address, known):
            try:
                gdb.console(command, show=True)
            except _CommandError as error:
                status = int(gdb.run("-data-evaluate-expression $_qemu_dump_status")["value"])
                if status == EXIT_INTERRUPTED:
                    raise KeyboardInterrupt from error
                error.exit_status = status
                raise
            return int(gdb.run("-data-evaluate-expression $_qemu_dump_status")["value"])
    finally:
        gdb.close()


class _Known(Value):
    """What is known of the guest before gdb connects.

    Attributes:
        ran: Whether it runs, and is to run afterwards; None where that is not known.
        target: QEMU's name of what it emulates; None where nobody says.
        settings: What gdb must be told to connect.
    """

    ran: bool | None = None
    target: str | None = None
    settings: Sequence[str] = ()


def _ask_monitor(target: GuestTarget) -> _Known:
    with open_guest(target) as access:
        # Connecting would stop the guest: what is refused is refused before.
        ran = treatment(require_dumpable(access)) is Treatment.STOP
        name = target_name(access)
    architecture = all_architectures().get(name or "")
    return _Known(ran, name, () if architecture is None else architecture.gdb_settings)


def _ask_whoever_knows(address: str) -> _Known:
    """Ask a monitor of the same QEMU, where one is free: the stub stops the guest."""
    found = find_way(address)
    if found is None:
        return _Known()
    with contextlib.suppress(ConnectError):
        return _ask_monitor(GuestTarget(pid=found[0].pid))
    return _Known(target=found[0].target)


@contextmanager
def _attached(gdb: _Gdb, address: str, known: _Known) -> Iterator[None]:
    # Attaching stops the guest, and gdb's own `detach` lets it run even if it did not before.
    known_way = require_kind(address, GDBSTUB, free=True)
    if known_way is None and has_client(address):
        raise busy(address, GDBSTUB, None)
    for setting in ("confirm off", "pagination off", f"tcp connect-timeout {_CONNECT_SECONDS}"):
        gdb.run(f"-gdb-set {setting}")
    for command in known.settings:
        # This gdb may be one of a single architecture: if that does not fit, connecting says so.
        with contextlib.suppress(_CommandError):
            gdb.console(command)
    # Also a connection that was never answered stops the guest, when QEMU takes it.
    guardian = None if known.ran is False else Guardian("gdb", address, pid=_pid_at(address))
    try:
        if known_way is None and (greeting := greeting_kind(address, _GREETING_SECONDS)):
            _dismiss(guardian)
            guardian = None
            raise other_kind(address, greeting)
        ran_before = known.ran
        if ran_before is None:
            ran_before = ran_until_connected(address)
        _connect(gdb, address, known)
        if ran_before is None:
            ran_before = _read_state(gdb, address) == PAUSED
            if ran_before:
                tell(_LET_RUN)
        try:
            yield
        except BaseException:
            # What went wrong first is what is told.
            with contextlib.suppress(DumpError, ValueError):
                _leave(gdb, address, ran_before=ran_before)
                _dismiss(guardian)
                guardian = None
            raise
        _leave(gdb, address, ran_before=ran_before)
        _dismiss(guardian)
        guardian = None
    finally:
        if guardian is not None:
            with uninterrupted():
                gdb.close()
                guardian.act()


def _pid_at(address: str) -> int | None:
    found = find_way(address)
    return None if found is None else found[0].pid


def _dismiss(guardian: Guardian | None) -> None:
    if guardian is not None:
        guardian.dismiss()


def _connect(gdb: _Gdb, address: str, known: _Known) -> None:
    try:
        with connectable(address) as target:
            is_other = isinstance(target, str) and target != unix_path(address)
            command = f"-target-select remote {target if is_other else address}"
            gdb.run(command, seconds=_CONNECT_SECONDS)
    except OSError as error:
        raise ConnectError(f"gdb cannot connect to {address}: {error.strerror}") from error
    except _CommandError as error:
        message = _LONG_PACKET.sub("", error.message.splitlines()[0])
        raise ConnectError(
            f"gdb cannot connect to {address}: {message}", hint=_connect_hint(gdb, message, known)
        ) from error
    except SourceError as error:
        raise ConnectError(
            f"QEMU does not answer gdb at {address} in {_CONNECT_SECONDS} s",
            hint="the guest is let run if QEMU takes the connection later",
        ) from error


def _connect_hint(gdb: _Gdb, message: str, known: _Known) -> str:
    if not _OTHER_TARGET.search(message):
        return "it is the ADDRESS behind QEMU's -gdb, and serves one debugger at a time"
    if not gdb.knows_any_target:
        return f"this gdb does not know {known.target or 'the target'}: install {_ANY_TARGET}"
    if known.settings:
        return "gdb does not know this processor; --qmp SOCKET without --gdb needs no gdb"
    return "gdb takes the guest for one of another target; with --qmp SOCKET it is told which"


def _read_state(gdb: _Gdb, address: str) -> str:
    try:
        return parse_status(gdb.monitor("info status"))
    except (_CommandError, MonitorAnswerError) as error:
        raise SourceError(f"{address} is no gdbstub of QEMU: it has no monitor") from error


def _leave(gdb: _Gdb, address: str, *, ran_before: bool) -> None:
    with uninterrupted():
        try:
            # Only what attaching did is undone, and only while the guest is still so.
            if ran_before and _read_state(gdb, address) in {PAUSED, RESET}:
                _resume(gdb)
        finally:
            gdb.console("disconnect", seconds=_CONNECT_SECONDS)


def _resume(gdb: _Gdb) -> None:
    # An interrupt that gdb has passed on to its Python may be left in gdb, and ends one more
    # command.
    try:
        gdb.monitor("cont")
    except _CommandError:
        gdb.monitor("cont")


def command_words(arguments: argparse.Namespace) -> str:
    """Return what stands behind the command inside gdb.

    Args:
        arguments: Of `qemu-dump-guest-memory`.
    """
    watched = is_terminal() if arguments.progress == "auto" else arguments.progress == "always"
    progress = "always" if watched and not arguments.json else "never"
    inside = argparse.Namespace(**{**vars(arguments), "progress": progress})
    words = [*words_of_options(inside), arguments.file, *arguments.bounds]
    return " ".join(map(quote_for_gdb, words))


def quote_for_gdb(word: str) -> str:
    """Return a word as gdb takes it: unlike in a shell, a backslash counts inside quotes, too."""
    return re.sub(r"([\s\\\"'])", r"\\\1", word) or '""'
