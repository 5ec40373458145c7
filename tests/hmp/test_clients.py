"""Many clients at once, some of them bad ones; sockets, and who may reach them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from tests.support.doors import child_environment, run_cli
from tests.support.hmp_proxy import (
    GONE_PROMPT,
    HmpSocket,
    Proxy,
    hmp_of,
    listens_at,
    partial_files,
    proxy_argv,
    run_proxy,
)
from tests.support.ports import reserved_port
from tests.support.waiting import SECONDS, wait_until

pytestmark = pytest.mark.qemu

_MEMORY_KIB_MAX = 200 << 10
_LARGE = ["-m", "2048"]
"""A dump by pmemsave takes seconds: there is a middle of it."""


@pytest.fixture(scope="module")
def machine() -> Iterator[QemuMachine]:
    with stopped_machine(["qemu-system-x86_64"], ["-M", "q35", "-smp", "2"]) as machine:
        yield machine


@pytest.fixture(scope="module")
def proxy(machine: QemuMachine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with Proxy(tmp_path_factory.mktemp("p"), "--qmp", machine.qmp_sockets[0]) as proxy:
        yield proxy


def test_ten_clients_at_once_one_slow_and_one_sending_garbage(proxy: Proxy):
    good = [HmpSocket(proxy.socket) for _ in range(8)]
    expected = good[0].exchange("info mtree")
    stop = threading.Event()
    slow, loud = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    for bad in (slow, loud):
        bad.connect(str(proxy.socket))
        bad.settimeout(0.3)

    def push(client: socket.socket, content: bytes, *, reads: bool) -> None:
        while not stop.is_set():
            try:
                client.send(content)
                if reads:
                    client.recv(1 << 16)
            except TimeoutError:
                continue

    garbage = os.urandom(1 << 16)
    bad_ones = [
        threading.Thread(
            target=push, args=(slow, b"info qtree\nhelp\n" * 50), kwargs={"reads": False}
        ),
        threading.Thread(target=push, args=(loud, garbage), kwargs={"reads": True}),
    ]
    for thread in bad_ones:
        thread.start()
    try:
        # A client that had to wait for the slow one would wait until its socket times out.
        for _ in range(12):
            for client in good:
                assert client.exchange("info mtree") == expected
    finally:
        stop.set()
        for thread in bad_ones:
            thread.join()
    for bad in (slow, loud):
        bad.close()
    assert proxy.peak_kib() < _MEMORY_KIB_MAX
    with HmpSocket(proxy.socket) as late:
        assert late.command("info status").startswith("VM status")
    for client in good:
        client.close()


def test_slow_client_is_made_to_wait_and_loses_nothing(proxy: Proxy):
    with HmpSocket(proxy.socket) as client:
        # More output than may wait for a client.
        lines = (64 << 20) // len(client.command("info trace-events"))
        client.send(b"info trace-events\n" * lines)
        time.sleep(2)
        with HmpSocket(proxy.socket) as other:
            assert other.command("info name") == ""
        received, tail = 0, b""
        while received < lines:
            data = client.receive()
            assert data
            received += (tail + data).count(b"\n(qemu) ")
            tail = data[-7:]
        assert client.command("info name") == ""


def test_input_is_bounded(proxy: Proxy):
    sent = 0
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(proxy.socket))
        client.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while sent < 64 << 20:
                sent += client.send(b"help\n" * 10_000)
    assert sent < 8 << 20


def test_clients_keep_their_own_vcpu_and_history(proxy: Proxy):
    with HmpSocket(proxy.socket) as one, HmpSocket(proxy.socket) as two:
        assert one.command("cpu 1") == ""
        assert "* CPU #1" in one.command("info cpus")
        assert "* CPU #0" in two.command("info cpus")
        assert two.command("info history") == "0: 'info cpus'\n1: 'info history'\n"


def test_socket_is_for_its_owner_alone_and_removed_at_the_end(tmp_path: Path):
    with stopped_machine(["qemu-system-x86_64"]) as own:
        proxy = Proxy(tmp_path, "--qmp", own.qmp_sockets[0])
        assert stat.S_IMODE(proxy.socket.stat().st_mode) == 0o600
        again = run_proxy("--qmp", own.qmp_sockets[1], "--listen", proxy.socket)
        assert again.returncode == 2
        assert again.stderr == (f"qemu-hmp-proxy: {proxy.socket}: somebody listens there already\n")
        assert proxy.stop() == (0, "")
        assert not proxy.socket.exists()
        # One that was left behind is taken over, a file is not.
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(proxy.socket))
        with (
            Proxy(tmp_path, "--qmp", own.qmp_sockets[0]) as second,
            HmpSocket(second.socket) as client,
        ):
            assert client.command("info name") == ""
        file = tmp_path / "file"
        file.touch()
        refused = run_proxy("--qmp", own.qmp_sockets[0], "--listen", file)
        assert refused.returncode == 2
        assert "exists and is no socket" in refused.stderr


def _tcp_proxy(machine: QemuMachine, port: int, *words: str) -> subprocess.Popen[str]:
    argv = proxy_argv("--qmp", machine.qmp_sockets[0], *(word.format(port) for word in words))
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=child_environment()
    )

    def listens() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert process.poll() is None
            return False
        return True

    wait_until(listens, "the proxy listens")
    return process


def test_tcp_on_the_loopback():
    with stopped_machine(["qemu-system-x86_64"]) as own, reserved_port() as port:
        process = _tcp_proxy(own, port, "--listen", "localhost:{}")
        try:
            with socket.create_connection(("127.0.0.1", port), SECONDS) as client:
                client.sendall(b"info status\n")
                received = b""
                while b"prelaunch" not in received:
                    received += client.recv(4096)
        finally:
            process.terminate()
        assert process.communicate(timeout=300)[1] == ""


def test_other_addresses_are_refused_unless_allowed(machine: QemuMachine):
    refused = run_proxy("--qmp", machine.qmp_sockets[1], "--listen", "0.0.0.0:5555")
    assert refused.returncode == 2
    assert "can be reached from other machines" in refused.stderr
    assert refused.stderr.count("\n") == 1
    with stopped_machine(["qemu-system-x86_64"]) as own, reserved_port() as port:
        process = _tcp_proxy(own, port, "--allow-remote", "--listen", "0.0.0.0:{}")
        process.terminate()
        assert "has full control of the guest" in process.communicate(timeout=300)[1]


@pytest.mark.parametrize(
    ("words", "status", "complaint"),
    [
        ([], 2, "which guest? (--guest NAME, --qmp SOCKET or --hmp MONITOR)"),
        (["--qmp", "/no/such/socket"], 3, "cannot connect to QMP socket /no/such/socket"),
        (["--hmp", "/no/such/socket"], 3, "cannot connect to monitor /no/such/socket"),
        (["--hmp", "/dev/null"], 3, "/dev/null"),
        (["--nosuch"], 2, "unrecognized arguments: --nosuch"),
        (["--hmp", "x", "--qmp-listen", "y"], 2, "--qmp-listen needs a QEMU"),
        (["--memory", "nosuch"], 2, "invalid choice: 'nosuch'"),
    ],
)
def test_bad_start_is_one_line(words: list[str], status: int, complaint: str):
    done = run_proxy(*words)
    assert done.returncode == status
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("address", ["/no/such/folder/socket", "/tmp/" + "x" * 120])
def test_bad_address_is_one_line(machine: QemuMachine, address: str):
    done = run_proxy("--qmp", machine.qmp_sockets[1], "--listen", address)
    assert done.returncode == 3
    assert done.stderr.startswith(f"qemu-hmp-proxy: cannot listen at {address}: ")
    assert "None" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_socket_paths_that_are_longer_than_an_address(machine: QemuMachine, tmp_path: Path):
    folder = tmp_path / ("d" * 100)
    folder.mkdir()
    hmp, qmp = folder / "hmp", folder / "qmp"
    words = ("--qmp", machine.qmp_sockets[1], "--listen", hmp, "--qmp-listen", qmp)
    with Proxy(tmp_path, *words):
        assert hmp.stat().st_mode & 0o777 == 0o600
        for way in (("--qmp", qmp), ("--hmp", hmp)):
            done = run_proxy(*way, text="info status")
            assert (done.stdout, done.stderr) == ("VM status: paused (prelaunch)\n", "")
        done = run_proxy("--qmp", qmp, "--listen", hmp)
        assert done.stderr == f"qemu-hmp-proxy: {hmp}: somebody listens there already\n"
        done = run_cli("--qmp", qmp, tmp_path / "dump")
        assert done.returncode == 0, done.stderr  # notes of QEMU's came through the proxy as well
    assert list(folder.iterdir()) == []
    done = run_proxy("--qmp", qmp)
    assert done.returncode == 3
    assert f"cannot connect to QMP socket {qmp}: No such file or directory" in done.stderr


def test_lines_from_a_pipe(machine: QemuMachine):
    done = run_proxy("--qmp", machine.qmp_sockets[1], text="info status\nnosuch\ninfo name")
    assert done.stdout == "VM status: paused (prelaunch)\n"
    assert (done.returncode, done.stderr) == (0, "unknown command: 'nosuch'\n")
    for refused in ("nosuch", "info status x", "dump-guest-memory /dev/full/x", "print $nosuch"):
        done = run_proxy("--qmp", machine.qmp_sockets[1], text=f"info status\n{refused}")
        assert done.returncode in {1, 2, 4}, refused
        assert done.stdout == "VM status: paused (prelaunch)\n"
        assert done.stderr, refused


def test_dump_from_a_pipe_says_what_came_of_it(machine: QemuMachine, tmp_path: Path):
    line = f"dump-guest-memory {tmp_path / 'vm.elf'}\n"
    done = run_proxy("--qmp", machine.qmp_sockets[1], text=line)
    assert done.stdout.startswith(f"{tmp_path / 'vm.elf'}: elf, ")
    assert (done.returncode, done.stderr) == (0, "")
    done = run_proxy("--qmp", machine.qmp_sockets[1], text="dump-guest-memory -z /nowhere/x\n")
    assert done.stdout == ""
    assert "Error: " in done.stderr
    assert done.returncode


@pytest.mark.parametrize("way", ["--qmp", "--hmp"])
def test_qemu_is_killed_and_started_again(tmp_path: Path, way: str):
    upstream = tmp_path / "up"
    option = "-qmp" if way == "--qmp" else "-monitor"

    def start() -> subprocess.Popen[bytes]:
        arguments = ["-S", "-m", "16", "-nodefaults", "-display", "none"]
        process = subprocess.Popen(
            ["qemu-system-x86_64", *arguments, option, f"unix:{upstream},server=on,wait=off"],
            stdin=subprocess.DEVNULL,
        )
        wait_until(lambda: listens_at(upstream), "QEMU listens")
        return process

    qemu = start()
    try:
        with (
            Proxy(tmp_path, way, upstream) as proxy,
            HmpSocket(proxy.socket) as client,
        ):
            assert client.command(f"dump-guest-memory {tmp_path / 'a'}") == ""
            qemu.kill()
            qemu.wait()
            upstream.unlink()
            assert b"QEMU is gone" in client.wait(GONE_PROMPT)
            client.send(b"info status\n")
            assert b"\r\nError: QEMU is gone" in client.wait(GONE_PROMPT)
            client.send(f"dump-guest-memory {tmp_path / 'b'}\n".encode())
            assert b"\r\nError: QEMU is gone" in client.wait(GONE_PROMPT)
            with HmpSocket(proxy.socket, GONE_PROMPT) as late:
                assert late.banner.endswith(GONE_PROMPT)
            qemu = start()
            assert b" is back\r\n" in client.wait()
            assert client.command("info status") == "VM status: paused (prelaunch)\n"
            assert client.command(f"dump-guest-memory {tmp_path / 'b'}") == ""
            assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
            client.send(b"quit\n")
            with pytest.raises(EOFError):  # as QEMU's own monitor
                client.wait(GONE_PROMPT)
    finally:
        qemu.kill()
        qemu.wait()


def test_qemu_is_killed_in_the_middle_of_a_dump(tmp_path: Path):
    with stopped_machine(["qemu-system-x86_64"], _LARGE) as machine:
        proxy = Proxy(tmp_path, "--qmp", machine.qmp_sockets[0], "--memory", "pmemsave")
        with proxy, HmpSocket(proxy.socket) as client:
            client.send(f"dump-guest-memory {tmp_path / 'dump'}\n".encode())
            wait_until(lambda: partial_files(tmp_path), "the dump has begun")
            os.kill(machine.pid, 9)
            answer = client.wait(GONE_PROMPT)
            assert b"Error: " in answer
            wait_until(lambda: [path.name for path in tmp_path.iterdir()] == ["proxy"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_in_the_middle_of_a_dump(tmp_path: Path, number: signal.Signals):
    """The guest runs again, nothing is left behind, and one who waits is told."""
    with stopped_machine(["qemu-system-x86_64"], _LARGE) as machine:
        assert hmp_of(machine, "cont") == ""
        proxy = Proxy(tmp_path, "--qmp", machine.qmp_sockets[0], "--memory", "pmemsave")
        with HmpSocket(proxy.socket) as client:
            client.send(f"dump-guest-memory {tmp_path / 'dump'}\n".encode())
            wait_until(lambda: partial_files(tmp_path), "the dump has begun")
            proxy.process.send_signal(number)
            with pytest.raises(EOFError, match="cancelled"):
                client.wait(b"never")
        proxy.process.wait()
        assert proxy.stop() == (130, "")
        assert hmp_of(machine, "info status") == "VM status: running\n"
        assert list(tmp_path.iterdir()) == []
