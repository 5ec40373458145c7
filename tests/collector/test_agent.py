"""The agent as its users meet it: first contact, after-actions, reload, commands, systemd."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

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


def guest_of(machine: QemuMachine, **settings: Any) -> dict[str, Any]:
    return {"socket": str(machine.qmp_sockets[0]), "name": "box", **settings}


def test_first_contact_says_that_a_panic_would_end_the_guest_and_changes_that(tmp_path):
    with bare_machine(tmp_path, "panic") as machine:
        agent = CrashAgent(tmp_path, guests=[guest_of(machine)])
        done = run_collector("check-config", "--config", agent.config)
        assert "box: " in done.stdout
        assert "start QEMU with -action panic=pause" in done.stdout
        with agent.running():
            agent.wait_logged("start it with -action panic=pause")
            cont(machine)
            agent.wait_records()
            assert guest_status(machine) == "guest-panicked"
    with bare_machine(tmp_path, "panic", "-action", "panic=pause") as machine:
        agent = CrashAgent(tmp_path, guests=[guest_of(machine)])
        done = run_collector("check-config", "--json", "--config", agent.config)
        assert json.loads(done.stdout)["guests"][0]["panic_action"] == "pause"


def test_guest_of_libvirt_is_told_as_one(tmp_path):
    """As far as the command line goes: whether libvirt leaves it after a panic is said."""
    monitor = f"socket,id=charmonitor,path={tmp_path}/libvirt,server=on,wait=off"
    arguments = ["-name", "guest=nobody-has-this-one", "-chardev", monitor, "-no-shutdown"]
    arguments += ["-mon", "chardev=charmonitor,id=monitor,mode=control"]
    with bare_machine(tmp_path, "panic", *arguments) as machine:
        agent = CrashAgent(tmp_path, guests=[guest_of(machine)])
        done = run_collector("check-config", "--config", agent.config)
        assert "libvirt runs it, and what that does on a panic cannot be read" in done.stdout
        with agent.running():
            agent.wait_logged("<on_crash>preserve</on_crash>")


def test_reset_makes_the_guest_run_again(tmp_path):
    with (
        bare_machine(tmp_path, "panic", "-action", "panic=pause") as machine,
        CrashAgent(tmp_path, guests=[guest_of(machine, after="reset")]).running() as agent,
    ):
        agent.wait_connected()
        cont(machine)
        # It panics again at once: each is a crash of its own.
        wait_until(lambda: len(agent.records()) >= 3, "three crashes")
        kinds = {record.cause.kind for record in agent.records()}
        assert kinds == {"guest-panicked"}
        assert [record.occurrence for record in agent.records()][:3] == [1, 2, 3]


def test_resume_makes_the_guest_run_on(tmp_path):
    with (
        bare_machine(tmp_path, "panic-spin", "-action", "panic=pause") as machine,
        CrashAgent(tmp_path, guests=[guest_of(machine, after="resume")]).running() as agent,
    ):
        agent.wait_connected()
        cont(machine)
        agent.wait_records()
        wait_until(lambda: guest_status(machine) == "running", "running")


def test_quit_ends_qemu_and_that_is_no_crash(tmp_path):
    with (
        bare_machine(tmp_path, "panic", "-action", "panic=pause") as machine,
        CrashAgent(tmp_path, guests=[guest_of(machine, after="quit")]).running() as agent,
    ):
        agent.wait_connected()
        cont(machine)
        agent.wait_logged("QEMU has ended")
        wait_until(lambda: not machine.is_running(), "QEMU ended")
        agent.wait_records(1)


def test_command_finds_the_crash_in_its_environment(tmp_path):
    script = f"env | grep ^CRASH_ | sort >{tmp_path}/env.new; mv {tmp_path}/env.new {tmp_path}/env"
    after = {"command": ["sh", "-c", script]}
    with (
        bare_machine(tmp_path, "panic") as machine,
        CrashAgent(tmp_path, guests=[guest_of(machine, after=after)]).running() as agent,
    ):
        agent.wait_connected()
        cont(machine)
        (record,) = agent.wait_records()
        wait_until((tmp_path / "env").exists, "the command ran")
    found = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    directory = agent.store.directory(record.id)
    assert found == {
        "CRASH_CAUSE": "guest-panicked",
        "CRASH_DIRECTORY": str(directory),
        "CRASH_DUMP": str(directory / "vmcore.kdump"),
        "CRASH_GUEST": "box",
        "CRASH_ID": record.id,
        "CRASH_SIGNATURE": record.signature.id,
    }


def test_command_that_does_not_end_is_ended(tmp_path):
    after = {"command": ["sleep", "1000"], "timeout": "100ms"}
    with (
        bare_machine(tmp_path, "panic") as machine,
        CrashAgent(tmp_path, guests=[guest_of(machine, after=after)]).running() as agent,
    ):
        agent.wait_connected()
        cont(machine)
        agent.wait_logged("sleep ended with status -9")


def test_guests_come_and_go_in_a_directory(tmp_path):
    place = tmp_path / "sockets"
    place.mkdir()
    agent = CrashAgent(tmp_path, guests=[{"directory": str(place)}])
    with agent.running():
        assert agent.guests() == []
        (place / "no-socket").write_text("")
        with bare_machine(tmp_path, "panic", qmp_socket=place / "vm1.qmp") as machine:
            agent.wait_connected()
            cont(machine)
            (record,) = agent.wait_records()
            assert record.guest == "vm1"
        # QEMU was killed, and its socket removed.
        wait_until(lambda: agent.guests() == [], "nobody is watched")
        with bare_machine(tmp_path, "panic", qmp_socket=place / "vm1.qmp") as machine:
            agent.wait_connected()
            cont(machine)
            wait_until(lambda: len(agent.records()) >= 2, "the next one")


def test_two_guests_of_one_name_are_told(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with (
        bare_machine(tmp_path, "halt", qmp_socket=tmp_path / "a" / "qmp"),
        bare_machine(tmp_path, "halt", qmp_socket=tmp_path / "b" / "qmp"),
    ):
        pattern = str(tmp_path / "*" / "qmp")
        agent = CrashAgent(tmp_path, guests=[{"glob": pattern}])
        with agent.running():
            agent.wait_logged("is called qmp as well")
            agent.wait_connected(1)
            agent.configure(
                store=str(agent.store.path),
                scan_interval=0.1,
                guests=[{"glob": pattern, "name": "{directory}"}],
            )
            agent.signal(signal.SIGHUP)
            agent.wait_connected(2)
            names = {guest["name"] for guest in agent.guests() or ()}
            assert names == {"a", "b"}


def test_wrong_configuration_is_refused_and_the_old_one_stays(tmp_path):
    with bare_machine(tmp_path, "halt") as machine:
        agent = CrashAgent(tmp_path, guests=[guest_of(machine)])
        with agent.running():
            agent.wait_connected()
            good = agent.config.read_text()
            agent.config.write_text(f"{good}\nguests: 7\n")
            agent.signal(signal.SIGHUP)
            agent.wait_logged("the configuration stays as it was")
            agent.wait_connected()
            agent.config.write_text(good.replace("name: box", "name: other"))
            agent.signal(signal.SIGHUP)
            wait_until(
                lambda: [guest["name"] for guest in agent.guests() or ()] == ["other"], "renamed"
            )
        agent.config.write_text("store: [")
        done = run_collector("run", "--config", agent.config)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"qemu-crash-collector run: {agent.config}:1:9: ")
        assert len(done.stderr.splitlines()) == 1


def test_one_store_has_one_agent_and_a_private_control_socket(tmp_path):
    agent = CrashAgent(tmp_path)
    with agent.running():
        mode = (agent.store.path / ".control").stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
        done = run_collector("run", "--config", agent.config)
        assert done.returncode == 2
        assert "another agent uses" in done.stderr
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(agent.store.path / ".control"))
            connection.sendall(b"\xff{]\n")
            assert b'"error"' in connection.recv(1000)
        assert agent.guests() == []
        agent.signal(signal.SIGTERM)
        assert agent.wait() == 0
    assert not (agent.store.path / ".control").exists()
    done = run_collector("trigger", "box", "--config", agent.config)
    assert done.returncode == 3
    assert "no agent listens" in done.stderr


def test_idle_connections_take_nothing_from_the_agent(tmp_path):
    with bare_machine(tmp_path, "halt") as machine, ExitStack() as stack:
        agent = CrashAgent(tmp_path, guests=[guest_of(machine)])
        control = str(agent.store.path / ".control")
        with agent.running():
            agent.wait_connected()
            subprocess.run(["prlimit", f"--pid={agent.pid}", "--nofile=64"], check=True)
            idle = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(150)]
            for connection in idle:
                connection.connect(control)
            done = run_collector("trigger", "box", "--config", agent.config)
            assert done.returncode == 0, done.stderr
            assert agent.wait_records(1)[0].dump.complete
            assert len(list(Path(f"/proc/{agent.pid}/fd").iterdir())) < 50
            # Who has waited longest had to go.
            idle[0].settimeout(60)
            with suppress(ConnectionResetError):
                assert idle[0].recv(1) == b""
            idle[-1].sendall(b'{"command": "guests"}\n')
            idle[-1].settimeout(60)
            assert b'"guests"' in idle[-1].recv(1000)


def test_request_that_is_none_is_refused_in_a_line(tmp_path):
    agent = CrashAgent(tmp_path)
    with agent.running():
        for line in (b"[" * 20000, b"7", b"{}", b'{"command": []}', b'{"command": "\\ud800"}'):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(agent.store.path / ".control"))
                connection.sendall(line + b"\n")
                assert "error" in json.loads(connection.makefile("rb").readline())
        assert agent.guests() == []
        assert "exception" not in agent.log.read_text()


@contextmanager
def service_manager(directory: Path) -> Iterator[list[str]]:
    """Collect what the agent tells systemd."""
    told: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(directory / "notify"))
        listening.settimeout(0.1)
        ended = threading.Event()

        def listen() -> None:
            while not ended.is_set():
                try:
                    told.extend(listening.recv(4096).decode().splitlines())
                except TimeoutError:
                    continue

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield told
        finally:
            ended.set()
            thread.join()


def test_service_manager_is_told(tmp_path):
    agent = CrashAgent(tmp_path)
    with service_manager(tmp_path) as told:
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        with agent.running(**environment):
            wait_until(lambda: "READY=1" in told, "ready")
            wait_until(lambda: told.count("WATCHDOG=1") >= 3, "alive")
            agent.signal(signal.SIGHUP)
            wait_until(lambda: told.count("READY=1") == 2, "reloaded")
            assert told.index("RELOADING=1") > told.index("READY=1")
            assert any(text.startswith("MONOTONIC_USEC=") for text in told)
            agent.signal(signal.SIGTERM)
            agent.wait()
            wait_until(lambda: "STOPPING=1" in told, "stopping")


def test_idle_agent_leaves_idle_guests_alone(tmp_path):
    """Nothing is asked of a guest that nothing happens to."""
    with bare_machine(tmp_path, "halt") as machine:
        cont(machine)
        with CrashAgent(tmp_path, guests=[guest_of(machine)]).running() as agent:
            agent.wait_connected()
            threads = {p.name: p for p in Path(f"/proc/{agent.pid}/task").iterdir()}
            assert len(threads) < 6
            descriptors = list(Path(f"/proc/{agent.pid}/fd").iterdir())
            assert len(descriptors) < 20


@contextmanager
def guest_agent(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The real one, at the socket `qga`, though not inside a guest."""
    argv = ["qemu-ga", "--method=unix-listen", f"--path={directory}/qga", f"--statedir={directory}"]
    argv += [f"--pidfile={directory}/qga.pid"]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until((directory / "qga").is_socket, "the agent listens")
            yield process
        finally:
            process.kill()


