"""What five people see who come for the first time, each at a terminal of 80 columns.

What differs from one run to the next is replaced: numbers by N, paths by names.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.support.bare_crashes import bare_machine
from tests.support.crash_agent import CrashAgent
from tests.support.doors import child_environment
from tests.support.waiting import SECONDS

pytestmark = pytest.mark.qemu

COLUMNS = 80


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuMachine]:
    with bare_machine(tmp_path_factory.mktemp("walk"), "halt") as machine:
        yield machine


def at_terminal(directory: Path, program: str, *words: object, status: int = 0) -> str:
    """Return what a program of ours shows, as it stands on the screen at last, `normalised`."""
    return normalised(shown_at_terminal(directory, program, *words, status=status), directory)


def shown_at_terminal(directory: Path, program: str, *words: object, status: int = 0) -> str:
    """Return the same as it is."""
    entry = program.replace("-", "_")
    main = f"import sys; from qemu_dump_ext.entry import {entry} as run; sys.exit(run())"
    terminal = pexpect.spawn(
        sys.executable,
        ["-c", main, *map(str, words)],
        env=child_environment(HOME=str(directory), COLUMNS=None),
        encoding="utf-8",
        timeout=SECONDS,
        dimensions=(24, COLUMNS),
        cwd=str(directory),
    )
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == status, terminal.before
    return re.sub(r"[^\n]*\r(?=[^\n])", "", str(terminal.before).replace("\r\n", "\n"))


def normalised(text: str, directory: Path) -> str:
    text = text.replace(str(directory), "DIR")
    text = re.sub(r"\d{8}T\d{6}\.\d+Z-[0-9a-f]{16}", "ID", text)
    text = re.sub(r"\d{8}T\d{6}", "TIME", text)
    text = re.sub(r"\b[0-9a-f]{16}\b", "SIGNATURE", text)
    text = re.sub(r"\S*/qemu-dump-[^/\s]+/", "QEMU/", text)
    return re.sub(r"\d+(\.\d+)?", "N", text)


def test_kernel_developer_dumps_and_is_told_what_opens_it(machine, tmp_path):
    shown = at_terminal(tmp_path, "qemu-dump", "dump", "--qmp", machine.qmp_sockets[0], "vm.elf")
    summary, *rest = shown.splitlines()
    assert re.fullmatch(
        r"DIR/vm\.elf: elf, N MiB of guest memory in N MiB, N s \(N MiB/s, memory by process\),"
        r" guest was stopped before",
        summary,
    )
    assert rest == ["VMCOREINFO was not found in guest memory", "open it: gdb -c DIR/vm.elf"]
    assert at_terminal(tmp_path, "qemu-dump", "open", "--print", "vm.elf") == "gdb -c vm.elf\n"
    refused = at_terminal(tmp_path, "qemu-dump", "open", "--reader", "drgn", "vm.elf", status=2)
    assert refused == (
        "qemu-dump open: drgn cannot open vm.elf: nothing in it tells of a Linux kernel"
        " (VMCOREINFO)\n"
    )


@pytest.mark.usefixtures("machine")
def test_user_of_a_host_with_unknown_guests_finds_them(tmp_path):
    shown = at_terminal(tmp_path, "qemu-dump", "guests")
    assert "qemu-system-xN_N" in shown or "xN_N" in shown
    refused = at_terminal(tmp_path, "qemu-dump", "dump", "vm.elf", status=2)
    assert refused.startswith("qemu-dump dump: which guest?")
    refused = at_terminal(tmp_path, "qemu-dump", "dupm", status=2)
    assert refused.startswith("qemu-dump: argument COMMAND: invalid choice: 'dupm'")


def test_operator_of_a_farm_goes_from_the_configuration_to_the_cause(tmp_path):
    with bare_machine(tmp_path, "halt") as machine:
        guest = {"socket": str(machine.qmp_sockets[0]), "name": "web1"}
        agent = CrashAgent(tmp_path, guests=[guest])
        config = ("--config", agent.config)

        def collect(*words: object, status: int = 0) -> str:
            return at_terminal(tmp_path, "qemu-dump", "collect", *words, *config, status=status)

        assert collect("check-config").splitlines()[0] == (
            "DIR/collector.yaml: ok; store DIR/store, N guests now"
        )
        refused = collect("guests", status=3)
        assert refused.startswith(
            "qemu-dump collect guests: no agent listens at DIR/store/.control"
        )
        with agent.running():
            agent.wait_connected()
            head, row = collect("guests").splitlines()
            assert head.split() == ["GUEST", "STATE", "PID", "LAST", "CRASH", "SOCKET"]
            assert row.split()[:4] == ["webN", "prelaunch", "N", "-"]
            assert collect("trigger", "web1") == "webN/ID\n"
        head, row = collect("list").splitlines()
        assert head.split() == ["ID", "AGE", "STATE", "CAUSE", "DUMP", "MESSAGE"]
        assert re.fullmatch(r"webN/TIME +(N s|now) +open +trigger +< N MiB +trigger", row)
        shown = collect("show", "latest").splitlines()
        assert shown[:5] == [
            "trigger",
            "",
            "kernel: unknown",
            "open it: nothing on this host opens DIR/store/webN/ID/vmcore.kdump (pip install",
            "id: webN/ID",
        ] or shown[:3] == ["trigger", "", "kernel: unknown"]
        assert "state: open" in shown
        told = collect("resolve", "web1", "--fixed-in", "6.2", "--note", "a note")
        assert told == "signature: SIGNATURE\nstate: resolved, fixed in N\nnote: a note\n"
        assert collect("list", "--state", "resolved").splitlines()[1].split()[3] == "resolved"
        assert collect("hold", "web1") == "webN/ID is held: limits never remove it\n"
        assert collect("prune", "--dry-run") == "would be removed: nothing\n"
        assert collect("report") == "DIR/store/report.html\n"
        refused = collect("list", "--guest", "web9", status=2)
        assert refused.startswith(
            "qemu-dump collect list: there is no guest 'webN', nor a crash of"
        )


def test_author_of_a_tool_gets_json_of_everything(machine, tmp_path):
    words = ["dump", "--qmp", machine.qmp_sockets[0], "--progress", "json", "--json", "vm.elf"]
    report = json.loads(shown_at_terminal(tmp_path, "qemu-dump", *words))
    assert report["exit_status"] == 0
    assert report["target"] == f"{tmp_path}/vm.elf"
    said, answer = shown_at_terminal(tmp_path, "qemu-dump", *words, status=2).splitlines()
    failure = json.loads(answer)
    assert failure["exit_status"] == 2
    assert said.startswith(f"qemu-dump dump: {failure['error']}")


def test_user_of_virsh_is_told_what_to_type(tmp_path):
    shown = at_terminal(tmp_path, "qemu-dump", "dump", "--help")
    assert "examples:\n  qemu-dump dump --qmp /run/vm.qmp vm.elf\n" in shown
    # argparse breaks no choice of options.
    assert all(len(line) <= COLUMNS for line in shown.splitlines() if not {"{", "|"} & set(line))
    refused = at_terminal(tmp_path, "qemu-dump", "dump", "--guest", "nobody", "vm.elf", status=3)
    assert refused.startswith("qemu-dump dump: ")
    assert "nobody" in refused
