"""The command inside gdb must refuse, and survive, what users and guests do to it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qemu_dump_ext.dump_formats import format_words
from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from qemu_dump_ext.memory_sources import AUTO, all_memory_sources
from tests.support.bad_input import BAD_INPUT, strange_files
from tests.support.doors import (
    GDB_SCRIPT,
    REPOSITORY,
    child_environment,
    gdb_argv,
    guest_status,
    run_gdb,
)
from tests.support.raw_qmp import RawQmp
from tests.support.traces import no_trace, partial_size
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

_QEMU = ["qemu-system-x86_64"]
_DUMP = "qemu-dump-guest-memory"
_STATUS = "output $_qemu_dump_status"
_MODE = "maintenance packet qqemu.PhyMemMode"
_MARK = "@@ "
_LONG = {"gdbstub": "64", "pmemsave": "1024"}
"""MiB of guest memory with which a dump takes a while, by memory source."""
_CLIENT = "import sys; from pathlib import Path; from tests.support.raw_qmp import RawQmp; "


@pytest.fixture(scope="module")
def stopped() -> Iterator[QemuMachine]:
    with stopped_machine(_QEMU, ["-smp", "2", "-m", "16"]) as machine:
        yield machine


def parts_of(
    machine: QemuMachine | None, commands: Sequence[str], program: str = "gdb", **options: Any
) -> list[str]:
    """Run gdb; return what each command said, on both streams, in order."""
    marked = [word for command in commands for word in (f"echo {_MARK}\\n", command)]
    result = run_gdb(
        machine, [*marked, f"echo {_MARK}\\n"], program, stderr=subprocess.STDOUT, **options
    )
    assert "Traceback" not in result.stdout, result.stdout
    assert "Python Exception" not in result.stdout, result.stdout
    parts = result.stdout.split(f"{_MARK}\n")
    assert len(parts) == len(commands) + 2, result.stdout
    return [part.strip() for part in parts[1:-1]]


def refuse(machine: QemuMachine | None, words: str, status: int, pattern: str) -> None:
    said, seen = parts_of(machine, [f"{_DUMP} {words}", _STATUS])
    assert_one_line(said, pattern)
    assert seen == str(status)


def assert_one_line(said: str, pattern: str) -> None:
    assert len(said.splitlines()) == 1, said
    assert re.search(pattern, said), said


def shell_qmp(machine: QemuMachine, command: str) -> str:
    """Return a command for gdb that lets an independent client execute `command`."""
    script = f"{_CLIENT}RawQmp(Path({str(machine.qmp_sockets[1])!r})).execute({command!r})"
    words = ["env", f"PYTHONPATH={REPOSITORY}", sys.executable, "-c", script]
    return f"shell {shlex.join(words)}"


def test_bad_words_are_refused(stopped: QemuMachine, tmp_path: Path):
    strange_files(tmp_path)
    commands = []
    for bad in BAD_INPUT:
        commands += [f"{_DUMP} {shlex.join(bad.words_in(tmp_path))}", _STATUS]
    with no_trace(tmp_path):
        parts = parts_of(stopped, commands)
    for index, bad in enumerate(BAD_INPUT):
        said, status = parts[2 * index : 2 * index + 2]
        assert_one_line(said, bad.message)
        assert status == str(bad.status), bad.name
    assert guest_status(stopped) == "prelaunch"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-", r"- is not possible here \(name a file, fd:N or \|command\)"),
        ("fd:x", r"number of an open descriptor"),
        ("fd:99", r"is no open descriptor"),
    ],
)
def test_bad_descriptors_are_refused(stopped: QemuMachine, words: str, message: str):
    refuse(stopped, words, 2, message)


def test_gdb_is_not_connected(tmp_path: Path):
    with no_trace(tmp_path):
        refuse(None, f"{tmp_path}/new", 3, r"gdb is not connected to a guest \('target remote :")


@pytest.mark.skipif(shutil.which("gdbserver") is None, reason="needs gdbserver")
def test_a_stub_that_is_not_qemu(tmp_path: Path):
    connect = "target remote | gdbserver - sleep 600"
    with no_trace(tmp_path):
        parts = parts_of(None, [connect, f"{_DUMP} {tmp_path}/new", _STATUS, "kill"])
    assert_one_line(parts[1], r"the remote target is no gdbstub of QEMU \('target remote' one of")
    assert parts[2] == "3"


def test_a_process_of_gdbs_own(tmp_path: Path):
    with no_trace(tmp_path):
        parts = parts_of(
            None, ["file /bin/true", "starti", f"{_DUMP} {tmp_path}/new", _STATUS, "kill"]
        )
    assert_one_line(parts[2], r"gdb is not connected to a guest")
    assert parts[3] == "3"


def test_extended_remote_without_a_process(tmp_path: Path):
    connect = "target extended-remote | gdbserver --multi --once -"
    with no_trace(tmp_path):
        parts = parts_of(None, [connect, f"{_DUMP} {tmp_path}/new", _STATUS, "disconnect"])
    assert_one_line(parts[1], r"gdb is not connected to a guest")
    assert parts[2] == "3"


def test_the_guest_runs_in_gdb(tmp_path: Path):
    with stopped_machine(_QEMU) as machine, no_trace(tmp_path):
        parts = parts_of(machine, ["continue &", f"{_DUMP} {tmp_path}/new", _STATUS])
    assert_one_line(parts[1], r"the guest is running in gdb \('interrupt' it first\)")
    assert parts[2] == "3"


def test_the_guest_runs_behind_the_back_of_gdb(tmp_path: Path):
    with QemuMachine(_QEMU, ["-m", "64"]) as machine, no_trace(tmp_path):
        words = f"--qmp {machine.qmp_sockets[0]} {tmp_path}/new"
        parts = parts_of(machine, [shell_qmp(machine, "cont"), f"{_DUMP} {words}", _STATUS])
        assert guest_status(machine) == "running"
    assert_one_line(parts[1], r"the guest runs, though gdb did not let it: .*\(stop it by its")
    assert parts[2] == "3"


def test_registers_are_read_anew(tmp_path: Path):
    # Without QMP nobody tells gdb that the guest ran meanwhile.
    with QemuMachine(_QEMU, ["-m", "64"]) as machine:
        reset = shell_qmp(machine, "system_reset")
        parts = parts_of(
            machine,
            [
                *("info registers rip", reset),
                f"{_DUMP} {tmp_path}/new",
                f"{_DUMP} --qmp {machine.qmp_sockets[0]} {tmp_path}/other",
            ],
        )
        fresh = run_gdb(machine, [f"{_DUMP} {tmp_path}/fresh"])
    assert fresh.returncode == 0
    assert "elf" in parts[2], parts
    assert (tmp_path / "new").read_bytes() == (tmp_path / "fresh").read_bytes()
    assert (tmp_path / "other").read_bytes() == (tmp_path / "fresh").read_bytes()


def test_qemu_is_gone(tmp_path: Path):
    with stopped_machine(_QEMU) as machine, no_trace(tmp_path):
        result = run_gdb(
            None,
            [
                f"target remote {machine.gdb_socket}",
                f"shell kill -9 {machine.pid}",
                f"{_DUMP} {tmp_path}/new",
                _STATUS,
            ],
        )
    assert result.stdout.endswith("\n3"), result
    assert "the guest is gone: QEMU closed the connection to gdb" in result.stderr
    assert "Traceback" not in result.stderr


@contextmanager
def gdb_in_dump(
    machine: QemuMachine, folder: Path, words: str, before: Sequence[str], after: Sequence[str]
) -> Iterator[subprocess.Popen[str]]:
    """Start a gdb; the block begins when its dump does, and must end that dump."""
    commands = [
        f"target remote {machine.gdb_socket}",
        f"source {GDB_SCRIPT}",
        *before,
        f"echo {_MARK}\\n",
        f"{_DUMP} {words} {folder}/new",
        f"echo {_MARK}\\n",
        *after,
        "disconnect",
    ]
    with subprocess.Popen(
        gdb_argv(commands),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=child_environment(PYTHONPATH=None),
    ) as gdb:
        try:
            wait_until(lambda: partial_size(folder) > 0, "the dump has begun")
            yield gdb
        finally:
            gdb.kill()


@pytest.mark.parametrize("memory", ["gdbstub", "pmemsave"])
def test_qemu_is_killed_in_the_middle(tmp_path: Path, memory: str):
    with (
        stopped_machine(_QEMU, ["-m", _LONG[memory]]) as machine,
        no_trace(tmp_path),
        gdb_in_dump(machine, tmp_path, f"--memory {memory}", [], [_STATUS]) as gdb,
    ):
        os.kill(machine.pid, signal.SIGKILL)
        output, _ = gdb.communicate(timeout=300)
    _, said, after = output.split(f"{_MARK}\n")
    assert_one_line(said, r"^the guest is gone: QEMU closed the connection to gdb$")
    assert after.startswith("3")


_SESSION = (
    "info threads",
    "output $_thread",
    "output $pc",
    "info frame",
    "x/4i $pc",
    _MODE,
    "show pagination",
    "show confirm",
    "show width",
    "show height",
    "show print pretty",
    "show scheduler-locking",
    "show schedule-multiple",
    "show logging enabled",
    "show remote memory-read-packet-size",
    "info line",
    "output $_",
)
_SETTINGS = (
    "set confirm on",
    "set pagination on",
    "set width 132",
    "set height 37",
    "set print pretty on",
    "thread 2",
)


@pytest.mark.parametrize("mode", ["0", "1"])
@pytest.mark.parametrize("memory", ["gdbstub", "pmemsave"])
def test_the_session_is_as_before(stopped: QemuMachine, tmp_path: Path, memory: str, mode: str):
    dump = f"{_DUMP} -z --memory {memory} {tmp_path}/new"
    set_mode = f"maintenance packet Qqemu.PhyMemMode:{mode}"
    parts = parts_of(stopped, [*_SETTINGS, set_mode, *_SESSION, dump, _STATUS, *_SESSION])
    before = parts[len(_SETTINGS) + 1 :][: len(_SESSION)]
    after = parts[-len(_SESSION) :]
    assert parts[-len(_SESSION) - 1] == "0", parts
    assert after == before
    assert f'received: "{mode}"' in before[_SESSION.index(_MODE)]
    assert before[_SESSION.index("output $_thread")] == "2"
    assert guest_status(stopped) == "prelaunch"


@pytest.mark.parametrize("mode", ["0", "1"])
@pytest.mark.parametrize("memory", ["gdbstub", "pmemsave"])
def test_an_interrupt_leaves_gdb_usable(tmp_path: Path, memory: str, mode: str):
    set_mode = f"maintenance packet Qqemu.PhyMemMode:{mode}"
    look = [f"echo {_MARK}\\n", "output $_thread", "info frame", _MODE]
    with (
        stopped_machine(_QEMU, ["-smp", "2", "-m", _LONG[memory]]) as machine,
        no_trace(tmp_path),
        gdb_in_dump(
            machine,
            tmp_path,
            f"--memory {memory}",
            [*_SETTINGS, set_mode, *look],
            [
                _STATUS,
                *look,
                f"echo {_MARK}\\n",
                f"{_DUMP} --memory pmemsave -z none --range 0 0x100000 '|cat >/dev/null'",
                _STATUS,
            ],
        ) as gdb,
    ):
        gdb.send_signal(signal.SIGINT)
        output, _ = gdb.communicate(timeout=300)
        assert guest_status(machine) == "prelaunch"
    _, before, said, status, after, again = output.split(f"{_MARK}\n")
    assert_one_line(said, r"^interrupted: no partial dump was left behind$")
    assert status == "130"
    assert after == before
    assert f'received: "{mode}"' in after
    assert again.endswith("0"), again


def test_help_and_completion(stopped: QemuMachine, tmp_path: Path):
    (tmp_path / "some file").write_text("")
    completions = {
        f"{_DUMP} --me": ["--memory"],
        f"{_DUMP} -z ": sorted(format_words()),
        f"{_DUMP} -z z": ["zlib", "zstd"],
        f"{_DUMP} -z zlib --memory ": sorted([AUTO, *all_memory_sources()]),
        f"{_DUMP} --memory gd": ["gdbstub"],
        f"{_DUMP} --progress a": ["always", "auto"],
        f"{_DUMP} {tmp_path}/so": [f"{tmp_path}/some file"],
    }
    parts = parts_of(
        stopped, [f"help {_DUMP}", f"{_DUMP} --help", *(f"complete {line}" for line in completions)]
    )
    for text in parts[:2]:
        assert f"usage: {_DUMP} " in text
        assert "--memory" in text
        assert "$_qemu_dump_status" in text
    for (line, wanted), said in zip(completions.items(), parts[2:], strict=True):
        start = line[: line.rindex(" ") + 1]
        found = [word.removeprefix(start) for word in said.splitlines()]
        assert set(wanted) <= set(found), (line, said)
        if tmp_path.name not in line:
            assert sorted(found) == wanted


def _gdb_version() -> int:
    text = subprocess.run(["gdb", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)\.\d+", text)
    assert found is not None
    return int(found[1])


def test_a_name_with_spaces_and_quotes(stopped: QemuMachine, tmp_path: Path):
    names = ["two words", "it's", 'say "x"', "back\\slash", "-z"]
    commands = [f"{_DUMP} -z zlib {shlex.join([str(tmp_path / name)])}" for name in names]
    if _gdb_version() < 16:  # where, unlike in a shell, a backslash counts inside quotes as well
        commands = [command.replace("\\", "\\\\") for command in commands]
    parts_of(stopped, [*commands, f"{_DUMP} -z zlib {tmp_path}/plain\\ space"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "plain space"])


def test_the_status_is_a_variable(stopped: QemuMachine, tmp_path: Path):
    commands = [_STATUS, f"{_DUMP} {tmp_path}/new", _STATUS, f"{_DUMP} {tmp_path}/new", _STATUS]
    parts = parts_of(stopped, commands)
    assert parts[0] in {"void", ""}
    assert (parts[2], parts[4]) == ("0", "2")


# --- gdb's own Python ---


@pytest.fixture
def bare_tree(tmp_path: Path) -> Path:
    """A copy of the package and the scripts, with no environment beside it."""
    for name in ("qemu_dump_ext", "gdb"):
        shutil.copytree(
            REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path


def from_bare_tree(machine: QemuMachine, tree: Path, words: Sequence[str]) -> list[str]:
    commands = [f"target remote {machine.gdb_socket}", f"source {tree}/gdb/qemu_dump.py"]
    for index, word in enumerate(words):
        commands += [f"{_DUMP} {word} {tree}/dump{index}", _STATUS]
    env = child_environment(PYTHONPATH=None, VIRTUAL_ENV=None)
    marked = [word for command in commands for word in (f"echo {_MARK}\\n", command)]
    result = subprocess.run(
        gdb_argv([*marked, "disconnect"]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        check=False,
        timeout=300,
    )
    assert "Traceback" not in result.stdout, result.stdout
    return [part.strip() for part in result.stdout.split(f"{_MARK}\n")[3:]]


_PACKAGES = {
    "-l": ("page codec lzo", "python-lzo", 2),
    "-s": ("page codec snappy", "python-snappy", 2),
    "-z zstd": ("page codec zstd", "zstandard", 2),
    "--qmp SOCKET": ("QMP", "qemu.qmp", 2),
}


def test_gdb_without_the_packages(stopped: QemuMachine, bare_tree: Path):
    words = [word.replace("SOCKET", str(stopped.qmp_sockets[0])) for word in _PACKAGES]
    parts = from_bare_tree(stopped, bare_tree, ["-z zlib", *words])
    assert "kdump-zlib" in parts[0]
    assert parts[1] == "0"
    for index, (purpose, package, status) in enumerate(_PACKAGES.values(), start=1):
        said, seen = parts[2 * index : 2 * index + 2]
        assert_one_line(
            said,
            rf"^{purpose} needs the Python package {package}, which gdb's own Python 3\.\d+ lacks"
            rf" \(python3\.\d+ -m venv DIR, .*pip install {package}.*VIRTUAL_ENV=DIR; or dump"
            r" without gdb: qemu-dump-guest-memory --qmp SOCKET\)$",
        )
        assert seen == str(status)
    assert sorted(path.name for path in bare_tree.iterdir()) == ["dump0", "gdb", "qemu_dump_ext"]


def test_an_environment_of_another_python(stopped: QemuMachine, bare_tree: Path):
    (bare_tree / ".venv/lib/python3.99/site-packages").mkdir(parents=True)
    said, status = from_bare_tree(stopped, bare_tree, ["-z zstd"])
    assert_one_line(said, rf"own Python 3\.\d+ lacks: {bare_tree}/\.venv is for another version \(")
    assert status == "2"


def test_qmp_is_busy_or_something_else(stopped: QemuMachine, tmp_path: Path):
    (tmp_path / "plain").write_text("")
    with no_trace(tmp_path):
        refuse(
            stopped,
            f"--qmp {tmp_path}/plain {tmp_path}/new",
            3,
            r"QMP socket .*it is no socket \(it is",
        )
        with RawQmp(stopped.qmp_sockets[0]):
            refuse(stopped, f"--qmp {stopped.qmp_sockets[0]} {tmp_path}/new", 3, r"is busy: held")
