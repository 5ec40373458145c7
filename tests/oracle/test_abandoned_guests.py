"""What dumps leave behind that are killed with their guardians: found, told, and put right."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qemu_dump_ext.crash_collector.collect_now import collect_crash
from qemu_dump_ext.engine.guests import list_guests
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest_images.machine import QemuMachine
from qemu_dump_ext.qemu.debts import OpenDebt, abandoned_debts
from qemu_dump_ext.qemu.guardian import Guardian
from tests.support.blocked_target import blocked_target
from tests.support.doors import (
    child_environment,
    cli_argv,
    guest_status,
    run_cli,
    run_gdb,
    said_often,
)
from tests.support.newer_qemu import newer_qemu_command, own_qemu_version
from tests.support.processes import Process
from tests.support.raw_qmp import RawQmp
from tests.support.relay import relay
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

_WORDS = ["-m", "32"]


@pytest.fixture(scope="module")
def machine() -> Iterator[QemuMachine]:
    with QemuMachine(["qemu-system-x86_64"], _WORDS) as qemu:
        yield qemu


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "runtime"
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


def kill_dump_of(machine: QemuMachine, folder: Path) -> int:
    """Kill a dump that has stopped the guest, and its guardian; returns its PID."""
    with blocked_target(folder) as target:
        argv = cli_argv("--qmp", machine.qmp_sockets[0], target.path)
        dump = subprocess.Popen(argv, env=child_environment(), stderr=subprocess.DEVNULL)
        wait_until(target.is_written_to, "the dump is being written")
        children = Path(f"/proc/{dump.pid}/task/{dump.pid}/children").read_text().split()
        for pid in (*map(int, children), dump.pid):
            os.kill(pid, signal.SIGKILL)
        dump.wait()
    assert guest_status(machine) == "paused"
    wait_until(lambda: abandoned_debts() != [], "nobody who was killed holds its file any more")
    return dump.pid


def stopped_by(machine: QemuMachine) -> int | None:
    (guest,) = (guest for guest in list_guests() if guest.pid == machine.pid)
    return guest.stopped_by


def test_the_next_dump_lets_it_run(machine: QemuMachine, tmp_path: Path):
    killed = kill_dump_of(machine, tmp_path)
    assert stopped_by(machine) == killed
    (shown,) = said_often("qemu_dump", [("guests",)])
    assert f"a dump that was killed (PID {killed}) has left it stopped: " in shown
    done = run_cli("--pid", machine.pid, "--json", tmp_path / "dump")
    assert f"(PID {killed}) had left the guest stopped: it runs again" in done.stdout
    assert guest_status(machine) == "running"
    assert stopped_by(machine) is None
    assert list((tmp_path / "runtime" / "qemu-dump").iterdir()) == []


def test_a_guardian_forgets_what_it_has_paid(machine: QemuMachine, tmp_path: Path):
    with blocked_target(tmp_path) as target:
        argv = cli_argv("--qmp", machine.qmp_sockets[0], target.path)
        with Process(argv, env=child_environment(), stderr=subprocess.DEVNULL) as dump:
            wait_until(target.is_written_to, "the dump is being written")
            dump.kill()
    wait_until(lambda: guest_status(machine) == "running", "its guardian lets it run")
    folder = tmp_path / "runtime" / "qemu-dump"
    wait_until(lambda: not list(folder.iterdir()), "nothing is owed any more")


def test_resume(machine: QemuMachine, tmp_path: Path):
    words = ("resume", "--qmp", machine.qmp_sockets[0])
    (said,) = said_often("qemu_dump", [words])
    assert "no dump has left this guest stopped: it is running" in said
    killed = kill_dump_of(machine, tmp_path)
    said, again = said_often("qemu_dump", [words, words])
    assert said == f"it runs again: a dump that was killed (PID {killed}) had stopped it\n"
    assert "no dump has left this guest stopped" in again
    assert guest_status(machine) == "running"


def test_what_somebody_else_has_made_of_it(machine: QemuMachine, tmp_path: Path):
    kill_dump_of(machine, tmp_path)
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute("cont")
    done = run_cli("--qmp", machine.qmp_sockets[0], tmp_path / "dump")
    assert done.returncode == 0, done.stderr
    assert "it runs again" not in done.stderr
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute("stop")
        done = run_cli("--qmp", machine.qmp_sockets[0], "--force", tmp_path / "dump")
        assert qmp.execute("query-status")["status"] == "paused", done.stderr
        qmp.execute("cont")


def test_a_guest_that_gdb_keeps_stopped_stays_so(machine: QemuMachine, tmp_path: Path):
    kill_dump_of(machine, tmp_path)
    done = run_gdb(machine, [f"qemu-dump-guest-memory {tmp_path / 'dump'}"])
    assert (tmp_path / "dump").exists(), done.stderr
    assert guest_status(machine) == "paused"
    assert "it runs again" in said_often("qemu_dump", [("resume", "--pid", machine.pid)])[0]


def test_the_collector_pays_no_debts_of_others(machine: QemuMachine, tmp_path: Path):
    kill_dump_of(machine, tmp_path)
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute("cont")
    crash = collect_crash(machine.qmp_sockets[0], tmp_path / "crashes", name="guest")
    record = json.loads((crash / "crash.json").read_text())
    assert record["dump"]["reason"] is None
    said = " ".join(record["remarks"])
    assert "it runs again" not in said
    assert "somebody else" not in said
    assert guest_status(machine) == "running"
    assert abandoned_debts() == []


def test_what_is_owed_is_of_a_process_not_of_an_address(
    machine: QemuMachine, tmp_path: Path, runtime: Path
):
    address = str(machine.qmp_sockets[0])
    guardian = Guardian("qmp", address)
    assert list(runtime.rglob("*.stopped")) == []
    guardian.dismiss()
    nobody = {"kind": "qmp", "address": address, "dumper": 1, "qemu": None, "started": 0.0}
    (runtime / "qemu-dump").mkdir(mode=0o700, exist_ok=True)
    (runtime / "qemu-dump" / "a.stopped").write_text(json.dumps(nobody))
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute("stop")
        done = run_cli("--qmp", address, tmp_path / "dump")
        assert qmp.execute("query-status")["status"] == "paused", done.stderr
        qmp.execute("cont")


@contextmanager
def limited(what: int, value: int) -> Iterator[None]:
    """Allow this process no more of something."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def test_nothing_is_owed_where_no_guardian_can_be_started(machine: QemuMachine, runtime: Path):
    free = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
    for descriptor in free:
        os.close(descriptor)
    with (
        limited(resource.RLIMIT_NOFILE, max(free) + 1),
        pytest.raises(SourceError, match="start what lets the guest run if this ends"),
    ):
        Guardian("qmp", str(machine.qmp_sockets[0]), pid=machine.pid)
    assert list(runtime.rglob("*.stopped")) == []


