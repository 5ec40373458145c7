"""What may go wrong while crashes are collected: nothing is lost, and no guest stays stopped."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from qemu_dump_ext.crash_collector.agent.agent import Agent
from qemu_dump_ext.crash_collector.agent.journal import replay
from qemu_dump_ext.crash_collector.config.file import parse_configuration
from qemu_dump_ext.crash_collector.store.store import CrashStore
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


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[QemuMachine]:
    with bare_machine(tmp_path, "halt") as machine:
        cont(machine)
        yield machine


@pytest.fixture
def slowly_dumped(tmp_path: Path) -> Iterator[QemuMachine]:
    """With the settings `SLOWLY` it stands still for seconds: there is a middle of it."""
    with bare_machine(tmp_path, "halt", "-m", "320") as machine:
        cont(machine)
        yield machine


SLOWLY = {"memory": "pmemsave"}


@pytest.fixture
def panicking(tmp_path: Path) -> Iterator[QemuMachine]:
    with bare_machine(tmp_path, "panic") as machine:
        yield machine


def agent_of(
    directory: Path, machine: QemuMachine, settings: Mapping[str, Any] | None = None, **others: Any
) -> CrashAgent:
    guest = {"socket": str(machine.qmp_sockets[0]), "name": "box", "dumps_per_signature": 99}
    return CrashAgent(directory, guests=[guest | dict(settings or {})], **others)


def trigger(agent: CrashAgent) -> None:
    """Do not wait for the answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(agent.store.path / ".control"))
        connection.sendall(b'{"command": "trigger", "guest": "box"}\n')


def wait_journal(agent: CrashAgent, text: str) -> None:
    journal = agent.store.path / ".journal"
    wait_until(lambda: journal.exists() and text in journal.read_text(), f"it says {text}")


def check_clean(agent: CrashAgent) -> None:
    """Nothing is under way, and nothing incomplete is there."""
    incoming = agent.store.path / ".incoming"
    wait_until(lambda: not list(incoming.iterdir()), "nothing under way")
    assert len(list(agent.store.records())) == len(agent.store.directories())
    agent.check_sums()


# How long after the trigger the agent is killed: before, in, and behind everything it does.
DELAYS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)


def test_killed_agent_takes_up_again_what_it_had_under_way(tmp_path, idle):
    """Each agent takes up what the one before left, and is killed at the next crash."""
    agent = agent_of(tmp_path, idle, {"rate": {"dumps": 99}})
    journal = agent.store.path / ".journal"
    for number in range(len(DELAYS) + 1):
        with agent.running():
            agent.wait_connected()
            agent.wait_records(number)
            wait_until(lambda: guest_status(idle) == "running", "the guest runs")
            check_clean(agent)
            wait_until(lambda: not replay(_lines(journal)), "nothing owed")
            wait_until(lambda: not (agent.guests() or [])[0]["collecting"], "it is ready for more")
            if number == len(DELAYS):
                break
            known = _triggers(journal)
            trigger(agent)
            wait_until(lambda: _triggers(journal) > known, "it begins")  # noqa: B023
            time.sleep(DELAYS[number])
            agent.kill()
    assert all(record.dump.complete for record in agent.records())


def _lines(journal: Path) -> list[bytes]:
    return journal.read_bytes().splitlines() if journal.exists() else []


def _triggers(journal: Path) -> int:
    return sum(b'"kind": "trigger"' in line for line in _lines(journal))


def test_crash_that_was_just_stored_when_the_agent_was_killed_is_stored_once(tmp_path, idle):
    agent = agent_of(tmp_path, idle)
    with agent.running():
        agent.wait_connected()
        done = run_collector("trigger", "box", "--config", agent.config)
        assert done.returncode == 0, done.stderr
        agent.kill()
    journal = agent.store.path / ".journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    before = list(takewhile(lambda line: b'"stored": null' in line, lines))
    journal.write_bytes(b"".join(before))
    assert replay(journal.read_bytes().splitlines())["box"].cause is not None
    with agent.running():
        wait_until(lambda: not replay(journal.read_bytes().splitlines()), "nothing owed")
        agent.wait_records(1)


