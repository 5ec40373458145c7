"""Guests are found, and reached by name, PID and whatever monitor they have; QEMU decides."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tty
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import qemu_dump_ext as qd
from qemu_dump_ext.engine.guests import FoundGuest, list_guests
from qemu_dump_ext.guest_images.machine import QemuMachine
from qemu_dump_ext.qemu.qemu_processes import find_qemu_processes
from tests.support.doors import (
    child_environment,
    guest_status,
    run_cli,
    run_gdb,
    said_often,
)
from tests.support.hmp_proxy import run_proxy
from tests.support.newer_qemu import newer_qemu_command
from tests.support.processes import Process
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

_QEMU = "qemu-system-x86_64"
_TOOLS = "import sys; from qemu_dump_ext.entry import qemu_dump as run; sys.exit(run())"
_FIFTY = 50
_ME = os.getpid()
"""In every name: others may run the same tests on this host."""
_WEB = f"web-{_ME}-front"
_UUID = str(uuid.uuid4())


def tools(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _TOOLS, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=child_environment(),
    )


def found_guest(pid: int) -> FoundGuest:
    (guest,) = (guest for guest in list_guests() if guest.pid == pid)
    return guest


@contextmanager
def started(*argv: object, cwd: Path | None = None, **options: Any) -> Iterator[int]:
    """Run a QEMU until the block ends; yields its pid once its monitors are there."""
    process = subprocess.Popen(
        list(map(str, argv)), cwd=cwd, **{"stdin": subprocess.DEVNULL, **options}
    )
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def wait_for(path: Path) -> None:
    wait_until(lambda: path.is_socket() and _accepts(path), f"{path} is listened at")


def _accepts(path: Path) -> bool:
    table = Path("/proc/net/unix").read_text("utf-8").splitlines()
    return any(line.split()[3] == "00010000" for line in table if line.endswith(path.name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guests")


@pytest.fixture(scope="module")
def machine(folder: Path) -> Iterator[QemuMachine]:
    """A guest that runs, with monitors of every kind."""
    words = ["-m", "32", "-smp", "2", "-M", "q35", "-name", f"{_WEB},process=hidden"]
    words += ["-uuid", _UUID]
    words += ["-monitor", f"unix:{folder}/hmp,server=on,wait=off"]
    words += ["-monitor", "telnet:127.0.0.1:0,server=on,wait=off", "-monitor", "pty"]
    with QemuMachine([_QEMU], words) as qemu:
        yield qemu


def test_what_is_told_of_a_guest(machine: QemuMachine, folder: Path):
    guest = found_guest(machine.pid)
    assert (guest.name, guest.target, guest.machine) == (_WEB, "x86_64", "q35")
    assert (guest.memory, guest.vcpus, guest.user) == (32 << 20, 2, os.geteuid())
    assert (guest.unreadable, guest.namespaces) == (None, ())
    with RawQmp(machine.qmp_sockets[0]), RawQmp(machine.qmp_sockets[1]) as qmp:
        assert qmp.execute("query-uuid")["UUID"] == guest.uuid
        devices = [entry["filename"] for entry in qmp.execute("query-chardev")]
        guest = found_guest(machine.pid)
    (telnet,) = (
        name.split(",")[0].rpartition("telnet:")[2] for name in devices if "telnet" in name
    )
    (terminal,) = (name.removeprefix("pty:") for name in devices if name.startswith("pty:"))
    assert {(way.use, way.address, way.holder_pid) for way in guest.ways} == {
        ("qmp", str(machine.qmp_sockets[0]), os.getpid()),
        ("qmp", str(machine.qmp_sockets[1]), os.getpid()),
        ("hmp", str(folder / "hmp"), None),
        ("hmp", telnet, None),
        ("hmp", terminal, None),
        ("gdbstub", str(machine.gdb_socket), None),
    }


def test_the_table_and_json(machine: QemuMachine):
    shown = tools("guests")
    assert shown.returncode == 0, shown.stderr
    assert any(f"{machine.pid} " in line and _WEB in line for line in shown.stdout.split("\n"))
    (told,) = (
        guest
        for guest in json.loads(tools("guests", "--json").stdout)
        if guest["pid"] == machine.pid
    )
    assert told["ways"][0]["address"] == str(machine.qmp_sockets[0])
    assert _WEB in tools("guests", "--names").stdout.split()


def monitors(machine: QemuMachine) -> dict[str, Sequence[str]]:
    """Every way to name the guest, by the words on the command line."""
    ways = [way for way in found_guest(machine.pid).ways if way.use == "hmp"]
    unix, telnet, terminal = (
        next(way.address or "" for way in ways if way.backend == backend)
        for backend in ("unix", "tcp", "pty")
    )
    return {
        "name": ("--guest", _WEB),
        "beginning": ("--guest", _WEB[:-2]),
        "uuid": ("--guest", _UUID),
        "pid": ("--pid", str(machine.pid)),
        "hmp": ("--hmp", unix),
        "telnet": ("--hmp", telnet),
        "pty": ("--hmp", terminal),
    }


def test_every_way_gives_the_dump_of_qmp(machine: QemuMachine, tmp_path: Path):
    ways = {"qmp": ("--qmp", str(machine.qmp_sockets[0])), **monitors(machine)}
    lines = [(*words, "--json", tmp_path / name) for name, words in ways.items()]
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute("stop")
        try:
            told = said_often("qemu_dump_guest_memory", lines)
            assert "RESUME" not in [event["event"] for event in qmp.events]
            assert qmp.execute("query-status")["status"] == "paused"
        finally:
            qmp.execute("cont")
        for name, said in zip(ways, told, strict=True):
            assert json.loads(said)["memory_source"] == "process", name
            assert (tmp_path / name).read_bytes() == (tmp_path / "qmp").read_bytes(), name


def test_a_guest_runs_again_whatever_carries_its_monitor(machine: QemuMachine, tmp_path: Path):
    ways = monitors(machine)
    lines = [(*ways[name], tmp_path / name) for name in ("pid", "hmp", "telnet", "pty")]
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        told = said_often("qemu_dump_guest_memory", lines)
        assert qmp.execute("query-status")["status"] == "running", told
        assert [event["event"] for event in qmp.events].count("RESUME") == len(lines)


def test_other_doors(machine: QemuMachine):
    for words in (("--guest", _WEB), ("--pid", machine.pid), monitors(machine)["hmp"]):
        told = tools("info", *words)
        assert told.returncode == 0, told.stderr
        assert "x86_64" in told.stdout
        assert run_proxy(*words, text="info name").stdout == f"{_WEB}\n"
        done = run_gdb(machine, [f"qemu-info-guest {' '.join(map(str, words))}"])
        assert "2 vCPUs" in done.stdout, done.stderr
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("cont")
    for target in (f"name:{_WEB}", f"pid:{machine.pid}", f"hmp:{monitors(machine)['hmp'][1]}"):
        with qd.connect(target) as guest:
            assert guest.info().architecture == "x86_64"
    assert guest_status(machine) == "running"


def test_a_killed_dump_by_hmp_lets_the_guest_run(machine: QemuMachine):
    for name in ("hmp", "telnet", "pty"):
        argv = [sys.executable, "-c", _DUMP_AND_WAIT, monitors(machine)[name][1]]
        with Process[bytes](argv, stdout=subprocess.PIPE, env=child_environment()) as dump:
            assert dump.stdout is not None
            assert dump.stdout.readline() == b"stopped\n"
            assert guest_status(machine) == "paused"
            dump.send_signal(signal.SIGKILL)
        wait_until(lambda: guest_status(machine) == "running", f"it runs again by {name}")


_DUMP_AND_WAIT = """
import sys, signal
import qemu_dump_ext as qd
with qd.connect(f"hmp:{sys.argv[1]}") as guest, guest.stopped():
    print("stopped", flush=True)
    signal.pause()
