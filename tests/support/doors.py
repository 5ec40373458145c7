"""The doors to a dump as a user comes through them: the command line, and gdb."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.support.raw_qmp import RawQmp

REPOSITORY = Path(__file__).resolve().parents[2]
GDB_SCRIPT = REPOSITORY / "gdb" / "qemu_dump.py"
_SECONDS = 300
_MAIN = "import sys; from qemu_dump_ext.entry import qemu_dump_guest_memory as run; sys.exit(run())"

_RUN_OFTEN = """
import contextlib, io, json, sys
import qemu_dump_ext.entry as entries
entry, lines = sys.argv[1], json.loads(sys.argv[2])
for sys.argv[1:] in lines:
    said = [io.StringIO(), io.StringIO()]
    with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[1]):
        try:
            status = getattr(entries, entry)()
        except SystemExit as end:
            status = end.code
    print(json.dumps([status, *(stream.getvalue() for stream in said)]))
"""


def cli_argv(*words: object) -> list[str]:
    """Return the command line of `qemu-dump-guest-memory` with these words behind it."""
    return [sys.executable, "-c", _MAIN, *map(str, words)]


def gdb_argv(commands: Sequence[str], program: str = "gdb") -> list[str]:
    """Return a gdb that runs `commands` and ends; a failing command does not end it earlier."""
    words = [program, "--nx", "--quiet", "--batch"]
    for command in commands:
        words += ["-ex", command]
    return words


def child_environment(**changes: str | None) -> dict[str, str]:
    """Return an environment in which this tree and the packages of this Python are found.

    Args:
        changes: Variables; None takes one away.
    """
    wanted: Mapping[str, str | None] = {
        "PYTHONPATH": str(REPOSITORY),
        "VIRTUAL_ENV": sys.prefix,
        "PYTHONDONTWRITEBYTECODE": "1",
        "LC_ALL": "C.UTF-8",
        **changes,
    }
    environment = os.environ | {name: value for name, value in wanted.items() if value is not None}
    return {name: value for name, value in environment.items() if wanted.get(name, "") is not None}


def run_cli(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `qemu-dump-guest-memory` with `words` to its end.

    Args:
        words: Behind the command.
        options: Of `subprocess.run`; output is captured as text unless they say otherwise.
    """
    return _run(cli_argv(*words), options)


def run_often(
    entry: str, lines: Sequence[Sequence[object]]
) -> list[subprocess.CompletedProcess[str]]:
    """Run a program once for each line, in one Python: to start it costs more than many a run.

    Args:
        entry: The name of its function in `qemu_dump_ext.entry`.
        lines: The words behind it.
    """
    words = [list(map(str, line)) for line in lines]
    argv = [sys.executable, "-c", _RUN_OFTEN, entry, json.dumps(words)]
    done = _run(argv, {})
    assert done.returncode == 0, done.stderr
    return [
        subprocess.CompletedProcess([entry, *line], *json.loads(answer))
        for line, answer in zip(words, done.stdout.splitlines(), strict=True)
    ]


def said_often(entry: str, lines: Sequence[Sequence[object]]) -> list[str]:
    """Return what a program says to each line; as `run_often`."""
    return [done.stdout + done.stderr for done in run_often(entry, lines)]


def run_gdb(
    machine: QemuMachine | None,
    commands: Sequence[str],
    program: str = "gdb",
    *,
    before: Sequence[str] = (),
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run `commands` in a gdb that is connected to the gdbstub of `machine` and has ours.

    gdb leaves by `disconnect`, which does not let the guest run, unlike `detach` and `quit`.

    Args:
        machine: Its guest is stopped by the connection; None: gdb is not connected.
        commands: As typed; a failing one does not end gdb.
        program: Another gdb.
        before: Commands that come before gdb connects.
        options: Of `subprocess.run`; output is captured as text unless they say otherwise.
    """
    session = [f"source {GDB_SCRIPT}", *commands]
    if machine is not None:
        session = [*before, f"target remote {machine.gdb_socket}", *session, "disconnect"]
    # gdb's own Python: what it imports comes from VIRTUAL_ENV, as for a user.
    options.setdefault("env", child_environment(PYTHONPATH=None))
    return _run(gdb_argv(session, program), options)


def guest_status(machine: QemuMachine) -> str:
    """Return the run state that QEMU tells an independent client on the second QMP socket."""
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        status: str = qmp.execute("query-status")["status"]
    return status


def _run(argv: Sequence[str], options: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    defaults: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "timeout": _SECONDS,
        "env": child_environment(),
    }
    if "input" not in options:
        defaults["stdin"] = subprocess.DEVNULL
    return subprocess.run(argv, check=False, **(defaults | options))
