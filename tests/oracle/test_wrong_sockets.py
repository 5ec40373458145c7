"""A socket of another kind than the one that is asked for: told what it is, and left as it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import qemu_dump_ext as qd
from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.support.crash_agent import CrashAgent
from tests.support.doors import run_cli, run_gdb, said_often
from tests.support.hmp_proxy import HmpSocket
from tests.support.newer_qemu import newer_qemu_command
from tests.support.raw_gdbstub import RawGdbstub
from tests.support.raw_qmp import RawQmp
from tests.support.relay import relay

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]


@dataclass(frozen=True)
class Machine:
    qemu: QemuMachine
    sockets: dict[str, Path]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A guest that runs, with a human monitor, and relays before each of its sockets."""
    folder = tmp_path_factory.mktemp("sockets")
    hmp = folder / "hmp"
    monitor = ["-monitor", f"unix:{hmp},server=on,wait=off", "-m", "16"]
    extra = ["-chardev", f"socket,id=more,path={folder}/serial,server=on,wait=off"]
    with QemuMachine(["qemu-system-x86_64"], [*monitor, *extra]) as qemu:
        known = {"qmp": qemu.qmp_sockets[0], "hmp": hmp, "gdb": qemu.gdb_socket}
        with (
            relay(folder / "far-qmp", known["qmp"]) as far_qmp,
            relay(folder / "far-hmp", hmp) as far_hmp,
            relay(folder / "far-gdb", qemu.gdb_socket) as far_gdb,
        ):
            far = {"far qmp": far_qmp, "far hmp": far_hmp, "far gdb": far_gdb}
            yield Machine(qemu, {**known, **far, "serial": folder / "serial"})


@contextmanager
def untouched(machine: Machine, *, never_stopped: bool = True) -> Iterator[None]:
    """The guest runs afterwards, ran all the time, and every socket serves its next client."""
    with RawQmp(machine.qemu.qmp_sockets[1]) as qmp:
        yield
        assert qmp.execute("query-status")["status"] == "running"
        assert not never_stopped or "STOP" not in [event["event"] for event in qmp.events]
    with RawQmp(machine.sockets["qmp"]), HmpSocket(machine.sockets["hmp"]):
        pass


def by_api(addresses: Sequence[Path]) -> list[str]:
    said = []
    for address in addresses:
        with pytest.raises(qd.SourceError) as caught, qd.connect(str(address)):
            pass
        said.append(str(caught.value))
    return said


QMP_DOORS: dict[str, Callable[[Sequence[Path]], list[str]]] = {
    "dump": lambda them: said_often(
        "qemu_dump_guest_memory", [("--qmp", one, os.devnull) for one in them]
    ),
    "info": lambda them: said_often("qemu_dump", [("info", "--qmp", one) for one in them]),
    "dmesg": lambda them: said_often("qemu_dump", [("dmesg", "--qmp", one) for one in them]),
    "proxy": lambda them: said_often("qemu_hmp_proxy", [("--qmp", one) for one in them]),
    "api": by_api,
}
WORDS = {
    "qmp": "this is QMP",
    "hmp": "this is the human monitor",
    "gdb": "this is a gdbstub",
    "serial": "this is a console or another device of the guest's",
}
HINTS = {"qmp": "use --qmp", "hmp": "use --hmp", "gdb": "use --gdb"}


def assert_told(said: str, address: Path, kind: str, wanted: str, right: Path | None) -> None:
    hint = HINTS.get(kind, f"its {wanted} is {right}")
    assert f"{address}: {WORDS[kind]}, not a {wanted} ({hint})" in said


@pytest.mark.parametrize("door", QMP_DOORS)
def test_no_qmp_socket(machine: Machine, door: str):
    kinds = ("hmp", "gdb", "serial")
    with untouched(machine):
        told = QMP_DOORS[door]([machine.sockets[kind] for kind in kinds])
    for kind, said in zip(kinds, told, strict=True):
        assert_told(said, machine.sockets[kind], kind, "QMP socket", machine.sockets["qmp"])


def test_no_qmp_socket_for_gdb(machine: Machine):
    kinds = ("hmp", "serial")  # at the stub is gdb itself
    words = [f"--qmp {machine.sockets[kind]} {os.devnull}" for kind in kinds]
    said = run_gdb(machine.qemu, [f"qemu-dump-guest-memory {one}" for one in words])
    with RawQmp(machine.sockets["qmp"]) as qmp:
        assert qmp.execute("query-status")["status"] == "paused"  # by gdb, which left it so
        qmp.execute("cont")
    told = [line for line in said.stderr.splitlines() if "QMP socket" in line]
    for kind, line in zip(kinds, told, strict=True):
        assert_told(line, machine.sockets[kind], kind, "QMP socket", machine.sockets["qmp"])


