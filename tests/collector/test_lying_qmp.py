"""A QMP peer that lies costs an answer: never the crash, the watch or the guest."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from qemu_dump_ext.crash_collector.agent.control_socket import ask_agent
from qemu_dump_ext.crash_collector.agent.journal import replay
from qemu_dump_ext.crash_collector.collect_now import collect_crash
from qemu_dump_ext.crash_collector.record import CrashRecord, parse_record
from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.support.bare_crashes import bare_machine
from tests.support.crash_agent import CrashAgent
from tests.support.doors import guest_status
from tests.support.lying_qmp import DEEP, WRONG_KINDS, LyingQmp
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu

REPLIES = {
    "neither": b'{"id": "@ID@"}\n',
    "error null": b'{"error": null, "id": "@ID@"}\n',
    "no id": b'{"return": {}}\n',
    "list for id": b'{"return": {}, "id": []}\n',
    "no JSON": b'{"return": nonsense, "id": "@ID@"}\n',
    "list": b"[1]\n",
    "deep error": b'{"error": {"class": %s, "desc": ""}, "id": "@ID@"}\n' % DEEP,
    "deep event first": b'{"event": %s}\n{"return": {}, "id": "@ID@"}\n' % DEEP,
    "odd events first": b'{"event": []}\n{"event": null, "data": 7}\n'
    b'{"event": "SHUTDOWN", "data": []}\n{"return": {}, "id": "@ID@"}\n',
    "5000 digits": b'{"return": %s, "id": "@ID@"}\n' % (b"9" * 5000),
    "lone surrogate": b'{"error": {"class": "G", "desc": "\\ud800"}, "id": "@ID@"}\n',
}


@contextmanager
def lying_about(directory: Path) -> Iterator[tuple[QemuMachine, LyingQmp]]:
    """A guest that runs, and a peer that lies of it."""
    with bare_machine(directory, "halt") as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("cont")
        with LyingQmp(machine.qmp_sockets[0], directory / "qmp").running() as peer:
            yield machine, peer


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[CrashAgent, LyingQmp, QemuMachine]]:
    """One agent for all tests after which the next crash is collected."""
    directory = tmp_path_factory.mktemp("watched")
    with lying_about(directory) as (machine, peer):
        agent = agent_of(directory, peer)
        with agent.running():
            yield agent, peer, machine


def agent_of(directory: Path, liar: LyingQmp, **settings: Any) -> CrashAgent:
    guest: dict[str, Any] = {
        "socket": str(liar.path),
        "name": "box",
        "memory": "pmemsave",
        "rate": {"dumps": 999},
    }
    guest |= {"dumps_per_signature": 999, **settings}
    return CrashAgent(directory, guests=[guest], answer_timeout="20s")


def trigger(agent: CrashAgent, guest: str = "box") -> CrashRecord:
    """Have a crash collected; returns what is stored."""
    control = agent.store.path / ".control"
    before = len(agent.store.directories())
    answer = ask_agent(control, {"command": "trigger", "guest": guest})
    assert len(agent.store.directories()) == before + 1
    return agent.store.record(answer["id"])


def check_next_crash(agent: CrashAgent, liar: LyingQmp, machine: QemuMachine) -> None:
    """The guest runs, and its next crash is collected, too."""
    wait_until(lambda: guest_status(machine) == "running", "the guest runs")
    liar.lies, liar.replies = {}, {}
    agent.wait_connected()
    assert trigger(agent).dump.complete
    wait_until(lambda: guest_status(machine) == "running", "the guest runs")
    assert "exception" not in agent.log.read_text()


@pytest.mark.parametrize(
    "command",
    ["query-status", "query-target", "query-commands", "set-action", "stop", "info mtree -f"],
)
def test_answer_of_the_wrong_kind_costs_that_question_alone(watched, command):
    agent, liar, machine = watched
    is_used = command not in {"set-action", "stop"}  # or else only that it came counts
    for kind in WRONG_KINDS if is_used else ("null", "deep"):
        agent.wait_connected()
        liar.lies, liar.told = {command: WRONG_KINDS[kind]}, {}
        connections = liar.connections
        liar.hang_up()
        wait_until(lambda: liar.connections > connections, "a new connection")  # noqa: B023
        agent.wait_connected()
        record = trigger(agent)
        assert liar.told[command] > 0, kind
        if command == "info mtree -f":
            assert record.dump.file is None
            assert "mtree" in str(record.dump.reason)
        if command == "query-commands":
            assert any(text.startswith("queries: ") for text in record.remarks), kind
        if command == "query-target":
            assert record.qemu.target == "unknown"
        wait_until(lambda: guest_status(machine) == "running", "the guest runs")
    check_next_crash(agent, liar, machine)


def test_guest_is_ready_once_qemu_was_told_to_keep_it_on_a_panic(watched):
    agent, liar, _ = watched
    agent.wait_connected()
    liar.held = "set-action"
    liar.hang_up()

    def known() -> list[tuple[bool, bool]]:
        return [(guest["connected"], guest["ready"]) for guest in agent.guests() or ()]

    wait_until(lambda: known() == [(True, False)], "connected, but not ready")
    liar.held = ""
    agent.wait_connected()


def test_reply_that_is_none_costs_that_question_alone(watched):
    agent, liar, machine = watched
    agent.wait_connected()
    for kind, reply in REPLIES.items():
        liar.replies, liar.told = {"query-commands": reply, "stop": reply}, {}
        trigger(agent)
        assert liar.told["stop"] > 0, kind
        wait_until(lambda: guest_status(machine) == "running", kind)
        assert (agent.guests() or [])[0]["connected"], kind
    check_next_crash(agent, liar, machine)


def test_guest_is_let_run_by_a_new_connection_where_the_one_that_stopped_it_is_lost(watched):
    agent, liar, machine = watched
    journal = agent.store.path / ".journal"
    for command in ("stop", "query-commands", "info mtree -f", "cont"):
        agent.wait_connected()
        liar.replies = {command: b""}
        trigger(agent)
        liar.replies = {}
        check_next_crash(agent, liar, machine)
        wait_until(lambda: not replay(journal.read_bytes().splitlines()), "nothing owed")


@pytest.mark.parametrize(
    ("lies", "replies"),
    [
        (dict.fromkeys(("query-status", "query-version"), WRONG_KINDS["wrong members"]), {}),
        ({"query-commands": DEEP, "info registers -a": b"{}"}, {}),
        ({}, {"stop": b""}),
        ({}, {"query-commands": b""}),
    ],
    ids=["kinds", "deep", "lost at stop", "lost later"],
)
def test_crash_collected_once_is_stored_and_the_guest_runs(tmp_path, lies, replies):
    with lying_about(tmp_path) as (machine, liar):
        liar.lies, liar.replies = lies, replies
        directory = collect_crash(liar.path, tmp_path / "store", name="box")
        record = parse_record((directory / "crash.json").read_bytes())
        assert record.cause.kind == "trigger"
        assert guest_status(machine) == "running"


def test_guests_whose_qemu_is_slow_keep_no_other_out_and_run_again_in_time(tmp_path):
    """Each answer comes in time, and all of them together would take minutes."""
    with ExitStack() as stack:
        machines, peers = [], []
        for name in ("slow1", "slow2", "fast"):
            machine = stack.enter_context(bare_machine(tmp_path, "halt"))
            with RawQmp(machine.qmp_sockets[1]) as qmp:
                qmp.execute("cont")
            peer = LyingQmp(machine.qmp_sockets[0], tmp_path / f"{name}.qmp")
            peers.append(stack.enter_context(peer.running()))
            machines.append(machine)
        agent = CrashAgent(
            tmp_path,
            guests=[{"glob": str(tmp_path / "*.qmp"), "memory": "pmemsave"}],
            concurrent_dumps=2,
            answer_timeout="5s",
            collection_timeout="20s",
        )
        with agent.running():
            agent.wait_connected(3)
            for peer in peers[:2]:
                peer.delay = 0.6
                begin(agent, peer.path.stem)
            wait_until(lambda: all(guest_status(m) == "paused" for m in machines[:2]), "stopped")
            assert trigger(agent, "fast").dump.complete
            assert [record.guest for record in agent.records()] == ["fast"]
            records = agent.wait_records(3)
            for record in records[:2]:
                assert record.dump.file is None
                assert record.dump.reason
                assert "registers.txt" in record.files
            for machine in machines:
                wait_until(lambda: guest_status(machine) == "running", "it runs")  # noqa: B023


def begin(agent: CrashAgent, guest: str) -> None:
    """Have a crash collected; nobody waits for it."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(agent.store.path / ".control"))
        connection.sendall(b'{"command": "trigger", "guest": "%s"}\n' % guest.encode())


