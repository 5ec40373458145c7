"""A QEMU that does not answer gives its guest's memory all the same, and is left as it was."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qemu_dump_ext as qd
from qemu_dump_ext.guest.access import SourceContext
from qemu_dump_ext.guest_images.machine import QemuMachine
from qemu_dump_ext.memory_sources.process import host_addresses
from qemu_dump_ext.qemu.qemu_processes import qemu_process
from qemu_dump_ext.qemu.qmp import connect_qmp
from qemu_dump_ext.qemu.ram_by_evidence import ram_by_evidence
from tests.support.crash_agent import CrashAgent
from tests.support.doors import child_environment, guest_status, run_cli
from tests.support.planted import plant_memory
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]
_QEMU = "qemu-system-x86_64"
_ALONE = ("--memory", "process", "--json")
_SIZE = 48 << 20
# Stops one thread as a debugger does, until it is told to end.
_HOLD = """
import ctypes, os, sys
trace = ctypes.CDLL(None, use_errno=True).ptrace
trace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
thread = int(sys.argv[1])
assert trace(16, thread, None, None) == 0, os.strerror(ctypes.get_errno())
os.waitpid(thread, 0x40000000)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[QemuMachine]:
    """A guest that has something in its memory."""
    words = ["-M", "q35", "-m", "48", "-name", f"silent-{os.getpid()}", "-S"]
    with QemuMachine([_QEMU], words) as qemu:
        with RawQmp(qemu.qmp_sockets[1]) as qmp:
            plant_memory("silent", qmp, qemu.gdb_socket)
        yield qemu


@pytest.fixture(scope="module")
def saved(machine: QemuMachine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was written down of the guest while it answered."""
    path = tmp_path_factory.mktemp("saved") / "guest.json"
    done = tools("info", "--pid", machine.pid, "--save", path)
    assert done.returncode == 0, done.stderr
    assert path.stat().st_mode & 0o777 == 0o600
    return path


@pytest.fixture(scope="module")
def reference(machine: QemuMachine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of the guest while it answered."""
    path = tmp_path_factory.mktemp("reference") / "dump"
    done = run_cli("--qmp", machine.qmp_sockets[0], path)
    assert done.returncode == 0, done.stderr
    return path


def tools(*words: object) -> subprocess.CompletedProcess[str]:
    program = "import sys; from qemu_dump_ext.entry import qemu_dump as run; sys.exit(run())"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
    )


@contextlib.contextmanager
def stopped_process(pid: int) -> Iterator[None]:
    """Keep all of a QEMU from running."""
    os.kill(pid, signal.SIGSTOP)
    process = qemu_process(pid)
    assert process is not None
    try:
        wait_until(lambda: process.main_thread_state() == "T", "QEMU has stopped")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def held_thread(thread: int) -> Iterator[None]:
    """Have a debugger hold one thread."""
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(thread)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield
        finally:
            holder.stdin.close()


@contextlib.contextmanager
def blocked_main_loop(machine: QemuMachine, folder: Path) -> Iterator[None]:
    """Have the main loop wait for a reader of a FIFO, which nobody but us can end."""
    fifo = folder / "fifo"
    os.mkfifo(fifo)
    syscall = Path(f"/proc/{machine.pid}/task/{machine.pid}/syscall")
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        words = {"val": 0, "size": 1, "filename": str(fifo)}
        asking = threading.Thread(target=qmp.execute, args=("pmemsave",), kwargs=words)
        asking.start()
        try:
            # In openat(AT_FDCWD), in 32 or 64 bits, and not in what waits for events.
            wait_until(lambda: "ffffff9c " in syscall.read_text("ascii"), "the main loop waits")
            yield
        finally:
            descriptor = os.open(fifo, os.O_RDONLY)
            asking.join()
            os.close(descriptor)


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 6, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["memory_source"] == "process"
    assert report["lacking"][0].startswith("registers: ")
    return report


def memory_of(path: Path) -> dict[tuple[int, int], bytes]:
    with qd.open_dump(path) as dump:
        return {(gpa, size): dump.read(gpa, size) for gpa, size in dump.memory_ranges()}


def test_a_stopped_qemu_with_what_was_saved(
    machine: QemuMachine, saved: Path, reference: Path, tmp_path: Path
):
    expected = memory_of(reference)
    assert any(any(data) for data in expected.values())
    before = guest_status(machine)
    with stopped_process(machine.pid):
        words = ("--pid", machine.pid, *_ALONE, "--description", saved, tmp_path / "dump")
        report = report_of(run_cli(*words))
    assert memory_of(tmp_path / "dump") == expected
    assert (report["doubts"], report["stood_still"]) == ([], True)
    assert guest_status(machine) == before