def test_guest_whose_agent_answers_no_more_is_a_crash(tmp_path):
    heartbeat = {
        "by": "guest-agent",
        "socket": str(tmp_path / "qga"),
        "interval": "50ms",
        "after": "2s",  # a busy host is no dead guest
    }
    with guest_agent(tmp_path) as in_guest, bare_machine(tmp_path, "halt") as machine:
        cont(machine)
        settings = guest_of(machine, heartbeat=heartbeat)
        with CrashAgent(tmp_path, guests=[settings]).running() as agent:
            agent.wait_connected()
            assert run_collector("trigger", "box", "--config", agent.config).returncode == 0
            in_guest.send_signal(signal.SIGSTOP)
            records = agent.wait_records(2)
            assert [record.cause.kind for record in records] == ["trigger", "no-progress"]
            assert "guest-agent" in records[1].cause.detail


def test_store_is_looked_at_and_kept_by_commands(tmp_path):
    agent = CrashAgent(tmp_path, limits={"count": 1}, guests=[])
    config = ("--config", agent.config)
    with bare_machine(tmp_path, "halt") as machine:
        agent.configure(store=str(agent.store.path), scan_interval=0.1, guests=[guest_of(machine)])
        with agent.running():
            agent.wait_connected()
            for _ in range(3):
                assert run_collector("trigger", "box", *config).returncode == 0
    first, second, third = (record.id for record in agent.records())
    done = run_collector("list", *config)
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["ID", "AGE", "STATE", "CAUSE", "DUMP", "MESSAGE"]
    for line, name in zip(lines, (first, second, third), strict=True):
        assert name.startswith(line.split()[0])
    assert len(json.loads(run_collector("list", "--json", *config).stdout)) == 3
    counted = run_collector("list", "--signatures", *config).stdout.splitlines()[1].split()
    assert counted[1] == "3"
    shown = run_collector("show", first, *config).stdout
    assert "cause: trigger: somebody said so" in shown
    assert f"directory: {agent.store.directory(first)}" in shown
    assert json.loads(run_collector("show", "--json", first, *config).stdout)["id"] == first
    done = run_collector("hold", first, *config)
    assert done.stdout == f"{first} is held: limits never remove it\n"
    agent.configure(store=str(agent.store.path), limits={"count": 1})
    would = run_collector("prune", "--dry-run", *config).stdout.splitlines()
    assert would[-1].startswith("would be removed: 2 of them, ")
    assert len(agent.records()) == 3
    removed = json.loads(run_collector("prune", "--json", *config).stdout)
    assert [(one["id"], one["what"]) for one in removed] == [(second, "crash"), (third, "crash")]
    assert run_collector("prune", *config).stdout == "removed: nothing\n"
    assert run_collector("release", "latest", *config).stdout == f"{first} is held no more\n"
    assert not agent.store.record(first).held
    done = run_collector("show", "box/x", *config)
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no crash 'box/x'" in done.stderr
    done = run_collector("open", second, *config)
    assert done.returncode == 2
    done = run_collector("list", "--guest", "nobody", *config)
    assert done.returncode == 2
    assert "there is no guest 'nobody'" in done.stderr
    done = run_collector("list", "--store", tmp_path / "none")
    assert os.path.lexists(tmp_path / "none") is False
    assert done.returncode == 2, done.stdout