def test_guest_runs_again_that_was_stopped_when_the_agent_was_killed(tmp_path, slowly_dumped):
    agent = agent_of(tmp_path, slowly_dumped, SLOWLY)
    with agent.running():
        agent.wait_connected()
        trigger(agent)
        wait_journal(agent, '"stopped": true')
        wait_until(lambda: guest_status(slowly_dumped) == "paused", "the guest is stopped")
        agent.kill()
    assert guest_status(slowly_dumped) == "paused"
    agent = agent_of(tmp_path, slowly_dumped)
    with agent.running():
        agent.wait_logged("we had stopped the guest: it runs again")
        (record,) = agent.wait_records()
        wait_until(lambda: guest_status(slowly_dumped) == "running", "the guest runs")
        assert record.cause.kind == "trigger"
        assert record.dump.complete


def test_agent_that_is_asked_to_end_lets_the_guest_run_and_the_next_one_collects(
    tmp_path, slowly_dumped
):
    agent = agent_of(tmp_path, slowly_dumped, SLOWLY)
    with agent.running():
        agent.wait_connected()
        trigger(agent)
        wait_journal(agent, '"stopped": true')
        agent.signal(signal.SIGTERM)
        assert agent.wait() == 0
    assert guest_status(slowly_dumped) == "running"
    check_clean(agent)
    assert not agent.records()
    agent = agent_of(tmp_path, slowly_dumped)
    with agent.running():
        (record,) = agent.wait_records()
        assert record.dump.complete


def test_crash_that_nobody_watched_is_collected_once(tmp_path, panicking):
    with RawQmp(panicking.qmp_sockets[1]) as qmp:
        qmp.execute("set-action", panic="pause")
        qmp.execute("cont")
        qmp.wait_for_event("GUEST_PANICKED")
    agent = agent_of(tmp_path, panicking)
    for _ in range(2):
        with agent.running():
            agent.wait_connected()
            agent.wait_records(1)
            agent.wait_logged("collected")
            agent.signal(signal.SIGTERM)
            agent.wait()
    assert guest_status(panicking) == "guest-panicked"
    with RawQmp(panicking.qmp_sockets[1]) as qmp:
        qmp.execute("system_reset")
        qmp.execute("cont")
        qmp.wait_for_event("GUEST_PANICKED")
    with agent.running():
        agent.wait_records(1)  # the run state is the same: it cannot know


def test_qemu_killed_in_the_middle_leaves_what_was_known(tmp_path, slowly_dumped):
    agent = agent_of(tmp_path, slowly_dumped, SLOWLY)
    with agent.running():
        agent.wait_connected()
        trigger(agent)
        wait_journal(agent, '"stopped": true')
        slowly_dumped._running().kill()
        record = wait_until(agent.records, "a crash")[0]
        assert record.cause.kind == "trigger"
        assert record.dump.file is None
        assert record.dump.reason
        wait_until(lambda: len(agent.lines()) > 3, "the rest")
        check_clean(agent)


def test_qemu_gone_while_no_agent_ran_leaves_what_was_known(tmp_path, slowly_dumped):
    agent = agent_of(tmp_path, slowly_dumped, SLOWLY)
    with agent.running():
        agent.wait_connected()
        trigger(agent)
        wait_journal(agent, '"stopped": true')
        agent.kill()
    slowly_dumped._running().kill()
    with agent.running():
        (record,) = agent.wait_records()
        assert record.cause.kind == "trigger"
        assert "gone when the agent came back" in str(record.dump.reason)


def test_qemu_that_does_not_answer_is_recorded_and_its_guest_runs_again(tmp_path, idle):
    agent = agent_of(tmp_path, idle, answer_timeout="3s")
    with agent.running():
        agent.wait_connected()
        idle._running().send_signal(signal.SIGSTOP)
        try:
            trigger(agent)
            (record,) = agent.wait_records()
        finally:
            idle._running().send_signal(signal.SIGCONT)
        assert "does not answer" in str(record.dump.reason)
        wait_until(lambda: guest_status(idle) == "running", "the guest runs")
        done = run_collector("trigger", "box", "--config", agent.config)
        assert done.returncode == 0, done.stderr
        assert agent.records()[1].dump.complete


def test_qemu_that_stops_answering_with_its_guest_stopped_lets_it_run_later(
    tmp_path, slowly_dumped
):
    agent = agent_of(tmp_path, slowly_dumped, SLOWLY, answer_timeout="3s")
    with agent.running():
        agent.wait_connected()
        trigger(agent)
        wait_journal(agent, '"stopped": true')
        slowly_dumped._running().send_signal(signal.SIGSTOP)
        try:
            agent.wait_records()
        finally:
            slowly_dumped._running().send_signal(signal.SIGCONT)
        wait_until(lambda: guest_status(slowly_dumped) == "running", "the guest runs")