def test_guest_that_crashed_while_query_status_lied_is_collected_later(tmp_path):
    with bare_machine(tmp_path, "panic", "-action", "panic=pause") as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("cont")
            qmp.wait_for_event("GUEST_PANICKED")
        peer = LyingQmp(machine.qmp_sockets[0], tmp_path / "qmp")
        peer.lies = {"query-status": b"null"}
        agent = agent_of(tmp_path, peer)
        with peer.running(), agent.running():
            agent.wait_logged("query-status': the answer makes no sense: it is null")
            assert not agent.records()
            peer.lies = {}
            (record,) = agent.wait_records()
            assert record.cause.kind == "guest-panicked"


def test_heartbeat_goes_on_behind_answers_of_the_wrong_kind(tmp_path):
    heartbeat = {"by": "program-counters", "interval": "50ms", "after": "500ms"}
    with bare_machine(tmp_path, "halt") as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("cont")
        peer = LyingQmp(machine.qmp_sockets[0], tmp_path / "qmp")
        agent = agent_of(tmp_path, peer, heartbeat=heartbeat)
        with peer.running(), agent.running():
            agent.wait_connected()
            for lie in WRONG_KINDS.values():
                peer.lies, peer.told = {"query-status": lie, "info registers -a": lie}, {}
                wait_until(lambda: peer.told.get("query-status"), "asked")
            peer.lies = {}
            (record,) = agent.wait_records()
            assert record.cause.kind == "no-progress"