def test_what_is_asked_for_by_two(machine: Machine):
    """A wrong QMP socket is told before gdb connects."""
    with untouched(machine):
        done = run_cli("--gdb", machine.sockets["gdb"], "--qmp", machine.sockets["hmp"], os.devnull)
    assert_told(done.stderr, machine.sockets["hmp"], "hmp", "QMP socket", None)


@pytest.mark.parametrize("door", ["dump", "proxy"])
def test_no_qmp_socket_where_nothing_is_known(machine: Machine, door: str):
    kinds = ("far hmp", "far gdb")
    with untouched(machine, never_stopped=False):
        told = QMP_DOORS[door]([machine.sockets[kind] for kind in kinds])
    for kind, said in zip(kinds, told, strict=True):
        assert_told(said, machine.sockets[kind], kind[4:], "QMP socket", None)


def test_no_human_monitor(machine: Machine):
    for kinds, never_stopped in ((("qmp", "gdb"), True), (("far qmp", "far gdb"), False)):
        with untouched(machine, never_stopped=never_stopped):
            lines = [("--hmp", machine.sockets[kind]) for kind in kinds]
            told = said_often("qemu_hmp_proxy", lines)
        for kind, said in zip(kinds, told, strict=True):
            assert_told(said, machine.sockets[kind], kind[-3:], "monitor", None)


def test_no_gdbstub(machine: Machine):
    kinds = ("qmp", "hmp", "serial", "far qmp", "far hmp")
    with untouched(machine):
        lines = [("--gdb", machine.sockets[kind], os.devnull) for kind in kinds]
        told = said_often("qemu_dump_guest_memory", lines)
    for kind, said in zip(kinds, told, strict=True):
        word = kind.split()[-1]
        assert_told(said, machine.sockets[kind], word, "gdbstub", machine.sockets["gdb"])


def test_taken_by_somebody(machine: Machine):
    me = f"PID {os.getpid()} ("
    with RawQmp(machine.sockets["qmp"]):
        (said,) = QMP_DOORS["info"]([machine.sockets["qmp"]])
    assert f"is busy: held by {me}" in said
    with RawGdbstub(machine.sockets["gdb"]):
        said = run_cli("--gdb", machine.sockets["gdb"], os.devnull).stderr
        assert f"another debugger is connected to {machine.sockets['gdb']}: {me}" in said
        with RawQmp(machine.qemu.qmp_sockets[1]) as qmp:
            qmp.execute("cont")


def test_a_directory_of_sockets(machine: Machine, tmp_path: Path):
    folder = tmp_path / "sockets"
    folder.mkdir()
    for name in ("qmp", "hmp", "gdb", "serial", "far gdb"):
        (folder / name.replace(" ", "-")).symlink_to(machine.sockets[name])
    agent = CrashAgent(tmp_path, guests=[{"directory": str(folder)}])
    with untouched(machine, never_stopped=False), agent.running():
        agent.wait_connected()
        for kind in ("hmp", "gdb", "serial"):
            agent.wait_logged(f"{folder / kind}: {WORDS[kind]}")
        agent.wait_logged(f"{folder / 'far-gdb'}: {WORDS['gdb']}")
        (qmp,) = (guest for guest in agent.guests() or () if guest["connected"])
        assert qmp["address"] == str(folder / "qmp")


def test_a_guest_that_was_paused_before_stays_paused(tmp_path: Path):
    """Before 8.0, QEMU would have told of a stop; newer ones tell nothing: the guest runs on."""
    with (
        QemuMachine(["qemu-system-x86_64"], ["-m", "16"]) as qemu,
        relay(tmp_path / "far", qemu.gdb_socket) as far,
        RawQmp(qemu.qmp_sockets[0]) as qmp,
    ):
        qmp.execute("stop")
        qmp.wait_for_event("STOP")
        (said,) = by_api([far])
        tells = qmp.execute("query-version")["qemu"]["major"] < 8
        assert qmp.execute("query-status")["status"] == ("paused" if tells else "running")
        assert ("RESUME" in [event["event"] for event in qmp.events]) is not tells
    assert_told(said, far, "gdb", "QMP socket", None)


def test_a_newer_gdbstub_that_nothing_is_known_of(tmp_path: Path):
    """It says nothing by itself: what it is shows when it is asked, and the guest runs on."""
    with (
        QemuMachine(newer_qemu_command(), ["-m", "16"]) as qemu,
        relay(tmp_path / "far", qemu.gdb_socket) as far,
    ):
        (said,) = by_api([far])
        with RawQmp(qemu.qmp_sockets[0]) as qmp:
            assert qmp.execute("query-status")["status"] == "running"
    assert_told(said, far, "gdb", "QMP socket", None)