def test_nothing_is_owed_where_it_cannot_be_written(machine: QemuMachine, runtime: Path):
    debt = OpenDebt()
    with limited(resource.RLIMIT_FSIZE, 0):
        debt.write(machine.pid)
    assert (debt.path, debt.descriptors()) == (None, ())
    assert list(runtime.rglob("*.stopped")) == []


def test_a_guardian_that_waits_for_the_monitor_is_called_back(machine: QemuMachine, runtime: Path):
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    before = children.read_text()
    with RawQmp(machine.qmp_sockets[0]):
        guardian = Guardian("qmp", str(machine.qmp_sockets[0]), pid=machine.pid)
        guardian.act()
        assert children.read_text() != before
        guardian.dismiss()
    assert children.read_text() == before
    assert list(runtime.rglob("*.stopped")) == []


def test_a_guest_that_is_gone_is_forgotten(tmp_path: Path):
    with QemuMachine(["qemu-system-x86_64"], _WORDS) as machine:
        kill_dump_of(machine, tmp_path)
        assert len(abandoned_debts()) == 1
    assert abandoned_debts() == []
    assert list((tmp_path / "runtime" / "qemu-dump").iterdir()) == []


def test_a_dump_that_lives_owes_nothing_to_others(machine: QemuMachine, tmp_path: Path):
    with blocked_target(tmp_path) as target:
        argv = cli_argv("--qmp", machine.qmp_sockets[0], target.path)
        with Process(argv, env=child_environment(), stderr=subprocess.PIPE) as dump:
            wait_until(target.is_written_to, "the dump is being written")
            assert stopped_by(machine) is None
            target.drain()
            dump.communicate(timeout=60)
    assert guest_status(machine) == "running"
    assert list((tmp_path / "runtime" / "qemu-dump").iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        "{}",
        '{"dumper": 1, "qemu": null, "started": 0}',
        '{"dumper": 1, "qemu": 1, "started": 0}',
        '{"dumper": 1, "qemu": "x", "started": "y"}',
        "9" * 5000,
    ],
)
def test_files_that_say_nonsense(runtime: Path, text: str):
    (runtime / "qemu-dump").mkdir(mode=0o700)
    (runtime / "qemu-dump" / "a.stopped").write_text(text)
    (runtime / "qemu-dump" / "b.stopped").mkdir()
    (runtime / "qemu-dump" / "c.stopped").symlink_to("/dev/zero")
    os.mkfifo(runtime / "qemu-dump" / "d.stopped")
    assert abandoned_debts() == []