def test_a_stopped_qemu_by_evidence(machine: QemuMachine, reference: Path, tmp_path: Path):
    with stopped_process(machine.pid):
        report = report_of(run_cli("--pid", machine.pid, *_ALONE, tmp_path / "dump"))
        refused = run_cli("--pid", machine.pid, "--memory", "process", "--exact", tmp_path / "no")
        log = tools("dmesg", "--pid", machine.pid, "--memory", "process")
    assert (refused.returncode, "--exact needs QEMU" in refused.stderr) == (3, True)
    assert (log.returncode, "is it a Linux guest?" in log.stderr) == (3, True)
    assert "lays it out for a machine pc-q35" in report["doubts"][0]
    found = memory_of(tmp_path / "dump")
    assert sorted(found) == [(0, 0xA0000), (1 << 20, _SIZE - (1 << 20))]
    with qd.open_dump(reference) as dump:
        assert all(data == dump.read(gpa, size) for (gpa, size), data in found.items())


def test_the_crash_collector_keeps_what_a_dump_needs(
    machine: QemuMachine,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    kept = tmp_path / "qemu-dump" / f"{machine.pid}.guest"
    guest = {"socket": str(machine.qmp_sockets[0]), "name": "guest"}
    with CrashAgent(tmp_path, guests=[guest]).running() as agent:
        agent.wait_connected()
        wait_until(kept.exists, "the agent has written it down")
    assert kept.stat().st_mode & 0o777 == 0o600
    with stopped_process(machine.pid):
        report = report_of(run_cli("--pid", machine.pid, *_ALONE, tmp_path / "dump"))
    assert memory_of(tmp_path / "dump") == memory_of(reference)
    assert "was written down" in report["remarks"][0]
    assert report["doubts"] == []


def test_a_debugger_holds_the_main_loop(machine: QemuMachine, saved: Path, tmp_path: Path):
    with held_thread(machine.pid):
        words = ("--pid", machine.pid, *_ALONE, "--description", saved, tmp_path / "dump")
        report = report_of(run_cli(*words))
    assert report["stood_still"] is False
    assert "was not stopped" in report["doubts"][0]
    assert guest_status(machine) == "prelaunch"


def test_a_main_loop_that_waits(machine: QemuMachine, saved: Path, reference: Path, tmp_path: Path):
    """Its QMP greets, in a thread of its own, and answers nothing; its gdbstub is left alone."""
    with blocked_main_loop(machine, tmp_path):
        words = ("--pid", machine.pid, *_ALONE, "--description", saved, tmp_path / "dump")
        report = report_of(run_cli(*words))
    assert "no monitor answers" in report["lacking"][0]
    assert memory_of(tmp_path / "dump") == memory_of(reference)
    assert guest_status(machine) == "prelaunch"


def test_a_monitor_that_serves_somebody_else_is_no_silent_one(machine: QemuMachine, tmp_path: Path):
    with RawQmp(machine.qmp_sockets[0]), RawQmp(machine.qmp_sockets[1]):
        done = run_cli("--pid", machine.pid, "--memory", "process", tmp_path / "dump")
    assert (done.returncode, "taken" in done.stderr) == (3, True), done.stderr


def test_who_asks_is_told_that_nobody_answers(machine: QemuMachine):
    address = machine.qmp_sockets[0]
    with stopped_process(machine.pid), contextlib.ExitStack() as waiting:
        unanswered = tools("info", "--qmp", address)
        with contextlib.suppress(BlockingIOError):
            while True:
                other = waiting.enter_context(socket.socket(socket.AF_UNIX))
                other.setblocking(False)
                other.connect(str(address))
        crowded = tools("info", "--qmp", address)
    assert (unanswered.returncode, crowded.returncode) == (3, 3)
    assert f"{address} does not answer: no greeting in 5 s (its QEMU hangs" in unanswered.stderr
    assert f"{address}: it takes no connections: others wait there" in crowded.stderr


def test_a_description_of_another_guest_is_refused(
    machine: QemuMachine, saved: Path, tmp_path: Path
):
    content = json.loads(saved.read_text("ascii"))
    other = tmp_path / "other"
    other.write_text(json.dumps(content | {"started": content["started"] + 1}), "ascii")
    with stopped_process(machine.pid):
        words = ("--pid", machine.pid, "--memory", "process", tmp_path / "dump")
        done = run_cli(*words, "--description", other)
    assert (done.returncode, "is of another guest" in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "dump").exists()
    unused = run_cli("--qmp", machine.qmp_sockets[0], "--description", saved, tmp_path / "dump")
    assert (unused.returncode, "--memory process" in unused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("x86_64", ("-M", "q35", "-m", "5G")),
        ("x86_64", ("-m", "3584")),
        ("x86_64", ("-M", "microvm", "-m", "64")),
        ("aarch64", ("-M", "virt", "-m", "300", "-smp", "2")),
        (
            "riscv64",
            (
                "-M",
                "virt",
            ),
        ),
        ("ppc64", ("-M", "pseries-7.2", "-m", "512")),
        ("s390x", ("-m", "96")),
        ("mips64", ("-M", "malta", "-m", "512")),
    ],
)
def test_evidence_is_what_the_monitor_tells(target: str, words: tuple[str, ...]):
    with QemuMachine([f"qemu-system-{target}"], ["-S", *words]) as machine:
        process = qemu_process(machine.pid)
        assert process is not None
        located = ram_by_evidence(process)
        with connect_qmp(str(machine.qmp_sockets[0])) as qmp:
            seen = host_addresses(SourceContext(qmp, None, list(located.blocks)))
    assert seen == dict(located.blocks)
