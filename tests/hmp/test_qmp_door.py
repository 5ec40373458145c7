"""The QMP door: what QEMU's own QMP socket would send, message by message."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from tests.support.doors import child_environment
from tests.support.hmp_proxy import (
    Proxy,
    QmpSocket,
    assert_sound,
    hmp_of,
    partial_files,
    proxy_argv,
)
from tests.support.lying_qmp import DEEP, LyingQmp
from tests.support.newer_qemu import newer_qemu_command, refusal_of_own_qemu
from tests.support.ports import reserved_port
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu

DUMP = "dump-guest-memory"
IN_PROCESS = {"class": "GenericError", "desc": "There is a dump in process, please wait."}


@dataclass(frozen=True)
class Pair:
    """Two machines that are alike: one is asked directly, the other one through the proxy."""

    direct: QmpSocket
    proxied: QmpSocket
    machine: QemuMachine
    alone: QemuMachine
    proxy: Proxy

    def same(self, name: str, **arguments: Any) -> list[dict[str, Any]]:
        """Return the messages that both give, after having compared them."""
        direct = self.direct.execute(name, **arguments)
        proxied = self.proxied.execute(name, **arguments)
        assert proxied == direct
        assert [list(message) for message in proxied] == [list(message) for message in direct]
        return proxied


@pytest.fixture(scope="module", params=["7.2", "11"])
def pair(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    command = ["qemu-system-x86_64"] if request.param == "7.2" else newer_qemu_command()
    arguments = ["-M", "q35", "-m", "16"]
    with (
        stopped_machine(command, arguments) as alone,
        stopped_machine(command, arguments) as machine,
        Proxy(tmp_path_factory.mktemp("p"), "--qmp", machine.qmp_sockets[0], qmp=True) as proxy,
        QmpSocket(alone.qmp_sockets[0]) as direct,
        QmpSocket(proxy.qmp_socket) as proxied,
    ):
        for client in (direct, proxied):
            client.execute("qmp_capabilities", enable=["oob"])
        yield Pair(direct, proxied, machine, alone, proxy)


@pytest.mark.parametrize("kind", ["deep", "no JSON"])
def test_an_answer_that_makes_no_sense_costs_that_question_alone(tmp_path: Path, kind: str):
    with (
        stopped_machine(["qemu-system-x86_64"], ["-m", "16"]) as machine,
        LyingQmp(machine.qmp_sockets[0], tmp_path / "liar").running() as liar,
        Proxy(tmp_path, "--qmp", liar.path, qmp=True) as proxy,
        QmpSocket(proxy.qmp_socket) as client,
    ):
        client.execute("qmp_capabilities")
        if kind == "deep":
            liar.lies = {"query-name": DEEP}
        else:
            liar.replies = {"query-name": b'{"return": nonsense, "id": "@ID@"}\n'}
        answer = client.execute("query-name")[-1]
        assert answer["id"] == "an id"
        assert answer["error"]["desc"].startswith("the answer makes no sense: ")
        assert client.execute("query-kvm")[-1]["return"]["present"] in {True, False}
        assert liar.connections == 1


def test_negotiation(pair: Pair):
    with (
        QmpSocket(pair.alone.qmp_sockets[1]) as direct,
        QmpSocket(pair.proxy.qmp_socket) as proxied,
    ):
        fresh = replace(pair, direct=direct, proxied=proxied)
        assert proxied.greeting == direct.greeting
        assert fresh.same("query-status")[-1]["error"]["class"] == "CommandNotFound"
        fresh.same("qmp_capabilities", enable=["oob"])
        fresh.same("qmp_capabilities")


@pytest.mark.parametrize(
    "text",
    [
        '{"execute":"query-name"}',
        '{"execute":"query-name","id":{"a":[1,2.5,null,"\\u00e9"]}}',
        "{'execute':'query-name','id':'it\\'s \"x\"'}",
        '{"execute":\n"query-status"\r\n}',
        '{"execute":"query-name","foo":1}',
        '{"execute":"query-name","arguments":1,"id":1}',
        '{"execute":1}',
        '{"a":1}',
        "[1]",
        "{}",
        "5\n",
        "nonsense\n",
        '{"exec-oob":"query-status","id":3}',
        '{"exec-oob":"migrate-pause","id":3}',
        '{"execute":"human-monitor-command","arguments":{"command-line":"info status"}}',
        '{"execute":"human-monitor-command","arguments":{"command-line":"cpu 7"}}',
        '{"execute":"human-monitor-command","arguments":{}}',
    ],
)
def test_requests_of_all_kinds(pair: Pair, text: str):
    direct = pair.direct.raw(text)
    for message in direct:  # newer versions say where in the stream
        if "error" in message:
            message["error"]["desc"] = re.sub(r"^\d+:\d+: ", "", message["error"]["desc"])
    assert pair.proxied.raw(text) == direct


@pytest.mark.parametrize(
    "garbage",
    [
        b'{"execute":"query-name" "x"}\n',
        b'{"a":"\\ud800"}\n',
        b'{"a":"\\u0000"}\n',
        b'{"a":NaN}\n',
        b"{'a':'\n",
        b"[[[[\xff",
        b"]}\n",
        b"[" * 2000 + b"\xff",
        os.urandom(4096).replace(b"{", b"") + b"\n\xff",
    ],
)
def test_garbage_is_refused_and_forgotten(pair: Pair, garbage: bytes):
    with QmpSocket(pair.proxy.qmp_socket) as client:
        client.execute("qmp_capabilities")
        client._socket.sendall(garbage + b'{"execute":"query-name","id":"after"}')
        refused = client.message()
        assert refused["error"]["class"] == "GenericError"
        while client.message().get("id") != "after":
            pass


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"paging": False, "protocol": "fd:nosuch"},
        {"paging": False, "protocol": "file:/no/such"},
        {"paging": False, "protocol": "file:/x", "begin": 1},
        {"paging": False, "protocol": "file:/x", "format": "nosuch"},
        {"paging": False, "protocol": "file:/dev/null", "begin": 0, "length": 0},
        {"paging": False, "protocol": "file:/dev/null", "begin": 1 << 50, "length": 1},
        {"paging": False, "protocol": "file:/dev/full"},
    ],
)
def test_some_refusals_count_as_a_dump_that_failed(pair: Pair, arguments: dict[str, Any]):
    pair.same(DUMP, paging=False, protocol="file:/dev/null", begin=0, length=16)
    assert "error" in pair.same(DUMP, **arguments)[-1]
    pair.same("query-dump")


@pytest.mark.parametrize(
    ("extension", "said"),
    [
        ({"x-live": "maybe"}, "x-live: one of require, prefer expected"),
        ({"x-dump-level": 32}, "x-dump-level: '32' is no dump level from 0 to 31"),
        ({"x-dump-level": True}, "x-dump-level: a number, or a text such as '31!', expected"),
        ({"x-dump-level": "31!"}, "there is no VMCOREINFO"),
        ({"x-mini": "tiny"}, "x-mini: one of usual, smallest expected"),
        ({"x-mini": "usual", "x-dump-level": 3}, "a mini dump is of dump level 31"),
        ({"x-mini": "usual", "begin": 0, "length": 16}, "kdump-compressed format doesn't support"),
        ({"x-max-bytes": "1GiB"}, "x-max-bytes: a number of bytes above 0 expected"),
        ({"x-max-bytes": 1024}, "given up: the dump takes more than 1024 bytes"),
    ],
)
def test_what_is_wrong_with_an_argument_of_ours(
    pair: Pair, tmp_path: Path, extension: dict[str, Any], said: str
):
    wanted: dict[str, Any] = {"paging": False, "protocol": f"file:{tmp_path / 'none'}"}
    answer = pair.proxied.execute(DUMP, **wanted, **extension)[-1]
    assert said in answer["error"]["desc"]
    assert not list(tmp_path.iterdir())


def test_capability_is_that_of_qemu_and_more(pair: Pair):
    (direct,) = pair.direct.execute("query-dump-guest-memory-capability")
    (proxied,) = pair.proxied.execute("query-dump-guest-memory-capability")
    assert proxied.keys() == direct.keys()
    assert proxied["return"].keys() == {"formats"}
    more = set(proxied["return"]["formats"])
    assert more > set(direct["return"]["formats"])
    assert "kdump-raw-zstd" in more


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("dump_format", ["elf", "kdump-zlib"])
def test_dump_with_its_events(pair: Pair, tmp_path: Path, dump_format: str, running: bool):
    pair.same("cont" if running else "stop")
    target = tmp_path / "dump"
    messages = pair.same(DUMP, paging=False, protocol=f"file:{target}", format=dump_format)
    names = [message.get("event") for message in messages]
    expected = ["STOP", "DUMP_COMPLETED", "RESUME"] if running else ["DUMP_COMPLETED"]
    assert names == [*expected, None]
    pair.same("query-dump")
    pair.same("query-status")
    assert target.stat().st_mode & 0o777 == 0o600  # ours came second


def test_dump_through_a_descriptor(pair: Pair, tmp_path: Path):
    pair.same("stop")
    files = []
    for name, client in (("native", pair.direct), ("ours", pair.proxied)):
        files.append(tmp_path / name)
        descriptor = os.open(files[-1], os.O_RDWR | os.O_CREAT, 0o600)
        try:
            assert client.execute("getfd", [descriptor], fdname="target")[-1]["return"] == {}
        finally:
            os.close(descriptor)
        messages = client.execute(DUMP, paging=True, protocol="fd:target")
        assert [message.get("event") for message in messages] == ["DUMP_COMPLETED", None]
        again = client.execute(DUMP, paging=True, protocol="fd:target")
        assert again[-1]["error"]["desc"].endswith("'target' has not been found")
    assert files[0].stat().st_size
    # Both machines are alike, but for what ran meanwhile.
    assert files[0].stat().st_size == files[1].stat().st_size
    assert_sound(files[1])


def test_dump_is_that_of_the_same_machine(pair: Pair, tmp_path: Path):
    pair.proxied.execute("stop")
    ours, native = tmp_path / "ours", tmp_path / "native"
    pair.proxied.execute(DUMP, paging=False, protocol=f"file:{ours}", format="kdump-zlib")
    assert hmp_of(pair.machine, f"dump-guest-memory -z {native}") == ""
    pair.proxied.until_event("DUMP_COMPLETED")  # of the native one
    assert filecmp.cmp(ours, native, shallow=False)


def test_human_monitor_command_is_ours_as_well(pair: Pair, tmp_path: Path):
    path = tmp_path / "dump"
    line: dict[str, Any] = {"command-line": f"dump-guest-memory -z zstd -R {path}"}
    assert pair.proxied.execute("human-monitor-command", **line)[-1]["return"] == ""
    assert_sound(path)
    line = {"command-line": "info dump"}
    answer = pair.proxied.execute("human-monitor-command", **line)[-1]
    assert answer["return"] == "Status: completed\r\n"


def test_shell_of_qemu_qmp(pair: Pair):
    shell = str(Path(sys.executable).with_name("qmp-shell"))
    for words, line, expected in (
        ([], "query-version", '"major": '),
        (["-H"], "info status", "VM status: "),
    ):
        done = subprocess.run(
            [shell, *words, pair.proxy.qmp_socket],
            input=line + "\n",
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        assert "Connected to QEMU" in done.stdout
        assert expected in done.stdout


@dataclass(frozen=True)
class Slow:
    """A running machine that takes a while to dump."""

    machine: QemuMachine
    proxy: Proxy


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slow]:
    with (
        stopped_machine(["qemu-system-x86_64"], ["-M", "q35", "-m", "640"]) as machine,
        Proxy(
            tmp_path_factory.mktemp("p"),
            *("--qmp", machine.qmp_sockets[0], "--memory", "pmemsave"),
            qmp=True,
        ) as proxy,
    ):
        hmp_of(machine, "cont")
        yield Slow(machine, proxy)


def _client(proxy: Proxy, *, oob: bool = False) -> QmpSocket:
    client = QmpSocket(proxy.qmp_socket)
    client.execute("qmp_capabilities", enable=["oob"] if oob else [])
    return client


def test_detached_dump(slow: Slow, tmp_path: Path):
    path = tmp_path / "dump"
    with _client(slow.proxy) as one, _client(slow.proxy) as two:
        started = one.execute(DUMP, paging=False, protocol=f"file:{path}", detach=True)
        assert [message.get("event") for message in started] == ["STOP", None]
        assert two.execute("query-status")[-1]["return"]["status"] == "save-vm"
        for name in ("cont", "stop"):
            assert two.execute(name)[-1]["error"] == IN_PROCESS
        second = two.execute(DUMP, paging=False, protocol=f"file:{path}2")
        assert second[-1]["error"] == IN_PROCESS
        active = two.execute("query-dump")[-1]["return"]
        assert list(active) == ["total", "status", "completed"]
        assert active["status"] == "active"
        assert active["total"] > 640 << 20
        for client in (one, two):
            *_, completed, resumed = client.until_event("RESUME")
            assert resumed == {"event": "RESUME"}
            assert completed == {
                "event": "DUMP_COMPLETED",
                "data": {
                    "result": {
                        "total": active["total"],
                        "status": "completed",
                        "completed": active["total"],
                    }
                },
            }
    assert_sound(path)


def test_client_gone(slow: Slow, tmp_path: Path):
    foreground, detached = tmp_path / "foreground", tmp_path / "detached"
    with _client(slow.proxy) as watching:
        with _client(slow.proxy) as leaving:
            request = f'{{"execute":"{DUMP}","arguments":{{"paging":false,"protocol":"file:%s"}}}}'
            leaving._socket.sendall((request % foreground).encode())
            wait_until(
                lambda: (
                    watching.execute("query-dump")[-1]["return"]["completed"]
                    and watching.execute("query-dump")[-1]["return"]["status"] == "active"
                )
            )
        failed = watching.until_event("DUMP_COMPLETED")[-1]["data"]
        assert failed["error"] == "dump: cancelled"
        assert failed["result"]["status"] == "failed"
        watching.until_event("RESUME")
        assert not foreground.exists()
        assert partial_files(tmp_path) == []
        with _client(slow.proxy) as leaving:
            leaving.execute(DUMP, paging=False, protocol=f"file:{detached}", detach=True)
        assert "error" not in watching.until_event("DUMP_COMPLETED")[-1]["data"]
        watching.until_event("RESUME")
    assert_sound(detached)
    assert hmp_of(slow.machine, "info status") == "VM status: running\n"


def test_out_of_band_overtakes_a_dump(slow: Slow, tmp_path: Path):
    with _client(slow.proxy, oob=True) as client:
        client._socket.sendall(
            f'{{"execute":"{DUMP}","id":"in band","arguments":'
            f'{{"paging":false,"protocol":"file:{tmp_path / "dump"}"}}}}'
            '{"execute":"query-name","id":"behind"}'
            '{"exec-oob":"migrate-pause","id":"out of band"}'.encode()
        )
        order: list[str] = []
        while len(order) < 3:
            message = client.message()
            if "id" in message:
                order.append(message["id"])
        assert order == ["out of band", "in band", "behind"]


def test_way_of_virtme_ng(tmp_path: Path):
    """The steps of `vng --dump`, virtme_ng/run.py: TCP, fixed reads, a file that exists."""
    with stopped_machine(["qemu-system-x86_64"], ["-m", "32"]) as machine, reserved_port() as port:
        hmp_of(machine, "cont")  # its event must not come among the answers that are counted
        argv = proxy_argv("--qmp", machine.qmp_sockets[0], "--qmp-listen", f"localhost:{port}")
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, env=child_environment())
        try:
            client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            wait_until(lambda: client.connect_ex(("localhost", port)) == 0, "the proxy listens")
            target = tmp_path / "dump"
            with client, tempfile.NamedTemporaryFile(dir=tmp_path, delete=False) as file:
                assert client.recv(1024)
                client.send(b'{ "execute": "qmp_capabilities" }\r')
                assert client.recv(1024)
                client.send(
                    b'{"execute":"dump-guest-memory","arguments":{"paging":true,"protocol":"file:'
                    + file.name.encode()
                    + b'"}}\r'
                )
                assert client.recv(1024)
                assert client.recv(1024)
                shutil.move(file.name, target)
            assert target.stat().st_size > 32 << 20
            assert_sound(target)
        finally:
            process.terminate()
            process.wait()


def test_target_that_we_do_not_know_is_left_to_qemu(tmp_path: Path):
    program = shutil.which("qemu-system-tricore")
    if program is None:
        pytest.skip("qemu-system-tricore is not installed")
    refused = {"class": "GenericError", "desc": refusal_of_own_qemu()}
    with (
        stopped_machine([program], ["-M", "tricore_testboard"]) as machine,
        Proxy(tmp_path, "--qmp", machine.qmp_sockets[0], qmp=True) as proxy,
        _client(proxy) as client,
        (tmp_path / "by descriptor").open("wb") as file,
    ):
        by_name = client.execute(DUMP, paging=False, protocol=f"file:{tmp_path / 'by name'}")
        client.execute("getfd", [file.fileno()], fdname="target")
        by_descriptor = client.execute(DUMP, paging=False, protocol="fd:target")
        assert by_name[-1]["error"] == by_descriptor[-1]["error"] == refused
        assert partial_files(tmp_path) == []


def test_clients_lose_their_connection_when_qemu_ends(tmp_path: Path):
    with (
        stopped_machine(["qemu-system-x86_64"]) as machine,
        Proxy(tmp_path, "--qmp", machine.qmp_sockets[0], qmp=True) as proxy,
    ):
        with _client(proxy) as client:
            client.execute("quit")
            with pytest.raises(EOFError):
                client.until_event("never")
        with pytest.raises(EOFError):
            QmpSocket(proxy.qmp_socket)
