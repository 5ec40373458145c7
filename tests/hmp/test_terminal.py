"""The proxy at a terminal: for people with prompt_toolkit, and as QEMU's own -monitor stdio."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from tests.hmp.test_passthrough import COMMANDS
from tests.support.doors import child_environment
from tests.support.hmp_proxy import assert_sound, hmp_of, partial_files, proxy_argv
from tests.support.waiting import SECONDS, wait_until

pytestmark = pytest.mark.qemu

_PROMPT = r"\(qemu\)"
_ARGUMENTS = ["-M", "q35", "-smp", "2"]
# Host addresses, threads and sockets are of one process alone.
_OTHER_EACH_TIME = re.compile(r"thread_id=\d+|0x[0-9a-f]{12}|disconnected:\S+|unix:\S+|\S+ -> \S+")
_OF_ONE_PROCESS = {"info chardev", "info mtree", "info mtree -f", "info qom-tree", "info qtree"}
_ON_STDOUT = {'dump-guest-memory "x'}  # QEMU prints its complaint past its monitor


def _spawn(argv: list[str], **changes: str) -> pexpect.spawn[str]:
    return pexpect.spawn(
        argv[0],
        argv[1:],
        env=child_environment(**changes),
        encoding="utf-8",
        timeout=SECONDS,
        dimensions=(50, 200),
    )


@pytest.fixture(scope="module")
def machine() -> Iterator[QemuMachine]:
    with stopped_machine(["qemu-system-x86_64"], [*_ARGUMENTS, "-m", "640"]) as machine:
        yield machine


def test_forty_commands_as_at_the_terminal_of_qemu():
    qemu = shutil.which("qemu-system-x86_64") or ""
    common = ["-S", "-m", "64", "-nodefaults", "-display", "none", *_ARGUMENTS]
    direct = _spawn([qemu, *common, "-monitor", "stdio"])
    with stopped_machine([qemu], _ARGUMENTS) as machine:
        proxied = _spawn([*proxy_argv("--qmp", machine.qmp_sockets[0]), "--plain"])
        for terminal in (direct, proxied):
            terminal.expect(_PROMPT + " ")
        assert direct.before == proxied.before
        compared = 0
        for line in COMMANDS:
            if line in _OF_ONE_PROCESS | _ON_STDOUT or not line.isascii():
                continue
            answers = []
            for terminal in (direct, proxied):
                terminal.send(line + "\r")
                terminal.expect(r"\n\(qemu\) $")
                answers.append(_OTHER_EACH_TIME.sub("", str(terminal.before)))
            assert answers[0] == answers[1], line
            compared += 1
        assert compared >= 40
        for terminal in (direct, proxied):
            terminal.send("quit\r")
            terminal.expect(pexpect.EOF)
            terminal.wait()
        assert direct.before == proxied.before
        assert proxied.exitstatus == 0


def test_a_session_at_the_terminal(machine: QemuMachine, tmp_path: Path):
    state = tmp_path / "state"
    argv = proxy_argv("--qmp", machine.qmp_sockets[0], "--memory", "pmemsave")
    terminal = _spawn(argv, TERM="xterm", XDG_STATE_HOME=str(state))
    terminal.expect(r"QEMU \d+\.\d+\.\d+ monitor - type 'help' for more information")
    terminal.expect(_PROMPT)
    # Completion: a command, a sub-command, a file name.
    terminal.send("info sta\t")
    terminal.expect("stats")
    terminal.send("us\r")
    terminal.expect(r"VM status: paused")
    terminal.expect(_PROMPT)
    (tmp_path / "folder-of-dumps").mkdir()
    terminal.send(f"dump-guest-memory {tmp_path}/folder-of\t")
    terminal.expect("-dumps/")
    terminal.send("one\r")
    terminal.expect(r"\d+\.\d %  \d+ of 640 MiB")
    terminal.expect(r"one: elf, 640\.\d MiB of guest memory")
    terminal.expect(_PROMPT)
    assert_sound(tmp_path / "folder-of-dumps" / "one")
    # Ctrl-C ends the dump, and not the proxy; the guest runs again.
    terminal.send("cont\r")
    terminal.expect(_PROMPT)
    terminal.send(f"dump-guest-memory {tmp_path}/two\r")
    terminal.expect(r"\d+\.\d %")
    terminal.sendintr()
    terminal.expect("Error: dump: cancelled")
    terminal.expect(_PROMPT)
    assert hmp_of(machine, "info status") == "VM status: running\n"
    assert not (tmp_path / "two").exists()
    assert partial_files(tmp_path) == []
    # History goes from one session to the next.
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    terminal.wait()
    assert terminal.exitstatus == 0
    assert "info status" in (state / "qemu-hmp-proxy" / "history").read_text("utf-8")


def test_quit_ends_qemu_and_the_proxy():
    with stopped_machine(["qemu-system-x86_64"]) as own:
        terminal = _spawn(proxy_argv("--qmp", own.qmp_sockets[0]), TERM="xterm")
        terminal.expect(_PROMPT)
        terminal.send("quit\r")
        terminal.expect(pexpect.EOF)
        terminal.wait()
        assert terminal.exitstatus == 0
        wait_until(lambda: not own.is_running(), "QEMU ended")


@pytest.mark.parametrize("words", [(), ("--plain",)])
def test_what_others_have_chosen_is_not_obeyed_by_the_terminal(words: tuple[str, ...]):
    with stopped_machine(["qemu-system-x86_64"], ["-name", "a\x1b[35mb\x9bc"]) as own:
        terminal = _spawn([*proxy_argv("--qmp", own.qmp_sockets[0]), *words], TERM="xterm")
        terminal.expect(_PROMPT)
        terminal.send("info name\r")
        terminal.expect(r"a\\u001b\[35mb")
        assert "\x1b[35m" not in str(terminal.before)
        terminal.expect(_PROMPT)
        terminal.sendeof() if not words else terminal.send("quit\r")
        terminal.expect(pexpect.EOF)
        terminal.wait()
