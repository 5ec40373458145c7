"""A guest that stands still is asked once what it is, however much is done with it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import qemu_dump_ext
from qemu_dump_ext.crash_collector.collect_now import collect_crash
from qemu_dump_ext.engine.dmesg import read_log
from qemu_dump_ext.engine.dump import dump, dump_stopped
from qemu_dump_ext.engine.info import describe
from qemu_dump_ext.engine.stopped_guest import StoppedGuest, stopped_guest
from qemu_dump_ext.errors import MonitorAnswerError, PauseLimitError, RequestError, SourceError
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.qemu import socket_kind
from qemu_dump_ext.qemu.qmp import QmpQuestion, SharedQmp, connect_qmp
from qemu_dump_ext.sinks import open_sink
from tests.support.doors import guest_status
from tests.support.raw_qmp import RawQmp

pytestmark = pytest.mark.qemu

# Each is one walk of the object tree, or one answer that grows with the guest.
ASKED_ONCE = ("info version", "info mtree -f", "qom-list /", "info kvm")
# May become less.
QUESTIONS_OF_A_DUMP = 42
QUESTIONS_OF_ALL = 68
QUESTIONS_OF_A_CRASH = 60
# The first question of each round: what can be asked before the stop, or at once with another, is.
ASKED_IN_A_PAUSE = (
    *("stop", "query-status", "info mtree -f", "info registers -a"),
    *("info status", "query-status"),
)
# What is asked to read memory depends on what may be read.
OF_MEMORY = ("xp", "gpa2hva", "getfd", "dump-guest-memory", "closefd", "pmemsave")


@pytest.fixture(scope="module")
def machine() -> Iterator[QemuMachine]:
    with stopped_machine(["qemu-system-x86_64"], ["-M", "q35", "-m", "256"]) as started:
        yield started


@pytest.fixture
def asked(monkeypatch) -> Counter[str]:
    """What QEMU is asked, and how often."""
    counted: Counter[str] = Counter()
    begin_all = SharedQmp._begin_all

    def counting(self, questions):
        counted.update(one.told for one in questions)
        return begin_all(self, questions)

    monkeypatch.setattr(SharedQmp, "_begin_all", counting)
    return counted


def to_file(path: Path):
    return open_sink(str(path), force=False, standard_output=None)


def test_log_description_and_dump_ask_once(machine, asked, tmp_path):
    quiet = ProgressMeter(None)
    with connect_qmp(str(machine.qmp_sockets[0])) as monitor:
        with to_file(tmp_path / "alone") as sink:
            dump(DumpRequest(), GuestAccess.by_qmp(monitor), sink, memory="auto", progress=quiet)
        alone = asked.total()
        asked.clear()
        with stopped_guest(GuestAccess.by_qmp(monitor), "auto") as guest:
            with pytest.raises(SourceError, match="VMCOREINFO was not found"):
                read_log(guest)
            described = describe(guest)
            with to_file(tmp_path / "same") as sink:
                dump_stopped(DumpRequest(), guest, sink, progress=quiet)
    assert described.memory_sources
    assert (tmp_path / "same").read_bytes() == (tmp_path / "alone").read_bytes()
    assert {question: asked[question] for question in ASKED_ONCE} == dict.fromkeys(ASKED_ONCE, 1)
    assert alone <= QUESTIONS_OF_A_DUMP
    assert asked.total() <= QUESTIONS_OF_ALL


def test_a_crash_asks_once(machine, asked, tmp_path):
    collect_crash(machine.qmp_sockets[0], tmp_path / "store")
    once = {question: asked[question] for question in ASKED_ONCE}
    assert once == dict.fromkeys(ASKED_ONCE, 1)
    # What is stored of QEMU's answers is another thing, and depends on QEMU.
    others = [question for question in asked.elements() if not question.startswith("query-")]
    assert len(others) <= QUESTIONS_OF_A_CRASH


def test_each_use_of_a_connection_asks_anew(machine, asked):
    with qemu_dump_ext.connect(str(machine.qmp_sockets[0])) as guest:
        guest.info()
        guest.info()
    assert {question: asked[question] for question in ASKED_ONCE} == dict.fromkeys(ASKED_ONCE, 2)


def test_a_refusal_is_of_its_own_question_alone(machine):
    commands = ("query-status", "query-nothing", "query-kvm")
    with connect_qmp(str(machine.qmp_sockets[0])) as monitor:
        first, second, third = monitor._begin_all(
            [QmpQuestion(command, None, f"asked {command}") for command in commands]
        )
        with pytest.raises(MonitorAnswerError, match="asked query-nothing"):
            second()
        assert first()["running"] is False
        assert third()["present"] is not None


@pytest.fixture
def running(machine) -> Iterator[QemuMachine]:
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute("cont")
    yield machine
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute("stop")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_guest_runs_again_whatever_happens(running, error):
    def fail_on(guest: StoppedGuest) -> None:
        assert guest.memory.name
        assert guest_status(running) == "paused"
        raise error

    with connect_qmp(str(running.qmp_sockets[0])) as monitor:
        with pytest.raises(error), stopped_guest(GuestAccess.by_qmp(monitor), "auto") as guest:
            fail_on(guest)
        assert guest_status(running) == "running"


@pytest.fixture
def still(machine) -> Iterator[StoppedGuest]:
    with (
        connect_qmp(str(machine.qmp_sockets[0])) as monitor,
        stopped_guest(GuestAccess.by_qmp(monitor), "auto") as guest,
    ):
        yield guest


def test_the_pause_counts_from_the_stop(still, tmp_path):
    still.pause.started -= 60.0
    with pytest.raises(PauseLimitError), to_file(tmp_path / "late") as sink:
        dump_stopped(DumpRequest(max_pause=60.0), still, sink, progress=ProgressMeter(None))
    assert not list(tmp_path.iterdir())


def test_a_guest_that_stays_stopped_needs_no_snapshot(still, tmp_path):
    with pytest.raises(RequestError, match="snapshot"), to_file(tmp_path / "x") as sink:
        dump_stopped(DumpRequest(snapshot=True), still, sink, progress=ProgressMeter(None))


_WHICH = "sys.argv[1], sys.argv[2]"
WATCHED = """
import contextlib, sys, threading
from pathlib import Path
from qemu_dump_ext.{module} import {use}
from qemu_dump_ext.qemu import qmp