"""


def test_relative_paths_and_another_directory(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    argv = [_QEMU, "-S", "-m", "16", "-display", "none", "-nodefaults"]
    argv += ["-qmp", "unix:deep/qmp,server=on,wait=off", "-name", f"relative-{_ME}"]
    with started(*argv, cwd=tmp_path) as pid:
        wait_for(tmp_path / "deep" / "qmp")
        (way,) = found_guest(pid).ways
        assert (way.use, way.address) == ("qmp", f"{tmp_path}/deep/qmp")
        done = run_cli("--guest", f"relative-{_ME}", "--memory", "process", tmp_path / "dump")
        assert done.returncode == 0, done.stderr
        # By another name of the same socket.
        (tmp_path / "link").symlink_to(tmp_path / "deep" / "qmp")
        done = run_cli("--qmp", tmp_path / "link", "--memory", "process", tmp_path / "dump2")
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to make namespaces")
def test_another_user_in_namespaces_of_its_own(tmp_path: Path):
    argv = ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "sh", "-c"]
    script = (
        "mount -t tmpfs none /mnt && chmod 777 /mnt && exec setpriv --reuid=65534 --regid=65534"
    )
    script += f" --clear-groups {shutil.which(_QEMU)} -S -m 16 -display none -nodefaults"
    script += f" -name inside-{_ME} -qmp unix:/mnt/qmp,server=on,wait=off"
    with started(*argv, script), ExitStack() as stack:

        def inside() -> list[FoundGuest]:
            return [one for one in list_guests() if one.name == f"inside-{_ME}"]

        wait_until(
            lambda: inside() and Path(inside()[0].ways[0].address or "").is_socket(), "it runs"
        )
        (guest,) = inside()
        stack.callback(os.kill, guest.pid, signal.SIGKILL)  # it outlives what started it
        assert guest.user == 65534
        assert set(guest.namespaces) == {"mnt", "pid", "net"}
        assert guest.ways[0].address == f"/proc/{guest.pid}/root/mnt/qmp"
        done = run_cli("--guest", f"inside-{_ME}", "--memory", "process", tmp_path / "dump")
        assert done.returncode == 0, done.stderr
        nobody = ["setpriv", "--reuid=65533", "--clear-groups", "--bounding-set=-all"]
        seen = subprocess.run(
            [*nobody, sys.executable, "-c", _TOOLS, "guests"],
            capture_output=True,
            text=True,
            check=False,
            env=child_environment(),
        )
        if seen.returncode == 0:  # where that user may read this tree
            assert f"inside-{_ME}" in seen.stdout


def test_a_monitor_at_a_terminal_alone(tmp_path: Path):
    controller, terminal = pty.openpty()
    tty.setraw(terminal)
    argv = [_QEMU, "-S", "-m", "16", "-display", "none", "-nodefaults", "-monitor", "stdio"]
    with started(*argv, "-name", f"stdio-{_ME}", stdin=terminal, stdout=terminal) as pid:
        wait_until(lambda: b"(qemu)" in os.read(controller, 4096), "it is there")
        (way,) = found_guest(pid).ways
        assert (way.use, way.address, way.backend) == ("hmp", None, "stdio")
        done = run_cli("--guest", f"stdio-{_ME}", tmp_path / "dump")
    os.close(controller)
    os.close(terminal)
    assert done.returncode == 3
    assert f"process {pid} has no monitor that is free (hmp stdio: " in done.stderr


def test_names_that_are_no_guest_or_several(machine: QemuMachine, tmp_path: Path):
    argv = [
        _QEMU,
        "-S",
        "-machine",
        "none",
        "-display",
        "none",
        "-nodefaults",
        "-name",
        _WEB,
    ]
    with started(*argv, "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off") as pid:
        wait_for(tmp_path / "qmp")
        for word in (_WEB, _WEB[:-3]):
            done = run_cli("--guest", word, os.devnull)
            assert done.returncode == 2
            assert f"several guests are called '{word}': " in done.stderr
            assert f"{_WEB} (PID {pid})" in done.stderr
            assert f"{_WEB} (PID {machine.pid})" in done.stderr
    bad: dict[tuple[str, str], str] = {
        ("--guest", "nobody"): "no guest is called 'nobody': there are ",
        ("--pid", str(os.getpid())): f"process {os.getpid()} is no QEMU",
        ("--pid", "4194304"): "process 4194304 is no QEMU",
        ("--pid", "x"): "'x' is no number of a process",
        ("--pid", "-1"): "'-1' is no number of a process",
    }
    told = said_often("qemu_dump_guest_memory", [(*words, os.devnull) for words in bad])
    for said, expected in zip(told, bad.values(), strict=True):
        assert expected in said


def test_every_monitor_is_taken(machine: QemuMachine):
    with (
        RawQmp(machine.qmp_sockets[0]),
        RawQmp(machine.qmp_sockets[1]),
        socket.socket(socket.AF_UNIX) as hmp,
    ):
        hmp.connect(
            next(
                way.address or ""
                for way in found_guest(machine.pid).ways
                if way.use == "hmp" and way.backend == "unix"
            )
        )
        guest = found_guest(machine.pid)
        taken = [way for way in guest.ways if way.taken]
        assert len(taken) == 3
        assert {way.holder_pid for way in taken} == {os.getpid()}


def test_a_program_behind_a_loader():
    argv = newer_qemu_command()
    with started(*argv, "-S", "-machine", "none", "-display", "none", "-name", "loaded") as pid:
        wait_until(lambda: any(one.pid == pid for one in list_guests()), "it is found")
        guest = found_guest(pid)
    assert (guest.name, guest.target) == ("loaded", "x86_64")


def test_fifty_at_once(tmp_path: Path):
    argv = [_QEMU, "-S", "-machine", "none", "-display", "none", "-nodefaults", "-monitor", "none"]
    processes = []
    try:
        for number in range(_FIFTY):
            way = f"unix:{tmp_path}/{number},server=on,wait=off"
            words = [*argv, "-name", f"many-{number}", "-qmp", way]
            processes.append(subprocess.Popen(words, stdin=subprocess.DEVNULL))
        for number in range(_FIFTY):
            wait_for(tmp_path / str(number))
        pids = {process.pid for process in processes}
        guests = [guest for guest in list_guests() if guest.pid in pids]
        assert {(guest.name, guest.ways[0].address) for guest in guests} == {
            (f"many-{number}", f"{tmp_path}/{number}") for number in range(_FIFTY)
        }
        assert all(not way.taken for guest in guests for way in guest.ways)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def test_files_that_a_stranger_names_are_not_opened_unless_they_are_files(tmp_path: Path):
    """To open a FIFO would never end, and to open a device may do something."""
    impostor, fifo = tmp_path / "qemu-system-x86_64", tmp_path / "fifo"
    shutil.copy("/bin/dash", impostor)
    os.mkfifo(fifo)
    words = ("-c", "sleep 60; :", "-readconfig", str(fifo), "-kernel", str(fifo))
    with started(str(impostor), *words) as pid:
        wait_until(lambda: any(one.pid == pid for one in list_guests()), "it is listed")


def test_no_other_program_is_taken_for_one():
    with (
        started("sh", "-c", "exec sleep 60 # qemu-system-x86_64 -name impostor"),
        started("sleep", "60"),
    ):
        assert os.getpid() not in {process.pid for process in find_qemu_processes()}
        assert "impostor" not in {guest.name for guest in list_guests()}
