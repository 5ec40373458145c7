"""Where only a gdbstub tells registers and QEMU has none, it opens one, and closes it again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import qemu_dump_ext as qd
from tests.support.doors import child_environment, run_cli
from tests.support.newer_qemu import newer_qemu_command
from tests.support.raw_gdbstub import RawGdbstub
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu]
_BEFORE = 25
"""Registers of 4 bytes before fr0 in the stub's `g` packet: QEMU target/sh4/gdbstub.c."""

# Opens a stub, says so, and is killed.
_OPENS = """
import sys, time
from qemu_dump_ext.connections.target import GuestTarget, open_guest
from qemu_dump_ext.qemu.gdbstub import stub_on_demand
from qemu_dump_ext.qemu.process import find_qemu_process
with open_guest(GuestTarget(**{sys.argv[1]: sys.argv[2]})) as access:
    with stub_on_demand(access, find_qemu_process(access.addresses)) as stub:
        assert list(stub.vcpus()) == [0], stub
        print("open", flush=True)
        sys.stdin.read()
"""


class Guest:
    """A QEMU without a gdbstub, whose floating point registers only a stub tells."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        self.folder = folder
        words = [*command, "-M", "r2d", "-S", "-display", "none", "-nodefaults", "-serial", "null"]
        # By which the byte order is known, where the monitor does not tell it.
        words += ["-device", "loader,addr=0xc000000,data=0x12345678,data-len=4"]
        for name in ("qmp", "qmp2"):
            words += ["-qmp", f"unix:{folder}/{name},server=on,wait=off"]
        words += ["-monitor", f"unix:{folder}/hmp,server=on,wait=off"]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL)

    def path(self, name: str) -> Path:
        return self.folder / name

    def monitor(self, command: str) -> str:
        with RawQmp(self.path("qmp2")) as qmp:
            words = {"command-line": command}
            return str(qmp.execute("human-monitor-command", **words))

    def stubs(self) -> list[str]:
        """Return the lines of the chardevs that a gdbstub has."""
        lines = self.monitor("info chardev").splitlines()
        return [line for line in lines if line.startswith("gdb:")]

    @contextmanager
    def own_stub(self) -> Iterator[Path]:
        path = self.path("own")
        self.monitor(f"gdbserver unix:{path},server=on,wait=off")
        try:
            yield path
        finally:
            self.monitor("gdbserver none")


@pytest.fixture(scope="module", params=["own", "newer"])
def guest(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    command = ["qemu-system-sh4"]
    if request.param == "newer":
        command = newer_qemu_command("sh4", "qemu-system-misc")
    guest = Guest(tmp_path_factory.mktemp("guest"), command)
    try:
        sockets = [guest.path(name) for name in ("qmp", "qmp2", "hmp")]
        wait_until(lambda: all(path.is_socket() for path in sockets), "it listens")
        wait_until(lambda: guest.monitor("info status"), "it answers")
        with guest.own_stub() as path, RawGdbstub(path) as stub:
            letters = stub.packet("g")
            first, behind = 8 * _BEFORE, 8 * (_BEFORE + 16)
            planted = bytes(range(1, 65)).hex()
            assert stub.packet(f"G{letters[:first]}{planted}{letters[behind:]}") == "OK"
        yield guest
    finally:
        guest.process.kill()
        guest.process.wait()


def floating_point(guest: Guest) -> dict[str, int]:
    """Return fr0 to fr15 as an independent client reads them."""
    with guest.own_stub() as path, RawGdbstub(path) as stub:
        values = bytes.fromhex(stub.packet("g"))[4 * _BEFORE :]
    return {
        f"fr{index}": int.from_bytes(values[4 * index : 4 * index + 4], "little")
        for index in range(16)
    }


@pytest.mark.parametrize(("option", "socket"), [("--hmp", "hmp"), ("--qmp", "qmp")])
def test_registers_come_from_a_stub_that_is_closed_again(
    guest: Guest, tmp_path: Path, option: str, socket: str
):
    status = guest.monitor("info status")
    done = run_cli(option, guest.path(socket), tmp_path / "dump")
    assert (done.returncode, "fr0" in done.stderr) == (6, False), done.stderr
    (vcpu,) = qd.open_dump(tmp_path / "dump").vcpus
    expected = floating_point(guest)
    assert {name: vcpu.registers[name] for name in expected} == expected
    assert any(expected.values())
    assert (guest.stubs(), guest.monitor("info status")) == ([], status)


def test_a_stub_that_is_there_is_left_alone(guest: Guest, tmp_path: Path):
    with guest.own_stub() as path:
        before = guest.stubs()
        done = run_cli("--hmp", guest.path("hmp"), tmp_path / "dump")
        assert (done.returncode, "fr0" in done.stderr) == (6, True), done.stderr
        assert guest.stubs() == before
        with RawGdbstub(path) as stub:
            assert stub.packet("qfThreadInfo").startswith("m")


@pytest.mark.parametrize("kind", ["hmp", "qmp"])
def test_a_stub_of_one_who_was_killed_is_closed(guest: Guest, kind: str):
    status = guest.monitor("info status")
    opener = subprocess.Popen(
        [sys.executable, "-c", _OPENS, kind, str(guest.path(kind))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
    )
    with opener:
        assert opener.stdout is not None
        assert opener.stdout.readline() == "open\n"
        assert len(guest.stubs()) == 1
        opener.kill()
    wait_until(lambda: not guest.stubs(), "its guardian has closed it")
    assert guest.monitor("info status") == status


def test_a_guest_that_ran_runs_again(guest: Guest, tmp_path: Path):
    guest.monitor("cont")
    try:
        done = run_cli("--hmp", guest.path("hmp"), tmp_path / "dump")
        assert "fr0" not in done.stderr, done.stderr
        assert (guest.stubs(), "running" in guest.monitor("info status")) == ([], True)
    finally:
        guest.monitor("stop")
