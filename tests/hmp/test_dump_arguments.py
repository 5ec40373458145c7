"""What `dump-guest-memory` refuses at both doors, and in which words: as QEMU, case by case.

Of two machines that are alike, one is asked directly, the other one through the proxy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qemu_dump_ext.guest_images.machine import stopped_machine
from tests.support.hmp_proxy import HmpSocket, Proxy, QmpSocket, monitor_arguments, partial_files
from tests.support.newer_qemu import newer_qemu_command

pytestmark = pytest.mark.qemu

DUMP = "dump-guest-memory"
PLAIN: dict[str, Any] = {"paging": False, "protocol": "file:/dev/null"}
RANGE: dict[str, Any] = {**PLAIN, "begin": 0, "length": 16}
MEMORY = 16 << 20
# 7.2 says more than it means to where its standard error is a terminal's.
NOISE = "GLib: g_array_unref: assertion 'array' failed\n"


@dataclass(frozen=True)
class Pair:
    """A machine that is asked directly and one that is asked through the proxy."""

    direct_qmp: QmpSocket
    proxied_qmp: QmpSocket
    direct_hmp: HmpSocket
    proxied_hmp: HmpSocket

    def same_qmp(self, text: str, *descriptors: int) -> list[dict[str, Any]]:
        """Return the messages that both give, after having compared them."""
        direct = self.direct_qmp.raw(text, list(descriptors))
        assert self.proxied_qmp.raw(text, list(descriptors)) == direct
        return direct

    def same_hmp(self, line: str) -> str:
        """Return the answer that both give, after having compared them."""
        direct = self.direct_hmp.command(line).replace(NOISE, "")
        assert self.proxied_hmp.command(line) == direct
        return direct


@pytest.fixture(scope="module", params=["7.2", "11"])
def pair(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    command = ["qemu-system-x86_64"] if request.param == "7.2" else newer_qemu_command()
    folder = tmp_path_factory.mktemp("p")
    arguments = ["-M", "q35", "-m", str(MEMORY >> 20), "-nodefaults"]
    with (
        stopped_machine(command, [*arguments, *monitor_arguments(folder / "monitor")]) as alone,
        stopped_machine(command, [*arguments, *monitor_arguments(folder / "other")]) as machine,
        Proxy(folder, "--qmp", machine.qmp_sockets[0], qmp=True) as proxy,
        QmpSocket(alone.qmp_sockets[0]) as direct_qmp,
        QmpSocket(proxy.qmp_socket) as proxied_qmp,
        HmpSocket(folder / "monitor") as direct_hmp,
        HmpSocket(proxy.socket) as proxied_hmp,
    ):
        for client in (direct_qmp, proxied_qmp):
            client.execute("qmp_capabilities")
        yield Pair(direct_qmp, proxied_qmp, direct_hmp, proxied_hmp)


def _dump(arguments: object) -> str:
    return json.dumps({"execute": DUMP, "arguments": arguments})


BOUNDS: list[object] = [
    *(-1, -(1 << 63), -(1 << 63) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**400),
    *(1.0, 1.5, 1e300, -0.0, 0, True, None, "", "1", [], {}),
]
PROTOCOLS: list[object] = [
    *(None, 1, 1.5, True, [], {}, "", "x", "/dev/null", "FILE:/x", "exec:cat", "unix:/x"),
    *("fd:", "fd:0", "fd:-1", "fd:nosuch", "fd:5a", "fd:99999999999", "fd:/dev/fdset/1", "fd:é"),
    *("file:", "file:nosuch/x", "file:/no/such", "file:/tmp", "file:/tmp/", "file:/nosuch/"),
    *("file:/dev/fdset/0", "file:/dev/fdset/99", "file:/dev/fdset/x", "file:/dev/fdset/"),
    *("file:/dev/fdset/-1", "file:/dev/fdset/1/2", "file:/dev/fd/77", "file:/proc/self/fd/77"),
    *("file:/dev/null/x", "file:" + "a" * 300, "file:/" + "a/" * 3000, "file:a\nb/c"),
    *("file:/nosuché/x\x1b[1m", "file:/nosuch/\x7f\t\u200b", "file:/dev/full"),
]
FORMATS: list[object] = [
    *(None, 1, True, [], {}, "", "ELF", "elf ", "kdump", "kdump-raw-", "kdump-raw-elf", "win-dmp"),
    *("kdump-zlib", "kdump-lzo", "kdump-snappy", "nosuch"),
]
WRONG_FLAGS: list[object] = [0, 1, None, "", []]
REFUSED_BY_QMP: list[dict[str, Any]] = [
    *({**RANGE, name: bound} for name in ("begin", "length") for bound in BOUNDS),
    *({**RANGE, name: value} for name in ("paging", "detach") for value in WRONG_FLAGS),
    *({**RANGE, "protocol": protocol} for protocol in PROTOCOLS),
    *({**RANGE, "format": name} for name in FORMATS),
    *({**PLAIN, "format": name, "paging": True} for name in FORMATS),
    *({**PLAIN, "format": name, "begin": 1} for name in FORMATS),
    *({}, {"paging": False}, {"protocol": "file:/dev/null"}, {**PLAIN, "begin": 0}),
    *({**PLAIN, "length": 1}, {**PLAIN, "foo": 1}, {**PLAIN, "foo": None}),
    *({**RANGE, "length": 0}, {**RANGE, "begin": 1 << 50}, {**RANGE, "begin": MEMORY}),
    {**RANGE, "begin": (1 << 63) - 1, "length": (1 << 63) - 1},
    {**RANGE, "begin": None, "length": None},
    {**RANGE, "protocol": "file:/dev/full", "length": 1 << 20},
]


@pytest.mark.parametrize("arguments", REFUSED_BY_QMP, ids=lambda case: json.dumps(case)[:80])
def test_qmp(pair: Pair, arguments: dict[str, Any]):
    pair.same_qmp(_dump(arguments))


@pytest.mark.parametrize("arguments", [None, 1, "x", [], [{}]])
@pytest.mark.parametrize("command", [DUMP, "query-dump", "closefd", "human-monitor-command"])
def test_qmp_arguments_that_are_no_object(pair: Pair, command: str, arguments: object):
    pair.same_qmp(json.dumps({"execute": command, "arguments": arguments}))


@pytest.mark.parametrize("member", ["execute", "exec-oob"])
@pytest.mark.parametrize("name", [None, 1, [], {}, [DUMP]])
def test_qmp_command_that_is_no_name(pair: Pair, member: str, name: object):
    pair.same_qmp(json.dumps({member: name}))


NUMBERS = [
    *("-1", "~0", "0-1", "1*-1", "-0x8000000000000000", "0x7fffffffffffffff"),
    *("0x8000000000000000", "0xffffffffffffffff", "0x10000000000000000", "18446744073709551616"),
    *("1.5", "''", "'a'", "(1", "1)", "1/0", "1+", "08", "0x", "0xg", "1e3", '"1"', "[1]", "1<<2"),
    *("$", "$nosuch", "4k", "true"),
]
NAMES = [
    *("/dev/fdset/1", "/dev/fdset/x", "/dev/fdset/", "/dev/fd/77", "/proc/self/fd/77"),
    *("/dev/null/x", "/dev/stdout/x", "/proc/self/x", "/", "/tmp", "/tmp/", "/nosuch/"),
    *("/no/such/folder", '""', '"/tmp"', '"/tmp', '"/\\q"', "'x'/y", "a" * 300, "fd:3/x"),
    *("/nosuch/\x01\x02", "/nosuch/é", '"/nosuch/\\x1b[1m"', "file:/no/x", "~/x/y", "$HOME/x"),
    *("|cat/x", "/dev/full", "/dev"),
]
FLAGS = [
    *("-w -p", "-p -z", "-p -p", "-d -z", "-z -d", "-z -l", "-z -w", "-zl", "-pd", "-d -p", "-q"),
    *("-1", "-", "--", "--nosuch", "-p-", "-R -z", "-w -R"),
]
REFUSED_BY_HMP = [
    *(f"/dev/null {number} 16" for number in NUMBERS),
    *(f"/dev/null 0 {number}" for number in NUMBERS),
    *(f"{flag}{name} 0 16" for name in NAMES for flag in ("", "-p ")),
    *(f"-z {name}" for name in NAMES),
    *(f"{flag} /dev/null 0 0" for flag in FLAGS),
    *(f"{flag} /nosuch/x" for flag in FLAGS),
    *("", "-p", "-z", "/dev/null 0", "/dev/null 0 0", "/dev/null 0 1 2", "/dev/null 1 , 2"),
    *("-z /dev/null 0 1", f"/dev/null {MEMORY} 1", "/dev/null 0xffff00000000 16"),
]


@pytest.mark.parametrize("words", REFUSED_BY_HMP, ids=lambda words: words[:40])
def test_hmp(pair: Pair, words: str):
    pair.same_hmp(f"{DUMP} {words}")


def test_set_of_descriptors_is_a_name_of_qemu(pair: Pair, tmp_path: Path):
    """`/dev/fdset/N` is what add-fd has given to QEMU; no such file is ever made."""
    for door in ("qmp", "hmp"):
        paths = [tmp_path / f"{door} direct", tmp_path / f"{door} proxied"]
        for client, path in zip((pair.direct_qmp, pair.proxied_qmp), paths, strict=True):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
            try:
                added = client.execute("add-fd", [descriptor], **{"fdset-id": 5})[-1]["return"]
            finally:
                os.close(descriptor)
            assert added["fdset-id"] == 5
        if door == "qmp":
            pair.same_qmp(_dump({**RANGE, "protocol": "file:/dev/fdset/5"}))
        else:
            assert pair.same_hmp(f"{DUMP} /dev/fdset/5 0 16") == ""
        pair.same_qmp('{"execute":"remove-fd","arguments":{"fdset-id":5}}')
        assert paths[0].read_bytes() == paths[1].read_bytes() != b""


def test_what_qemu_does_not_know_is_refused_where_only_qemu_can_write(pair: Pair):
    for words in ("-z zstd", "--snapshot", "--mended", "--memory pmemsave"):
        answer = pair.proxied_hmp.command(f"{DUMP} {words} /dev/fdset/5")
        assert answer.startswith("Error: /dev/fdset/5 is opened by QEMU alone")


def test_descriptor_of_the_process_is_that_of_qemu(pair: Pair, tmp_path: Path):
    path, link = tmp_path / "dump", tmp_path / "link"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        number = pair.proxied_qmp.execute("add-fd", [descriptor])[-1]["return"]["fd"]
    finally:
        os.close(descriptor)
    link.symlink_to(f"/dev/fd/{number}")
    for name in (f"/proc/self/fd/{number}", f"/dev/fd/{number}", link):
        assert pair.proxied_hmp.command(f"{DUMP} {name} 0 16") == ""
        assert path.read_bytes().startswith(b"\x7fELF")
        path.write_bytes(b"")
    assert link.is_symlink()
    assert partial_files(tmp_path) == []
