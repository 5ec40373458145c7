"""What gdb has of ours before a command is used, and guests of which it knows nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from qemu_dump_ext.options.gdb_commands import GDB_COMMANDS
from tests.support.doors import (
    GDB_SCRIPT,
    child_environment,
    gdb_argv,
    guest_status,
    run_cli,
    run_gdb,
)
from tests.support.traces import no_trace

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

_QEMU = "qemu-system-riscv64"


def _python_in_gdb(*commands: str, program: str = "gdb") -> object:
    done = subprocess.run(
        gdb_argv(commands, program),
        capture_output=True,
        text=True,
        check=True,
        env=child_environment(PYTHONPATH=None),
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_is_imported_until_a_command_is_used():
    imported = "python import json, sys; print(json.dumps(sorted(set(sys.modules) - before)))"
    before = "python import sys; before = set(sys.modules)"
    source = f"source {GDB_SCRIPT}"
    loaded = _python_in_gdb(before, source, imported)
    assert isinstance(loaded, list)
    ours = [name for name in loaded if name.startswith(("qemu_dump_ext", "argparse"))]
    scripts = {path.stem for path in GDB_SCRIPT.parent.glob("*.py")} & {*loaded}
    assert (ours, scripts) == ([], {"lazy_commands"})
    used = _python_in_gdb(before, source, "qemu-query-dump --json", imported)
    assert isinstance(used, list)
    assert "qemu_dump_ext.engine.capabilities" in used


def test_every_command_has_the_help_that_stands_beside_it():
    commands = {path.stem for path in GDB_SCRIPT.parent.glob("help/*.txt")}
    assert commands == set(GDB_COMMANDS)


def test_every_target_has_a_name_that_some_gdb_knows():
    command = "python import json; print(json.dumps(gdb.architecture_names()))"
    known = _python_in_gdb(command, program="gdb-multiarch")
    assert isinstance(known, list)
    assert {each.name_in_gdb for each in all_architectures().values()} <= set(known)


@pytest.fixture(scope="module")
def foreign() -> Iterator[QemuMachine]:
    """A guest of a target that gdb, for the processor of this machine, does not know."""
    with stopped_machine([_QEMU], ["-m", "16"]) as machine:
        yield machine


def test_gdb_that_cannot_speak_the_target_is_told_which_can(foreign: QemuMachine, tmp_path: Path):
    with no_trace(tmp_path):
        done = run_gdb(foreign, [f"qemu-dump-guest-memory {tmp_path}/vm"])
    said = [line for line in done.stderr.splitlines() if line.startswith("gdb is not connected")]
    assert len(said) == 1, done.stderr
    assert "; gdb-multiarch for " in said[0]
    assert "riscv64" in said[0].partition("; gdb-multiarch for ")[2]
    with no_trace(tmp_path):
        done = run_gdb(None, [f"qemu-dump-guest-memory {tmp_path}/vm"], "gdb-multiarch")
    assert "gdb is not connected to a guest ('target remote :1234'" in done.stderr
    assert "gdb-multiarch for" not in done.stderr


def test_a_host_that_has_only_its_own_gdb_is_told_what_to_install(
    foreign: QemuMachine, tmp_path: Path
):
    (tmp_path / "bin").mkdir()
    for program in ("gdb", "env", "setsid"):
        (tmp_path / "bin" / program).symlink_to(str(shutil.which(program)))
    where = {"PATH": f"{tmp_path}/bin"}
    done = run_cli("--gdb", foreign.gdb_socket, f"{tmp_path}/vm", env=child_environment(**where))
    assert done.returncode == 3
    assert done.stderr.endswith("(this gdb does not know riscv64: install gdb-multiarch)\n")
    assert len(done.stderr.splitlines()) == 1
    assert not os.path.lexists(tmp_path / "vm")
    assert guest_status(foreign) == "prelaunch"