def test_partial_files_of_the_dead(machine: QemuMachine, tmp_path: Path):
    argv = cli_argv("--qmp", machine.qmp_sockets[0], "--threads", "1", tmp_path / "dump")
    code = "import os, signal; from qemu_dump_ext.sinks.file import FileSink\n"
    code += "FileSink.commit = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
    subprocess.run(
        [sys.executable, "-c", code + argv[2], *argv[3:]], env=child_environment(), check=False
    )
    (partial,) = tmp_path.glob(".dump.*.partial")
    held = tmp_path / ".other.01234567.partial"
    foreign = tmp_path / ".other.partial"
    for path in (held, foreign):
        path.touch()
    for path in (partial, held, foreign):
        os.utime(path, (0, 0))
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run_cli("--qmp", machine.qmp_sockets[0], tmp_path / "dump").returncode == 0
    assert not partial.exists()
    assert held.exists()
    assert foreign.exists()


def gdb_words(machine: QemuMachine, *more: object) -> tuple[object, ...]:
    return ("--gdb", machine.gdb_socket, *more, "--force", os.devnull)


def test_gdb_alone_leaves_a_guest_as_it_was(machine: QemuMachine):
    with RawQmp(machine.qmp_sockets[0]) as qmp:  # the other one is free, and knows
        said_often("qemu_dump_guest_memory", [gdb_words(machine)])
        assert qmp.execute("query-status")["status"] == "running"
        qmp.execute("stop")
        said_often("qemu_dump_guest_memory", [gdb_words(machine)])
        assert qmp.execute("query-status")["status"] == "paused"
        qmp.execute("cont")


def test_gdb_where_no_monitor_can_be_asked(machine: QemuMachine):
    with RawQmp(machine.qmp_sockets[0]) as qmp, RawQmp(machine.qmp_sockets[1]):
        (said,) = said_often("qemu_dump_guest_memory", [gdb_words(machine)])
        assert qmp.execute("query-status")["status"] == "running", said
        qmp.execute("stop")
        # A gdbstub of 7.2 says that it has stopped a guest, and says nothing of this one; one of
        # 8.0 and newer says nothing of any.
        tells = own_qemu_version() < (8, 0, 0)
        (said,) = said_often("qemu_dump_guest_memory", [gdb_words(machine)])
        assert qmp.execute("query-status")["status"] == ("paused" if tells else "running"), said
        assert ("nobody could tell" in said) is not tells
        said_often("qemu_dump_guest_memory", [gdb_words(machine, "--resume")])
        assert qmp.execute("query-status")["status"] == "running"
        said_often("qemu_dump_guest_memory", [gdb_words(machine, "--stay-stopped")])
        assert qmp.execute("query-status")["status"] == "paused"
        qmp.execute("cont")


def test_gdb_where_nobody_can_tell(tmp_path: Path):
    with (
        QemuMachine(newer_qemu_command(), _WORDS) as machine,
        relay(tmp_path / "far", machine.gdb_socket) as far,
        RawQmp(machine.qmp_sockets[0]) as qmp,
    ):
        said = run_cli("--gdb", far, "--force", os.devnull).stderr
        assert "nobody could tell: it is let run afterwards (--stay-stopped" in said
        assert qmp.execute("query-status")["status"] == "running"
        qmp.execute("stop")
        run_cli("--gdb", far, "--stay-stopped", "--force", os.devnull)
        assert qmp.execute("query-status")["status"] == "paused"


def test_what_becomes_of_a_guest_is_for_gdb(machine: QemuMachine):
    done = run_cli("--qmp", machine.qmp_sockets[0], "--resume", os.devnull)
    assert (done.returncode, "--resume goes with --gdb" in done.stderr) == (2, True)
