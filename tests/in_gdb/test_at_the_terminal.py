"""The commands in a gdb that a person sits at: help, version, completion, Ctrl-C."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

import qemu_dump_ext
from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from tests.support.doors import GDB_SCRIPT, child_environment, guest_status, run_gdb
from tests.support.traces import no_trace
from tests.support.waiting import SECONDS

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

_PROMPT = "(gdb) "
_COMMANDS = (
    "qemu-dump-guest-memory",
    "qemu-estimate-dump",
    "qemu-info-guest",
    "qemu-query-dump",
)


@pytest.fixture(scope="module")
def machine() -> Iterator[QemuMachine]:
    # So much that a dump through the stub takes a while.
    with stopped_machine(["qemu-system-x86_64"], ["-m", "64"]) as machine:
        yield machine


@pytest.fixture(scope="module")
def gdb(machine: QemuMachine) -> Iterator[pexpect.spawn[str]]:
    terminal = pexpect.spawn(
        "gdb",
        ["--nx", "--quiet", "-ex", "set pagination off", "-ex", "set style enabled off"],
        env=child_environment(PYTHONPATH=None, TERM="dumb", INPUTRC="/dev/null"),
        encoding="utf-8",
        timeout=SECONDS,
        dimensions=(50, 200),
    )
    for command in (f"source {GDB_SCRIPT}", f"target remote {machine.gdb_socket}"):
        terminal.expect_exact(_PROMPT)
        terminal.sendline(command)
    terminal.expect_exact(_PROMPT)
    yield terminal
    terminal.sendline("disconnect")
    terminal.expect_exact(_PROMPT)
    terminal.sendline("quit")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert guest_status(machine) == "prelaunch"


def _answer(gdb: pexpect.spawn[str], command: str) -> str:
    gdb.sendline(command)
    gdb.expect_exact(_PROMPT)
    return str(gdb.before).replace("\r", "").partition("\n")[2]


@pytest.mark.parametrize("command", _COMMANDS)
def test_each_command_tells_its_version(gdb: pexpect.spawn[str], command: str):
    assert _answer(gdb, f"{command} --version") == f"{command} {qemu_dump_ext.__version__}\n"
    assert _answer(gdb, "output $_qemu_dump_status") == "0"


@pytest.mark.parametrize("command", _COMMANDS)
def test_each_command_has_help(gdb: pexpect.spawn[str], command: str):
    assert f"\nusage: {command} [-h]" in _answer(gdb, f"help {command}")


def test_apropos_shows_what_each_command_does(gdb: pexpect.spawn[str]):
    lines = _answer(gdb, "apropos qemu-").splitlines()
    told = dict(line.split(" -- ", 1) for line in lines if line.startswith("qemu-"))
    assert set(told) == set(_COMMANDS)
    assert told["qemu-dump-guest-memory"].startswith("Dump the memory and the registers of the ")
    assert not [text for text in told.values() if text.startswith("usage:")]


@pytest.mark.parametrize("words", ["", "--qmp ", "-z zlib --force ", "-R --memory process "])
def test_the_tab_key_completes_paths_behind_any_option(
    gdb: pexpect.spawn[str], tmp_path: Path, words: str
):
    (tmp_path / "a-very-long-name.sock").write_text("")
    typed = f"qemu-dump-guest-memory {words}{tmp_path}/a-very"
    gdb.send(f"{typed}\t")
    gdb.expect_exact("-long-name.sock")
    gdb.sendline("\x15echo first\\nsecond\\n")
    gdb.expect_exact("first\r\nsecond\r\n")
    gdb.expect_exact(_PROMPT)


def test_a_dump_of_a_guest_that_gdb_has_stopped_does_not_claim_to_have(
    gdb: pexpect.spawn[str], tmp_path: Path
):
    told = _answer(gdb, f"qemu-dump-guest-memory --progress never {tmp_path}/vm.kdump")
    assert ", guest was stopped before\n" in told
    assert "an ELF core, whatever its name says: -z writes a kdump\n" in told
    assert f"open it: gdb -c {tmp_path}/vm.kdump\n" in told
    told = _answer(gdb, f"qemu-dump-guest-memory {tmp_path}/vm.elf a b")
    assert told.startswith("BEGIN LENGTH behind FILE are no numbers: invalid char 'a'")


def test_status_is_there_behind_a_script_that_failed(machine: QemuMachine, tmp_path: Path):
    """As docs/gdb.md has it; without a target, for the socket is taken."""
    assert machine.is_running()
    script = tmp_path / "commands.gdb"
    script.write_text(f"source {GDB_SCRIPT}\nqemu-dump-guest-memory --nope x\necho not here\n")
    argv = ["gdb", "--nx", "--batch", "-x", str(script), "-ex", "quit $_qemu_dump_status"]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, env=child_environment(PYTHONPATH=None)
    )
    assert done.returncode == 2, done.stderr
    assert "not here" not in done.stdout


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("qemu-dump-g", "qemu-dump-guest-memory "),
        ("qemu-dump-guest-memory --omit", "qemu-dump-guest-memory --omit-zero "),
        ("qemu-dump-guest-memory --memory back", "qemu-dump-guest-memory --memory backing_file "),
        ("qemu-dump-guest-memory -z zst", "qemu-dump-guest-memory -z zstd "),
        ("qemu-info-guest --js", "qemu-info-guest --json "),
    ],
)
def test_the_tab_key_completes(gdb: pexpect.spawn[str], typed: str, completed: str):
    gdb.send(f"{typed}\t")
    gdb.expect_exact(completed)
    gdb.send("\x15\n")  # forget the line
    gdb.expect_exact(_PROMPT)


def test_ctrl_c_ends_a_dump_and_leaves_gdb_and_guest_as_they_were(
    gdb: pexpect.spawn[str], machine: QemuMachine, tmp_path: Path
):
    with no_trace(tmp_path):
        gdb.sendline(
            f"qemu-dump-guest-memory --memory gdbstub --progress always {tmp_path}/interrupted"
        )
        gdb.expect(r"[0-9.]+ %")
        gdb.sendintr()
        gdb.expect_exact("interrupted: no partial dump was left behind")
        gdb.expect_exact(_PROMPT)
    assert _answer(gdb, "output $_qemu_dump_status") == "130"
    said = _answer(gdb, f"qemu-dump-guest-memory --memory process {tmp_path}/whole")
    assert f"{tmp_path}/whole: elf, 64." in said
    assert guest_status(machine) == "prelaunch"


def test_drgn_is_started_by_a_python_that_is_there():
    """sys.executable of gdb's own Python need not be."""
    script = (
        "import os; from qemu_dump_ext.engine.opening import _drgn; words = _drgn();"
        " print(words[1:], os.access(words[0], os.X_OK))"
    )
    environment = child_environment(PYTHONPATH=None, PATH="/usr/bin:/bin", VIRTUAL_ENV=sys.prefix)
    commands = ["qemu-info-guest --version", f"python {script}"]
    done = run_gdb(None, commands, "/usr/bin/gdb", env=environment)
    assert "('-m', 'drgn') True\n" in done.stdout, done.stdout + done.stderr
