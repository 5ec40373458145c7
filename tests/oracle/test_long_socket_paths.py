"""Sockets whose path is longer than the address of one may be, by every door."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_dump_ext.crash_collector.collect_now import collect_crash
from qemu_dump_ext.crash_collector.record import parse_record
from qemu_dump_ext.crash_collector.watch.session import find_command_line
from qemu_dump_ext.guest_images.machine import QemuMachine
from qemu_dump_ext.qemu.process import find_listeners, find_qemu_process
from qemu_dump_ext.qemu.qmp import connect_qmp
from tests.support.bare_crashes import bare_machine
from tests.support.crash_agent import CrashAgent, run_collector
from tests.support.doors import child_environment, guest_status
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuMachine]:
    with bare_machine(tmp_path_factory.mktemp("machine"), "halt") as machine:
        yield machine


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, machine: QemuMachine) -> Path:
    """A directory with QEMU's sockets under names that are too long."""
    deep = tmp_path_factory.mktemp("deep") / ("x" * 100) / ("y" * 100)
    deep.mkdir(parents=True)
    for name, path in (("qmp", machine.qmp_sockets[0]), ("gdb", machine.gdb_socket)):
        (deep / name).symlink_to(path)
        assert len(os.fsencode(deep / name)) > 107
    return deep


def run_program(entry: str, *words: object) -> subprocess.CompletedProcess[str]:
    code = f"import sys; from qemu_dump_ext.entry import {entry} as run; sys.exit(run())"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=child_environment(),
    )


def test_monitor_and_memory_are_reached(deep, machine):
    with connect_qmp(str(deep / "qmp")) as qmp:
        assert qmp.target_name() == "x86_64"
        assert find_qemu_process((str(deep / "qmp"),)) == machine.pid
    done = run_program("qemu_dump", "info", "--qmp", deep / "qmp", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["architecture"] == "x86_64"


@pytest.mark.parametrize("door", ["--qmp", "--gdb"])
def test_dump_is_taken(deep, tmp_path, door):
    where = deep / door.removeprefix("--")
    done = run_program("qemu_dump_guest_memory", door, where, tmp_path / "dump")
    assert done.returncode == 0, done.stderr


def test_crash_is_collected_by_an_agent_whose_own_socket_is_there_too(deep, machine, tmp_path):
    store = deep / "store"
    agent = CrashAgent(
        tmp_path, store=str(store), guests=[{"socket": str(deep / "qmp"), "name": "box"}]
    )
    done = run_collector("check-config", "--config", agent.config)
    assert "box: " in done.stdout
    assert "start QEMU with -action panic=pause" in done.stdout
    with agent.running():
        agent.wait_connected()
        done = run_collector("trigger", "box", "--config", agent.config)
        assert done.returncode == 0, done.stderr
        (record,) = agent.records()
        assert record.dump.complete
        assert record.qemu.pid == machine.pid
    assert guest_status(machine) == "prelaunch"


def test_qemu_is_found_by_a_socket_that_it_made_in_its_own_directory(tmp_path):
    """Where it was started, and nobody else is now."""
    place = tmp_path / ("z" * 120)
    place.mkdir()
    argv = ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-m", "16"]
    argv += ["-qmp", "unix:qmp.sock,server=on,wait=off"]
    with subprocess.Popen(argv, cwd=place) as process:
        try:
            path = str(place / "qmp.sock")
            wait_until(lambda: find_listeners(path) == [process.pid], "it listens")
            with connect_qmp(path):
                assert find_qemu_process((path,)) == process.pid
            assert find_command_line(path) == tuple(argv)
            assert find_listeners(str(tmp_path / "qmp.sock")) == []
        finally:
            process.kill()


def test_crash_is_collected_once(deep, machine, tmp_path):
    directory = collect_crash(deep / "qmp", tmp_path / "store", name="box")
    record = parse_record((directory / "crash.json").read_bytes())
    assert (record.qemu.pid, record.dump.complete) == (machine.pid, True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 300, "File name too long"),
        (f"{'d/' * 100}none", "there is no such socket now"),
        ("plain", "it is no socket"),
    ],
    ids=["long name", "long path to nothing", "file"],
)
def test_socket_that_can_never_be_reached_is_told_as_what_it_is(tmp_path, name, reason):
    (tmp_path / "plain").touch()
    path = tmp_path / name
    agent = CrashAgent(tmp_path, guests=[{"socket": str(path), "name": "box"}])
    done = run_collector("check-config", "--config", agent.config)
    assert done.stdout.splitlines()[1] == f"box: {path}: {reason}"
    for entry, words in (
        ("qemu_dump", ("info", "--qmp", path)),
        ("qemu_dump_guest_memory", ("--gdb", path, tmp_path / "dump")),
    ):
        done = run_program(entry, *words)
        assert done.returncode == 3, done.stderr
        assert len(done.stderr.splitlines()) == 1
