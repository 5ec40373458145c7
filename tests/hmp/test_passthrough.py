"""Whatever is typed, the proxy sends the bytes that QEMU's own monitor sends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import stopped_machine
from tests.support.hmp_proxy import HmpSocket, Proxy, monitor_arguments
from tests.support.newer_qemu import newer_qemu_command

pytestmark = pytest.mark.qemu

COMMANDS = """
info version|info status|info name|info uuid|info kvm|info block|info blockstats|info block-jobs
info chardev|info cpus|info registers|info registers -a|info mtree|info mtree -f|info qtree
info qom-tree|info pci|info pic|info roms|info ramblock|info memdev|info memory-devices
info memory_size_summary|info hotpluggable-cpus|info mice|info migrate|info migrate_parameters
info migrate_capabilities|info network|info numa|info usb|info snapshots|info tpm|info iothreads
info trace-events|info balloon|info vnc|info lapic|info mem|info tlb|info dump|info|help info
help cont|help info status|help nosuch|print 1+1|print $pc|print/x -1|x /4xw 0|xp /4xb 0x1000
x /2i 0xfffffff0|sum 0 16|info nosuch|nosuch|info status extra|info registers 7|cpu 7|cpu 1
device_del nosuch|object_del nosuch|set_link nosuch on|eject nosuch|delvm nosuch|pmemsave 0 16
print 1+|print (|print $nosuch|x /q 0|stop|migrate_cancel|  info status|# hello|h\u00e9
dump-guest-memory|dump-guest-memory -q x|dump-guest-memory "x|quit now
""".replace("\n", "|").strip("|").split("|")  # fmt: skip

KEYS = {
    "empty line": b"\n",
    "carriage return and line feed": b"info status\r\n",
    "backspace": b"abc\x7f\x08\x7finfo kvm\n",
    "cursor keys": b"ello\x1b[D\x1b[D\x1b[D\x1b[D\x1b[Dh\x1b[C\x1b[C!\x05?\x01<\n",
    "home, end, delete": b"abc\x1bOHX\x1b[3~\x1bOFY\x1b[1~\x04\x1b[4~\n",
    "history": b"one\ntwo\none\n\x1b[A\x1b[A\x1b[B\x1b[B\x1b[B\x1b[A\n",
    "control n, p and u": b"one\ntwo\n\x10\x10\x0e\x15\n",
    "history is shown": b"first\ninfo history\n",
    "control w": b"a word  \x17\x17\x17again and\x17\x17\n",
    "one completion": b"info sta\tus\x15\n",
    "many completions": b"q\t\x17info b\tl\t\x17\x17\n",
    "all sub-commands": b"info \t\x17\n",
    "help completes": b"help scree\t\x17\x17\n",
    "file name": b"dump-guest-memory /etc/hos\t\x17\x17\n",
    "directory": b"dump-guest-memory /us\t\x17\x17\n",
    "nothing to complete": b"nosuch \tabc\tx\n",
    "unknown sequences": b"\x1b[Z\x1bq\x1b[5~\x9bA\x00\x02\x1bOXa\n",
    "not UTF-8 and control keys": b"a\x03b\x0c\x1fc\n",
    "longest line": b"x" * 300 + b"\n",
}


@dataclass(frozen=True)
class Pair:
    """The monitor of one QEMU, by itself and through the proxy."""

    direct: HmpSocket
    proxied: HmpSocket


@pytest.fixture(scope="module", params=["7.2", "11"])
def pair(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder: Path = tmp_path_factory.mktemp("m")
    command = ["qemu-system-x86_64"] if request.param == "7.2" else newer_qemu_command()
    arguments = ["-M", "q35", "-smp", "2", *monitor_arguments(folder / "monitor")]
    with (
        stopped_machine(command, arguments) as machine,
        Proxy(folder, "--qmp", machine.qmp_sockets[0]) as proxy,
        HmpSocket(folder / "monitor") as direct,
        HmpSocket(proxy.socket) as proxied,
    ):
        yield Pair(direct, proxied)


def test_banner_and_prompt(pair: Pair):
    assert re.fullmatch(rb"QEMU \d+\.\d+\.\d+ monitor .*\r\n\(qemu\) ", pair.direct.banner)
    assert pair.proxied.banner == pair.direct.banner


def test_there_are_enough_commands():
    assert len(set(COMMANDS)) >= 40


@pytest.mark.parametrize("line", COMMANDS)
def test_command_gives_the_same_bytes(pair: Pair, line: str):
    assert pair.proxied.exchange(line) == pair.direct.exchange(line)


@pytest.mark.parametrize("name", KEYS)
def test_keys_give_the_same_bytes(pair: Pair, name: str):
    for client in (pair.direct, pair.proxied):
        client.send(KEYS[name] + b"print/d 4711\n")
    last = b"\r\n4711\r\n(qemu) "
    assert pair.proxied.wait(last) == pair.direct.wait(last)


def test_help_is_that_of_qemu_with_ours_in_place(pair: Pair):
    direct, proxied = pair.direct.command("help"), pair.proxied.command("help")
    before, begin, rest = proxied.partition("dump-cancel ")
    after = rest[rest.index("\n", rest.index("--native")) + 1 :]
    assert begin
    assert direct.startswith(before)
    assert direct.endswith(after)
    assert direct.removeprefix(before).removesuffix(after).startswith("dump-guest-memory ")
    assert "--native" in pair.proxied.command("help dump-guest-memory")
    assert pair.proxied.command("help dump-cancel").startswith("dump-cancel ")
