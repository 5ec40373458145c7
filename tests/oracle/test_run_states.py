"""A dump beside everybody else who changes a guest: it is left as each of them leaves it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from qemu_dump_ext.crash_collector.collect_now import collect_crash
from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from qemu_dump_ext.qemu.run_states import IDLE_MIGRATIONS, RUN_STATES
from tests.support.bare_crashes import bare_machine
from tests.support.blocked_target import BlockedTarget, blocked_target
from tests.support.crash_agent import CrashAgent, run_collector
from tests.support.doors import child_environment, cli_argv, guest_status, run_cli, run_gdb
from tests.support.hmp_proxy import HmpSocket, Proxy, QmpSocket, monitor_arguments
from tests.support.newer_qemu import newer_qemu_command, own_qemu_version
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

_DUMP = "import sys; from qemu_dump_ext.cli import main; sys.exit(main(sys.argv[1:]))"
QEMUS: dict[str, Callable[[], list[str]]] = {
    "7.2": lambda: ["qemu-system-x86_64"],
    "newer": newer_qemu_command,
}
MIGRATED = "exec:cat > /dev/null"


def refusal_of_qemu(machine: QemuMachine) -> str:
    """Return what QEMU itself says to who wants to dump the guest."""
    native = f"file:{machine.folder / 'native'}"
    with (
        RawQmp(machine.qmp_sockets[1]) as qmp,
        pytest.raises(RuntimeError, match="dump-guest-memory: ") as refused,
    ):
        qmp.execute("dump-guest-memory", paging=False, protocol=native)
    return str(refused.value).removeprefix("dump-guest-memory: ")


def facts(machine: QemuMachine) -> Any:
    """Return all that a dump may not change: of the guest, of QEMU, and of its other clients."""
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        return (
            qmp.execute("query-status"),
            qmp.execute("query-migrate").get("status"),
            qmp.execute("query-dump"),
            len(qmp.execute("query-chardev")),
            qmp.execute("query-block-jobs"),
        )


# What each door says


def _by_qmp(machine: QemuMachine, target: Path) -> str:
    done = run_cli("--qmp", machine.qmp_sockets[0], target)
    assert done.returncode == 2, done
    return done.stderr


def _info(machine: QemuMachine, _target: Path) -> str:
    return _subcommand("info", "--qmp", machine.qmp_sockets[0])


def _dmesg(machine: QemuMachine, _target: Path) -> str:
    return _subcommand("dmesg", "--qmp", machine.qmp_sockets[0])


def _subcommand(*words: object) -> str:
    argv = [cli_argv()[0], "-c", _DUMP, *map(str, words)]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, env=child_environment()
    )
    assert done.returncode == 2, done
    return done.stderr


def _by_gdb(machine: QemuMachine, target: Path) -> str:
    done = run_cli("--gdb", machine.gdb_socket, target)
    assert done.returncode == 2, done
    return done.stderr


def _by_gdb_and_qmp(machine: QemuMachine, target: Path) -> str:
    done = run_cli("--gdb", machine.gdb_socket, "--qmp", machine.qmp_sockets[0], target)
    assert done.returncode == 2, done
    return done.stderr


def _in_gdb(machine: QemuMachine, target: Path) -> str:
    return run_gdb(machine, [f"qemu-dump-guest-memory {target}"]).stderr


def _in_gdb_with_qmp(machine: QemuMachine, target: Path) -> str:
    words = f"qemu-dump-guest-memory --qmp {machine.qmp_sockets[0]} {target}"
    return run_gdb(machine, [words]).stderr


def _proxy(machine: QemuMachine, target: Path) -> str:
    with (
        Proxy(target.parent, "--qmp", machine.qmp_sockets[0]) as proxy,
        HmpSocket(proxy.socket) as client,
    ):
        return client.command(f"dump-guest-memory {target}")


def _proxy_of_the_human_monitor(machine: QemuMachine, target: Path) -> str:
    monitor = next(word for word in machine.argv if "id=monitor" in word)
    monitor = monitor.partition("path=")[2].partition(",")[0]
    with Proxy(target.parent, "--hmp", monitor) as proxy, HmpSocket(proxy.socket) as client:
        return client.command(f"dump-guest-memory {target}")


def _proxy_by_qmp(machine: QemuMachine, target: Path) -> str:
    with (
        Proxy(target.parent, "--qmp", machine.qmp_sockets[0], qmp=True) as proxy,
        QmpSocket(proxy.qmp_socket) as client,
    ):
        client.execute("qmp_capabilities")
        answers = client.execute("dump-guest-memory", paging=False, protocol=f"file:{target}")
        return str(answers[-1]["error"]["desc"])


def _collector(machine: QemuMachine, target: Path) -> str:
    guest = {"socket": str(machine.qmp_sockets[0]), "name": "guest"}
    with CrashAgent(target.parent, guests=[guest]).running() as agent:
        agent.wait_connected()
        run_collector("trigger", "--config", agent.config, "guest")
        [record] = agent.records()
        return str(record.dump.reason)


def _collect_crash(machine: QemuMachine, target: Path) -> str:
    crash = collect_crash(machine.qmp_sockets[0], target.parent / "crashes", name="guest")
    return str(json.loads((crash / "crash.json").read_text())["dump"]["reason"])


REFUSING: dict[str, Callable[[QemuMachine, Path], str]] = {
    "qmp": _by_qmp,
    "info": _info,
    "dmesg": _dmesg,
    "gdb-of-its-own": _by_gdb,
    "gdb-of-its-own-and-qmp": _by_gdb_and_qmp,
    "gdb": _in_gdb,
    "gdb-with-qmp": _in_gdb_with_qmp,
    "proxy": _proxy,
    "proxy-of-the-human-monitor": _proxy_of_the_human_monitor,
    "proxy-by-qmp": _proxy_by_qmp,
    "collector": _collector,
    "collect_crash": _collect_crash,
}
_STOPS_BY_ATTACHING = {"gdb-of-its-own", "gdb", "gdb-with-qmp"}


@pytest.fixture(scope="module", params=QEMUS)
def incoming(request: pytest.FixtureRequest) -> Iterator[QemuMachine]:
    machine = stopped_machine(QEMUS[request.param](), ["-incoming", "defer"])
    machine.argv += monitor_arguments(machine.folder / "monitor")
    with machine:
        yield machine


@pytest.mark.parametrize("door", REFUSING)
def test_a_guest_whose_memory_is_still_to_come_is_refused_in_words_of_qemu(
    incoming: QemuMachine, tmp_path: Path, door: str
):
    before = facts(incoming)
    words = refusal_of_qemu(incoming)
    assert words.startswith("Dump not allowed during ")
    assert words in REFUSING[door](incoming, tmp_path / "dump")
    assert facts(incoming) == before
    assert before[0]["status"] == "inmigrate"
    assert not (tmp_path / "dump").exists()


@pytest.fixture(scope="module", params=QEMUS)
def migrating(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[QemuMachine]:
    """A guest that runs, and whose migration does not end."""
    folder = tmp_path_factory.mktemp("migrating")
    words = ("-m", "64", *random_content(folder), *monitor_arguments(folder / "monitor"))
    with (
        bare_machine(folder, "spin", *words, command=QEMUS[request.param]()) as machine,
        ExitStack() as stack,
    ):
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("cont")
            stack.enter_context(endless_migration(machine, qmp))
        yield machine


@contextmanager
def endless_migration(machine: QemuMachine, qmp: RawQmp) -> Iterator[None]:
    """Let the guest migrate to somebody who takes no more than a socket holds."""
    path = machine.folder / "migration"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        qmp.execute("migrate", uri=f"unix:{path}")
        wait_until(lambda: qmp.execute("query-migrate").get("status") == "active")
        yield


@pytest.mark.parametrize("door", sorted({*REFUSING} - _STOPS_BY_ATTACHING))
def test_a_guest_that_migrates_is_refused_in_words_of_qemu(
    migrating: QemuMachine, tmp_path: Path, door: str
):
    before = facts(migrating)
    words = refusal_of_qemu(migrating)
    assert words.startswith("disallowing migration blocker")
    assert words in REFUSING[door](migrating, tmp_path / "dump")
    assert facts(migrating) == before
    assert (before[0]["status"], before[1]) == ("running", "active")


def test_a_debugger_of_ours_lets_a_guest_that_migrates_run(migrating: QemuMachine, tmp_path: Path):
    before = facts(migrating)
    assert refusal_of_qemu(migrating) in _by_gdb(migrating, tmp_path / "dump")
    assert facts(migrating) == before


# What others do meanwhile


def random_content(folder: Path) -> Sequence[str]:
    """Return arguments that give a guest memory which a migration cannot skip as it does zeros."""
    content = folder / "content"
    content.write_bytes(bytes(range(1, 256)) * 4096)
    return ("-device", f"loader,file={content},addr=0x200000,force-raw=on")


@contextmanager
def running_machine(
    folder: Path, *arguments: str, qemu: str = "7.2"
) -> Iterator[tuple[QemuMachine, RawQmp]]:
    words = ("-m", "64", *random_content(folder), *arguments)
    with (
        bare_machine(folder, "spin", *words, command=QEMUS[qemu]()) as machine,
        RawQmp(machine.qmp_sockets[1]) as qmp,
    ):
        qmp.execute("cont")
        yield machine, qmp


@pytest.fixture(scope="module", params=QEMUS)
def spinning(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[QemuMachine, RawQmp]]:
    with running_machine(tmp_path_factory.mktemp("spinning"), qemu=request.param) as running:
        yield running


@contextmanager
def dump_under_way(
    machine: QemuMachine, qmp: RawQmp, folder: Path, *words: object
) -> Iterator[tuple[subprocess.Popen[str], BlockedTarget]]:
    """Keep a dump in the middle: the guest is stopped, and the target takes no more."""
    with blocked_target(folder) as target:
        argv = cli_argv("--qmp", machine.qmp_sockets[0], *words, target.path)
        process = subprocess.Popen(argv, env=child_environment(), stderr=subprocess.PIPE, text=True)
        try:
            wait_until(target.is_written_to, "the dump is being written")
            assert status(qmp) == "paused"
            yield process, target
        finally:
            process.kill()
            process.communicate()


def status(qmp: RawQmp) -> str:
    return str(qmp.execute("query-status")["status"])


def registers(qmp: RawQmp) -> str:
    return str(qmp.execute("human-monitor-command", **{"command-line": "info registers"}))


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.communicate(timeout=300)[1]
    assert "Traceback" not in said, said
    return process.returncode, said


@pytest.mark.parametrize("qemu", QEMUS)
def test_a_guest_that_has_migrated_away_meanwhile_stays_there(tmp_path: Path, qemu: str):
    with (
        running_machine(tmp_path, qemu=qemu) as (machine, qmp),
        dump_under_way(machine, qmp, tmp_path) as (process, target),
    ):
        qmp.execute("migrate", uri=MIGRATED)
        wait_until(lambda: status(qmp) == "postmigrate")
        target.drain()
        ended(process)
        assert status(qmp) == "postmigrate"
        assert qmp.execute("query-migrate")["status"] == "completed"


@pytest.mark.parametrize("qemu", QEMUS)
def test_a_migration_that_begins_ends_the_dump_and_goes_on(tmp_path: Path, qemu: str):
    with (
        running_machine(tmp_path, qemu=qemu) as (machine, qmp),
        dump_under_way(machine, qmp, tmp_path) as (process, _),
        endless_migration(machine, qmp),
    ):
        code, said = ended(process)
        assert (code, status(qmp)) == (2, "running")
        assert "Live migration disabled: dump-guest-memory in progress" in said
        assert qmp.execute("query-migrate")["status"] == "active"


def test_a_guest_that_somebody_lets_run_is_not_touched_again(
    spinning: tuple[QemuMachine, RawQmp], tmp_path: Path
):
    machine, qmp = spinning
    with dump_under_way(machine, qmp, tmp_path) as (process, _):
        qmp.execute("cont")
        code, said = ended(process)
    assert (code, status(qmp)) == (3, "running")
    assert "somebody else let the guest run" in said


def test_a_guest_that_somebody_has_stopped_again_stays_so(tmp_path: Path):
    with running_machine(tmp_path) as (machine, qmp):
        with dump_under_way(machine, qmp, tmp_path) as (process, target):
            before = registers(qmp)
            qmp.execute("cont")
            wait_until(lambda: registers(qmp) != before)
            qmp.execute("stop")
            target.drain()
            code, _ = ended(process)
        assert (code, status(qmp)) == (3, "paused")


def test_a_guest_that_somebody_resets_runs_again(
    spinning: tuple[QemuMachine, RawQmp], tmp_path: Path
):
    machine, qmp = spinning
    with dump_under_way(machine, qmp, tmp_path) as (process, target):
        qmp.execute("system_reset")
        wait_until(lambda: status(qmp) == "prelaunch")
        target.drain()
        ended(process)
    assert status(qmp) == "running"


def test_a_dump_of_qemus_own_that_begins_is_waited_for(
    spinning: tuple[QemuMachine, RawQmp], tmp_path: Path
):
    machine, qmp = spinning
    with (
        blocked_target(machine.folder) as native,
        dump_under_way(machine, qmp, tmp_path) as (process, target),
    ):
        writer = os.open(native.path, os.O_WRONLY)
        os.close(writer)
        qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{native.path}", detach=True)
        target.drain()
        wait_until(lambda: qmp.execute("query-dump")["status"] == "active")
        native.drain()
        ended(process)
    assert status(qmp) == "running"
    native.path.unlink()


@pytest.mark.parametrize("state", ["guest-panicked", "shutdown"])
def test_a_guest_that_qemu_has_stopped_stays_so(tmp_path: Path, state: str):
    arguments = ["-action", "panic=pause,shutdown=pause,reboot=shutdown"]
    mode = {"guest-panicked": "panic"}.get(state, "spin")
    with bare_machine(tmp_path, mode, "-m", "64", *arguments) as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("cont")
            if state == "shutdown":
                qmp.execute("system_reset")
            wait_until(lambda: status(qmp) == state)
        done = run_cli("--qmp", machine.qmp_sockets[0], tmp_path / "dump")
        assert done.returncode == 0, done.stderr
        assert guest_status(machine) == state


def test_a_killed_dump_lets_the_guest_run(spinning: tuple[QemuMachine, RawQmp], tmp_path: Path):
    machine, qmp = spinning
    with dump_under_way(machine, qmp, tmp_path) as (process, _):
        process.kill()
        process.wait()
        wait_until(lambda: status(qmp) == "running", "the guest runs")


def test_a_guest_that_runs_in_single_steps_is_stopped(tmp_path: Path):
    newer = ("-accel", "tcg,one-insn-per-tb=on")
    words = newer if own_qemu_version() >= (8, 1, 0) else ("-singlestep",)
    with running_machine(tmp_path, *words) as (machine, qmp):
        with dump_under_way(machine, qmp, tmp_path) as (process, target):
            target.drain()
            code, said = ended(process)
        assert (code, status(qmp)) == (0, "running"), said


@pytest.mark.parametrize("qemu", QEMUS)
def test_every_run_state_of_this_qemu_is_in_the_table(qemu: str):
    with (
        stopped_machine(QEMUS[qemu]()) as machine,
        RawQmp(machine.qmp_sockets[1]) as qmp,
    ):
        schema = {entry["name"]: entry for entry in qmp.execute("query-qmp-schema")}
        enums = {name: entry for name, entry in schema.items() if entry["meta-type"] == "enum"}
        assert set(RUN_STATES) == _values_returned(schema, enums, "query-status", "status")
        assert _values_returned(schema, enums, "query-migrate", "status") > IDLE_MIGRATIONS


def _values_returned(schema: Any, enums: Any, command: str, member: str) -> set[str]:
    returned = schema[schema[command]["ret-type"]]["members"]
    kind = next(entry["type"] for entry in returned if entry["name"] == member)
    return set(enums[kind]["values"])


# The proxy


def test_the_proxy_refuses_a_migration_in_words_of_qemu(
    spinning: tuple[QemuMachine, RawQmp], tmp_path: Path
):
    machine, qmp = spinning
    words = "Live migration disabled: dump-guest-memory in progress"
    with (
        Proxy(tmp_path, "--qmp", machine.qmp_sockets[0], qmp=True) as proxy,
        HmpSocket(proxy.socket) as client,
        QmpSocket(proxy.qmp_socket) as door,
        blocked_target(tmp_path) as target,
    ):
        door.execute("qmp_capabilities")
        assert client.command(f"dump-guest-memory -d {target.path}") == ""
        assert status(qmp) == "paused"
        for line in (f"migrate -d {MIGRATED}", "savevm x"):
            assert client.command(line) == f"Error: {words}\n"
        refused = door.execute("migrate", uri=MIGRATED)[-1]["error"]
        assert refused == {"class": "GenericError", "desc": words}
        by_hmp: Any = {"command-line": f"migrate -d {MIGRATED}"}
        assert words in door.execute("human-monitor-command", **by_hmp)[-1]["return"]
        assert "status" not in qmp.execute("query-migrate")
        target.drain()
        wait_until(lambda: "completed" in client.command("info dump"))
        assert status(qmp) == "running"


@pytest.mark.parametrize("option", ["--hmp", "--qmp"])
def test_a_proxy_gives_way_to_who_lets_the_guest_run(tmp_path: Path, option: str):
    """QEMU did not answer when the dump ended; the proxy lives on, at the only monitor."""
    monitor = tmp_path / "monitor"
    words = ["-m", "64", *monitor_arguments(monitor)]
    with QemuMachine(["qemu-system-x86_64"], words) as machine:
        address = monitor if option == "--hmp" else machine.qmp_sockets[0]
        with Proxy(tmp_path, option, address) as proxy, HmpSocket(proxy.socket) as client:
            with blocked_target(tmp_path) as target:
                client.send(f"dump-guest-memory {target.path}\n".encode())
                wait_until(target.is_written_to, "the dump is being written")
                os.kill(machine.pid, signal.SIGSTOP)
            try:
                said = client.wait(b"(qemu gone) ")
            finally:
                os.kill(machine.pid, signal.SIGCONT)
            assert b"the guest is let run as soon as QEMU answers" in said
            wait_until(lambda: guest_status(machine) == "running", "it runs again")
            assert b"is back" in client.wait()
            assert "running" in client.command("info status")


def test_a_killed_proxy_of_a_human_monitor_lets_the_guest_run(tmp_path: Path):
    monitor = tmp_path / "monitor"
    with (
        running_machine(tmp_path, *monitor_arguments(monitor)) as (_, qmp),
        Proxy(tmp_path, "--hmp", monitor) as proxy,
        HmpSocket(proxy.socket) as client,
        blocked_target(tmp_path) as target,
    ):
        client.command(f"dump-guest-memory -d {target.path}")
        assert status(qmp) == "paused"
        proxy.process.kill()
        wait_until(lambda: status(qmp) == "running", "the guest runs")


# The clock


@pytest.mark.parametrize("target", ["|sleep 60", "fifo"])
def test_the_limit_of_the_pause_holds_whatever_the_target_does(
    spinning: tuple[QemuMachine, RawQmp], tmp_path: Path, target: str
):
    machine, qmp = spinning
    limit = ("--max-pause", "0.5")
    with blocked_target(tmp_path) as blocked:
        words = blocked.path if target == "fifo" else target
        done = run_cli("--qmp", machine.qmp_sockets[0], *limit, words, timeout=50)
    assert done.returncode == 2
    assert "had stood still for 0.5 s, the limit of --max-pause" in done.stderr
    assert status(qmp) == "running"


def test_the_guest_runs_again_when_qemu_does(spinning: tuple[QemuMachine, RawQmp], tmp_path: Path):
    machine, qmp = spinning
    with dump_under_way(machine, qmp, tmp_path, "--max-pause", "3", "--memory", "pmemsave") as (
        process,
        target,
    ):
        os.kill(machine.pid, signal.SIGSTOP)
        target.drain()
        code, said = ended(process)
        assert code == 3, said
        assert "the guest is let run as soon as QEMU answers" in said
        os.kill(machine.pid, signal.SIGCONT)
        wait_until(lambda: status(qmp) == "running", "the guest runs")
