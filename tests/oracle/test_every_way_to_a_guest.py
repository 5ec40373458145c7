"""Every door builds its access to a guest in one place: each knows what any of them knows.

Two facts that a door can only have from that place: QEMU's name of the target, without which a
guest of a target with two byte orders and empty memory is not recognized; and what an address
means.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_dump_ext.cli import main as qemu_dump
from qemu_dump_ext.crash_collector.collect_now import collect_crash
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from tests.support.crash_agent import CrashAgent, run_collector
from tests.support.doors import REPOSITORY, guest_status, run_cli, run_gdb
from tests.support.hmp_proxy import monitor_arguments, run_proxy
from tests.support.newer_qemu import newer_qemu_command
from tests.support.raw_qmp import RawQmp

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]
_SH4 = "set architecture sh4"
Door = Callable[[QemuMachine, str, Path], None]


def _command_line(_machine: QemuMachine, qmp: str, target: Path) -> None:
    done = run_cli("--qmp", qmp, target)
    assert done.returncode in {0, 6}, done.stderr


def _gdb_of_its_own(machine: QemuMachine, qmp: str, target: Path) -> None:
    done = run_cli("--gdb", machine.gdb_socket, "--qmp", qmp, target)
    assert done.returncode in {0, 6}, done.stderr


def _gdb_with_qmp(machine: QemuMachine, qmp: str, target: Path) -> None:
    _in_gdb(machine, f"qemu-dump-guest-memory --qmp {qmp} {target}")


def _gdb(machine: QemuMachine, _qmp: str, target: Path) -> None:
    _in_gdb(machine, f"qemu-dump-guest-memory {target}")


def _in_gdb(machine: QemuMachine, command: str) -> None:
    before = [_SH4] if "sh4" in machine.argv[0] else []
    words = [command, "print $_qemu_dump_status"]
    done = run_gdb(machine, words, "gdb-multiarch", before=before)
    assert "$1 = 0\n" in done.stdout or "$1 = 6\n" in done.stdout, done.stdout + done.stderr


def _proxy_by_qmp(_machine: QemuMachine, qmp: str, target: Path) -> None:
    _by_proxy("--qmp", qmp, target)


def _by_proxy(option: str, address: str, target: Path) -> None:
    done = run_proxy(option, address, text=f"dump-guest-memory {target}\n")
    assert (done.returncode, "Error" in done.stdout) == (0, False), done.stdout + done.stderr


def _collector(_machine: QemuMachine, qmp: str, target: Path) -> None:
    guest = {"socket": qmp, "name": "guest", "format": "elf"}
    with CrashAgent(target.parent, guests=[guest]).running() as agent:
        agent.wait_connected()
        done = run_collector("trigger", "--config", agent.config, "guest")
        assert done.returncode == 0, done.stdout + done.stderr + agent.log.read_text()
        [record] = agent.records()
        assert record.dump.file is not None, record
        (agent.store.directory(record.id) / record.dump.file).rename(target)


def _collect_crash(_machine: QemuMachine, qmp: str, target: Path) -> None:
    crash = collect_crash(qmp, target.parent / "crashes", name="guest", dump_format="elf")
    (crash / "vmcore.elf").rename(target)


DOORS_BY_QMP: dict[str, Door] = {
    "command-line": _command_line,
    "gdb-of-its-own": _gdb_of_its_own,
    "gdb-with-qmp": _gdb_with_qmp,
    "proxy": _proxy_by_qmp,
    "collector": _collector,
    "collect_crash": _collect_crash,
}


@pytest.fixture(scope="module")
def sh4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuMachine]:
    """A guest whose registers and memory do not tell the byte order, with a human monitor."""
    monitor = tmp_path_factory.mktemp("sh4") / "monitor"
    with stopped_machine(
        ["qemu-system-sh4"], ["-M", "r2d", *monitor_arguments(monitor)]
    ) as machine:
        yield machine


def _assert_sh4(target: Path) -> None:
    with open_dump(target) as dump:
        assert (dump.byte_order, dump.header["e_machine"]) == ("little", 42)


@pytest.mark.parametrize("door", DOORS_BY_QMP)
def test_every_door_by_qmp_knows_the_target(sh4: QemuMachine, tmp_path: Path, door: str):
    DOORS_BY_QMP[door](sh4, str(sh4.qmp_sockets[0]), tmp_path / "dump")
    _assert_sh4(tmp_path / "dump")
    assert guest_status(sh4) == "prelaunch"


@pytest.mark.parametrize("target", ["sh4", "sh4eb"])
def test_a_newer_qemu_that_has_one_name_for_both_byte_orders(tmp_path: Path, target: str):
    """Its program tells."""
    command = newer_qemu_command(target, "qemu-system-misc")
    with stopped_machine(command, ["-M", "r2d"]) as machine:
        _command_line(machine, str(machine.qmp_sockets[0]), tmp_path / "dump")
    with open_dump(tmp_path / "dump") as dump:
        assert dump.byte_order == ("big" if target.endswith("eb") else "little")


def test_a_proxy_at_the_human_monitor_knows_the_target(sh4: QemuMachine, tmp_path: Path):
    monitor = next(word for word in sh4.argv if "id=monitor" in word)
    path = monitor.partition("path=")[2].partition(",")[0]
    _by_proxy("--hmp", path, tmp_path / "dump")
    _assert_sh4(tmp_path / "dump")


def test_gdb_without_qmp_knows_the_target(sh4: QemuMachine, tmp_path: Path):
    _gdb(sh4, "", tmp_path / "dump")
    _assert_sh4(tmp_path / "dump")


@pytest.mark.parametrize("option", ["info", "dmesg"])
def test_what_only_looks_at_a_guest_knows_the_target(
    sh4: QemuMachine, capsys: pytest.CaptureFixture[str], option: str
):
    qemu_dump([option, "--qmp", str(sh4.qmp_sockets[0])])
    told = capsys.readouterr()
    assert "do not tell which target" not in told.err
    assert ("sh4" in told.out) == (option == "info")


@pytest.fixture(scope="module")
def on_ipv6() -> Iterator[QemuMachine]:
    """A guest with two QMP sockets and a human monitor at ports of IPv6."""
    channels: list[str] = []
    for kind in ("control", "control", "readline"):
        name = f"tcp{len(channels)}"
        channels += ["-chardev", f"socket,id={name},host=::1,port=0,server=on,wait=off"]
        channels += ["-mon", f"chardev={name},mode={kind}"]
    with stopped_machine(["qemu-system-x86_64"], ["-m", "16", *channels]) as machine:
        yield machine


def _addresses(machine: QemuMachine) -> list[str]:
    """Return them in the order of the command line."""
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        found = {entry["label"]: entry["filename"] for entry in qmp.execute("query-chardev")}
    names = sorted(name for name in found if name.startswith("tcp"))
    ports = [re.search(r"::1\D*?:(\d+),server", found[name]) for name in names]
    return [f"[::1]:{port[1]}" for port in ports if port is not None]


@pytest.mark.parametrize("door", DOORS_BY_QMP)
def test_every_door_takes_an_address_of_ipv6(on_ipv6: QemuMachine, tmp_path: Path, door: str):
    DOORS_BY_QMP[door](on_ipv6, _addresses(on_ipv6)[0], tmp_path / "dump")
    with open_dump(tmp_path / "dump") as dump:
        assert sum(size for _, size in dump.memory_ranges()) >= 16 << 20


def test_a_proxy_takes_a_human_monitor_at_ipv6(on_ipv6: QemuMachine, tmp_path: Path):
    _by_proxy("--hmp", _addresses(on_ipv6)[2], tmp_path / "dump")
    assert (tmp_path / "dump").stat().st_size > 16 << 20


@pytest.mark.parametrize("option", ["info"])
def test_what_only_looks_at_a_guest_takes_an_address_of_ipv6(
    on_ipv6: QemuMachine, capsys: pytest.CaptureFixture[str], option: str
):
    assert qemu_dump([option, "--qmp", _addresses(on_ipv6)[0]]) == 0
    assert "x86_64" in capsys.readouterr().out


def test_an_access_is_built_in_one_place():
    """Nobody calls the constructor itself, which has more than a door may forget."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.split():
        path = REPOSITORY / name
        if not path.exists():
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", None) != "GuestAccess", f"{name}:{node.lineno}"
