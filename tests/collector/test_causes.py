"""What counts as a crash, with machines that really do it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.support.bare_crashes import bare_machine
from tests.support.crash_agent import CrashAgent, run_collector
from tests.support.doors import guest_status
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu


def cont(machine: QemuMachine) -> None:
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute("cont")


@contextmanager
def watched(
    directory: Path, program: str, *arguments: str, **settings: Any
) -> Iterator[tuple[CrashAgent, QemuMachine]]:
    """A machine that is ready to run a program, and an agent that watches it as `box`."""
    with bare_machine(directory, program, *arguments) as machine:
        guest = {"socket": str(machine.qmp_sockets[0]), "name": "box", **settings}
        agent = CrashAgent(directory, guests=[guest])
        with agent.running():
            agent.wait_connected()
            yield agent, machine


# Program, arguments of QEMU, settings, kind, run state afterwards.
CAUSES = {
    "panic": ("panic", (), {}, "guest-panicked", "guest-panicked"),
    "panic-reported": (
        "panic-spin",
        ("-action", "panic=none"),
        {},
        "guest-panicked",
        "running",
    ),
    "crashloaded": ("crashloaded", (), {}, "crashloaded", "running"),
    "watchdog": ("watchdog", ("-action", "watchdog=pause"), {}, "watchdog", "watchdog"),
    "reset": (
        "reset",
        ("-action", "reboot=shutdown,shutdown=pause"),
        {"causes": ["shutdown"]},
        "shutdown",
        "shutdown",
    ),
}


@pytest.mark.parametrize("name", CAUSES)
def test_event_is_a_crash_and_the_guest_is_afterwards_as_qemu_left_it(tmp_path, name):
    program, arguments, settings, kind, status = CAUSES[name]
    with watched(tmp_path, program, *arguments, **settings) as (agent, machine):
        cont(machine)
        (record,) = agent.wait_records()
        assert record.cause.kind == kind
        assert record.guest == "box"
        assert record.dump.verified_by == ("verify",)
        assert record.dump.complete
        assert record.qemu.pid == machine.pid
        assert record.qemu.command_line == tuple(machine.argv)
        assert (record.guest_stopped_seconds > 0) == (status == "running")
        agent.wait_logged("collected")
        wait_until(lambda: guest_status(machine) == status, status)
        directory = agent.store.directory(record.id)
        with open_dump(directory / "vmcore.kdump") as dump:
            assert not verify_dump(dump).problems
        assert "EIP=" in (directory / "registers.txt").read_text()
        answers = json.loads((directory / "queries.json").read_text())
        assert answers["query-version"]["qemu"]["major"] >= 7
        assert "-bios" in (directory / "qemu.txt").read_text()
        agent.check_sums()


def test_guest_that_resets_all_the_time_does_not_flood_the_store(tmp_path):
    settings = {"causes": ["reset"], "rate": {"dumps": 1, "per": "1h"}}
    with watched(tmp_path, "reset", **settings) as (agent, machine):
        cont(machine)
        agent.wait_logged("crashes too often")
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("stop")
        records = agent.wait_records(10)
        assert sum(record.dump.file is not None for record in records) == 1
        assert any("also, " in remark for record in records for remark in record.remarks)
        assert len(agent.lines()) < 50
        assert max(len(record.to_json()) for record in records) < 20000


def test_disk_error_that_stops_the_guest_is_a_crash(tmp_path):
    """The BIOS cannot read its boot disk."""
    rules = tmp_path / "rules"
    rules.write_text('[inject-error]\nevent = "read_aio"\nerrno = "5"\n')
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    arguments = ["-S", "-m", "32", "-drive"]
    arguments.append(
        f"if=none,id=disk,driver=raw,file.driver=blkdebug,file.config={rules},"
        f"file.image.driver=file,file.image.filename={disk},rerror=stop,werror=stop"
    )
    arguments += ["-device", "ide-hd,drive=disk"]
    with QemuMachine(["qemu-system-x86_64"], arguments) as machine:
        guest = {"socket": str(machine.qmp_sockets[0]), "name": "box"}
        with CrashAgent(tmp_path, guests=[guest]).running() as agent:
            agent.wait_connected()
            cont(machine)
            (record,) = agent.wait_records()
            assert (record.cause.kind, record.dump.complete) == ("io-error", True)
            assert guest_status(machine) == "io-error"


def test_memory_failure_is_a_crash(tmp_path):
    """A machine check that the guest cannot take resets it, says QEMU."""
    with watched(tmp_path, "halt", "-cpu", "qemu64") as (agent, machine):
        cont(machine)
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            line = "mce 0 9 0xbd00000000000000 0x5 0x1000 0x8c"
            qmp.execute("human-monitor-command", **{"command-line": line})
        (record,) = agent.wait_records()
        assert record.cause.kind == "memory-failure"
        assert guest_status(machine) == "running"


def test_line_on_the_console_is_a_crash_unless_the_panic_follows(tmp_path):
    console = tmp_path / "console.log"
    with watched(tmp_path, "halt", console=str(console)) as (agent, machine):
        cont(machine)
        console.write_text("all is well\n[   12.5] BUG: unable to handle page fault for 0xdead\n")
        (record,) = agent.wait_records()
        assert record.cause.kind == "console"
        assert "BUG: unable to handle page fault for 0xdead" in record.cause.detail
        assert "BUG: unable to handle page fault for 0x?" in record.signature.message
        assert guest_status(machine) == "running"
        assert "all is well" in (agent.store.directory(record.id) / "console.txt").read_text()
        agent.wait_logged("collected")
    with watched(tmp_path, "panic", console=str(console)) as (agent, machine):
        with console.open("a") as file:
            file.write("Kernel panic - not syncing: Attempted to kill init! exitcode=0x9\n")
        agent.wait_logged("crash: Kernel panic")
        cont(machine)
        record = agent.wait_records(2)[1]
        assert record.cause.kind == "guest-panicked"
        assert record.signature.message == "Attempted to kill init! exitcode=0x?"


def test_guest_whose_vcpus_stand_still_is_a_crash_once(tmp_path):
    heartbeat = {"by": "program-counters", "interval": "100ms", "after": "500ms"}
    with watched(tmp_path, "halt", heartbeat=heartbeat) as (agent, machine):
        cont(machine)
        (record,) = agent.wait_records()
        assert record.cause.kind == "no-progress"
        agent.wait_logged("collected")
        assert guest_status(machine) == "running"


def test_guest_whose_vcpus_run_is_none(tmp_path):
    heartbeat = {"by": "program-counters", "interval": "50ms", "after": "3s"}
    with watched(tmp_path, "spin", heartbeat=heartbeat) as (agent, machine):
        cont(machine)
        time.sleep(3.5)  # longer than it may stand still
        assert run_collector("trigger", "box", "--config", agent.config).returncode == 0
        agent.wait_records(1)
        assert agent.records()[0].cause.kind == "trigger"


def test_somebody_says_so(tmp_path):
    with watched(tmp_path, "halt", labels={"team": "storage"}) as (agent, machine):
        cont(machine)
        done = run_collector("trigger", "box", "--detail", "it smells", "--config", agent.config)
        (record,) = agent.records()
        assert done.stdout.strip() == record.id
        assert (record.cause.kind, record.cause.detail) == ("trigger", "it smells")
        assert record.labels == {"team": "storage"}
        assert guest_status(machine) == "running"
        done = run_collector("trigger", "nobody", "--config", agent.config)
        assert (done.returncode, done.stdout) == (2, "")
        assert "no guest nobody is watched" in done.stderr


def test_dead_qemu_is_a_crash_and_one_that_was_told_to_quit_is_none(tmp_path):
    with watched(tmp_path, "halt") as (agent, machine):
        cont(machine)
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("quit")
        agent.wait_logged("QEMU has ended")
        assert agent.records() == []
    with watched(tmp_path, "halt") as (agent, machine):
        cont(machine)
        machine._running().kill()
        (record,) = agent.wait_records()
        assert record.cause.kind == "qemu-died"
        assert record.dump.file is None
        assert "QEMU was gone" in str(record.dump.reason)
        assert record.qemu.command_line == tuple(machine.argv)