def test_disk_without_room_keeps_the_rest(tmp_path, panicking):
    agent = agent_of(tmp_path, panicking, limits={"free": 1 << 60})  # no disk has
    with agent.running():
        agent.wait_connected()
        cont(panicking)
        (record,) = agent.wait_records()
        assert record.dump.file is None
        assert "are kept free" in str(record.dump.reason), agent.log.read_text()
        assert "registers.txt" in record.files
        check_clean(agent)


def test_dump_that_the_disk_does_not_take_is_not_there_at_all(tmp_path, idle):
    agent = agent_of(tmp_path, idle, settings={"format": "elf"})
    with agent.running():
        agent.wait_connected()
        # What a file system says that is full, for files above 64 KiB only.
        subprocess.run(["prlimit", f"--pid={agent.pid}", "--fsize=65536"], check=True)
        trigger(agent)
        (record,) = agent.wait_records()
        assert record.dump.file is None
        assert "File too large" in str(record.dump.reason)
        assert not any("vmcore" in name for name in record.files)
        assert guest_status(idle) == "running"
        check_clean(agent)


def test_full_disk_is_waited_for(tmp_path, panicking):
    """Not even the record can be written; the guest stays as QEMU left it, until there is room."""
    store = tmp_path / "store"
    store.mkdir(mode=0o700)
    agent = agent_of(tmp_path, panicking, retry_interval="200ms")
    script = (
        f"mount -t tmpfs -o size=256k,mode=700 none {store} && "
        f"exec {sys.executable} -c 'from qemu_dump_ext.entry import qemu_crash_collector as r; r()'"
        f" run --config {agent.config}"
    )
    argv = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    with agent.log.open("wb") as log:
        process = subprocess.Popen([*argv, "sh", "-c", script], stderr=log)
    try:
        inside = Path(f"/proc/{process.pid}/root{store}")
        agent.store = CrashStore(inside)
        agent.wait_connected()
        (inside / "ballast").write_bytes(bytes(240 << 10))
        cont(panicking)
        agent.wait_logged("tried again later")
        assert agent.records() == []
        assert guest_status(panicking) == "guest-panicked"
        (inside / "ballast").unlink()
        agent.wait_records()
    finally:
        process.kill()
        process.wait()


def test_clock_that_is_set_back_loses_nothing(tmp_path, idle):
    text = json.dumps(
        {
            "store": str(tmp_path / "store"),
            "limits": {"age": "1d"},
            "guests": [{"socket": str(idle.qmp_sockets[0]), "name": "box"}],
        }
    )
    configuration = parse_configuration(text, "test")
    moments = [datetime(2030, 1, 1, tzinfo=UTC)]
    store = CrashStore(tmp_path / "store")

    def is_connected(agent: Agent) -> bool:
        return "box" in agent._watched and agent._watched["box"].session.contact is not None

    async def crash(agent: Agent, count: int) -> None:
        await asyncio.to_thread(wait_until, lambda: is_connected(agent), "connected")
        await agent._watched["box"].trigger("")
        assert len(list(store.records())) == count

    async def run() -> None:
        agent = Agent(configuration, lambda: configuration, now=lambda: moments[-1])
        serving = asyncio.create_task(agent.run())
        await crash(agent, 1)
        moments.append(moments[0] - timedelta(days=3650))
        await crash(agent, 2)
        agent._stop.set()
        await serving

    asyncio.run(run())
    records = sorted(store.records(), key=lambda record: record.time)
    assert [record.moment.year for record in records] == [2020, 2030]
    (count,) = store.signatures().values()
    assert (count.count, count.first_seen) == (2, records[0].time)


def test_storm_of_all_guests_ends_with_everything_recorded(tmp_path):
    guests = 10
    with ExitStack() as stack:
        machines = []
        for number in range(guests):
            place = tmp_path / f"vm{number}.qmp"
            machine = bare_machine(tmp_path, "panic", qmp_socket=place)
            machines.append(stack.enter_context(machine))
        agent = CrashAgent(tmp_path, guests=[{"glob": str(tmp_path / "*.qmp")}], concurrent_dumps=2)
        with agent.running():
            agent.wait_connected(guests)
            for machine in machines:
                cont(machine)
            records = agent.wait_records(guests)
            assert {record.guest for record in records} == {f"vm{n}" for n in range(guests)}
            # Without frames, one guest's panic says nothing of another's: each keeps its dump.
            assert all(record.dump.file is not None for record in records)
            assert {record.occurrence for record in records} == set(range(1, guests + 1))
            check_clean(agent)
            assert {guest_status(machine) for machine in machines} == {"guest-panicked"}