modules, started, rounds = {{}}, [], []

def note(command):
    if command in ("stop", "cont"):
        modules[command] = set(sys.modules)
    looks_out = threading.current_thread().name == "pause"
    is_of_memory = command.partition(" ")[0] in {of_memory}
    if "stop" in modules and "cont" not in modules and not looks_out and not is_of_memory:
        rounds.append(command)

def note_process(event, arguments):
    if event == "subprocess.Popen" and "stop" in modules and "cont" not in modules:
        started.append(arguments[0])

sys.addaudithook(note_process)

begin_all = qmp.SharedQmp._begin_all

def noting(self, questions):
    note(questions[0].told)
    return begin_all(self, questions)

qmp.SharedQmp._begin_all = noting
{statement}
print(*sorted(modules["cont"] - modules["stop"]))
print(len(started))
print(*rounds, sep=", ")
"""


def watched(machine: QemuMachine, path: Path, module: str, use: str, statement: str) -> list[str]:
    words = {"module": module, "use": use, "statement": statement, "of_memory": OF_MEMORY}
    script = WATCHED.format(**words)
    argv: list[str | Path] = [sys.executable, "-c", script, machine.qmp_sockets[0], path]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize(
    ("module", "use", "arguments", "decides_late"),
    [
        ("cli.dump_command", "main", f"['-z', '--threads', '2', '--qmp', {_WHICH}]", False),
        ("api.guests", "dump", f"{_WHICH}, format='kdump-zlib'", False),
        # Whether there is a dump, and which, depends on what is found.
        ("crash_collector.collect_now", "collect_crash", _WHICH, True),
    ],
    ids=["command line", "API", "crash collector"],
)
def test_nothing_is_imported_or_started_while_the_guest_stands_still(
    running, tmp_path, module, use, arguments, decides_late
):
    imported, started, rounds = watched(
        running, tmp_path / "new", module, use, f"{use}({arguments})"
    )
    assert not imported
    assert int(started) == 0 or decides_late
    assert rounds == ", ".join(ASKED_IN_A_PAUSE) or decides_late


def test_any_format_may_be_asked_for_while_the_guest_stands_still(running, tmp_path):
    statement = (
        "with connect(sys.argv[1]) as guest, guest.stopped() as still:"
        " still.dump(sys.argv[2], format='kdump-zlib')"
    )
    imported, *_ = watched(running, tmp_path / "new", "api.guests", "connect", statement)
    # Packages of others are imported for who asks for their codec.
    assert not [name for name in imported.split() if name.startswith(qemu_dump_ext.__name__)]


def test_other_qemus_of_the_host_are_not_looked_at(machine, monkeypatch):
    looked_at = []
    ways_of = vars(socket_kind)["ways_of"]

    def noting(process, tables):
        looked_at.append(process.pid)
        return ways_of(process, tables)

    monkeypatch.setattr(socket_kind, "ways_of", noting)
    with stopped_machine(["qemu-system-x86_64"], ["-m", "16"]) as other:
        for wanted in (machine, other):
            found = socket_kind.find_way(str(wanted.qmp_sockets[0]))
            assert found is not None
            assert [found[0].pid] == looked_at == [wanted.pid]
            looked_at.clear()
