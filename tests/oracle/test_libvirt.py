"""Domains through libvirt: what libvirt says of them is the same before and afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qemu_dump_ext.dump_readers import open_dump
from tests.support.blocked_target import blocked_target
from tests.support.doors import GDB_SCRIPT, cli_argv, gdb_argv
from tests.support.libvirt_host import (
    SESSION,
    SYSTEM,
    Domain,
    LibvirtHost,
    missing_for_libvirt,
)
from tests.support.oracle import elf_facts
from tests.support.processes import EnteredProcess
from tests.support.waiting import SECONDS, wait_until

pytestmark = pytest.mark.qemu
_INCOMPLETE = 6
COLLECTOR = "import sys; from qemu_dump_ext.entry import qemu_crash_collector as f; sys.exit(f())"
_RUNS = "running (unpaused)"
# Opens a gdbstub while the guest stands still, says so, and is killed.
_OPENS_A_STUB = """
import sys
from qemu_dump_ext.connections.target import GuestTarget, open_guest
from qemu_dump_ext.qemu.gdbstub import stub_on_demand
from qemu_dump_ext.qemu.run_state import stopped
with open_guest(GuestTarget(libvirt=sys.argv[1], connect=sys.argv[2])) as access:
    with stopped(access), stub_on_demand(access, access.pid) as stub:
        assert list(stub.vcpus()) == [0]
        print("open", flush=True)
        sys.stdin.read()
"""
# Called as ssh: OPTIONS -- HOST COMMAND.
_RUNS_WHAT_SSHD_WOULD = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
shift 2
exec sh -c "$*"
"""
_CAPABILITY_ON = "background-snapshot: on"
_OF_SEGMENTS = {160 + 24 * place + 8 for place in range(8)} | {
    160 + 24 * place for place in range(8)
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LibvirtHost]:
    """A libvirtd of the system's."""
    if reason := missing_for_libvirt():
        pytest.skip(reason)
    with LibvirtHost(tmp_path_factory.mktemp("libvirt")).running() as found:
        yield found


@pytest.fixture
def domain(host: LibvirtHost) -> Domain:
    """A domain that runs; nobody but libvirt has a monitor of its QEMU's."""
    if not host.daemon_runs():
        host.start_daemon()
    found = Domain(host, "web1", host.directory / "none")
    if found.exists() and found.state() != _RUNS:
        host.virsh("destroy", found.name)
    if not found.exists():
        host.create(found.name, paused=True, memory=64, panic=True, qmp=False)
        host.virsh("resume", found.name)
    assert found.state() == _RUNS
    return found


def _words(domain: Domain) -> tuple[str, ...]:
    return ("--libvirt", domain.name, "--connect", domain.host.uri)


def test_a_domain_that_runs_is_dumped_and_runs_again(domain: Domain):
    target = domain.host.directory / "running.elf"
    done = domain.host.cli(*_words(domain), target)
    assert done.returncode == 0, done.stderr  # what 32-bit code does not show comes from a stub
    assert "gdb: " not in domain.monitor("info chardev")
    assert "memory by process" in done.stderr
    assert "libvirt marks the domain as tainted" in done.stderr
    assert domain.state() == _RUNS
    with open_dump(target) as dump:
        assert sum(size for _, size in dump.memory_ranges()) > 64 << 20


def test_a_guest_that_only_libvirt_reaches_is_reached_through_it(domain: Domain):
    done = domain.host.cli("--guest", domain.name, "-z", domain.host.directory / "by-name")
    assert done.returncode == 0, done.stderr
    assert "libvirt marks the domain as tainted" in done.stderr
    assert domain.state() == _RUNS


def test_memory_and_registers_are_those_of_libvirts_own_dump(domain: Domain):
    ours, theirs = (domain.host.directory / name for name in ("ours", "theirs"))
    domain.host.virsh("suspend", domain.name)
    done = domain.host.cli(*_words(domain), "--exact", ours)
    assert done.returncode == _INCOMPLETE, done.stderr
    assert "_flags, " in done.stderr  # what is a guess is named
    assert domain.state() == "paused (user)"
    domain.host.virsh("dump", domain.name, theirs, "--memory-only")
    found, expected = elf_facts(ours), elf_facts(theirs)
    notes, native = found.pop("notes"), expected.pop("notes")
    assert found == expected
    assert len(notes) == len(native)
    # kernel_gs_base, and what 32-bit code does not show, are missing; hidden bits are a guess.
    differing = [at for at in range(0, len(notes), 8) if notes[at : at + 8] != native[at : at + 8]]
    assert all(_is_named(notes, at) for at in differing), differing


def test_a_stub_that_was_opened_through_libvirt_is_closed_when_its_owner_is_killed(domain: Domain):
    words = (sys.executable, "-c", _OPENS_A_STUB, domain.name, domain.host.uri)
    with domain.host.popen(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as opener:
        assert opener.stdout is not None
        assert opener.stdout.readline() == b"open\n"
        assert "gdb: " in domain.monitor("info chardev")
        opener.send_signal(signal.SIGKILL)
    wait_until(lambda: "gdb: " not in domain.monitor("info chardev"), "its guardian has closed it")
    wait_until(lambda: domain.state() == _RUNS, "it runs again")


def _is_named(notes: bytes, at: int) -> bool:
    """Tell whether a word of the notes is of those that the report names."""
    size = struct.unpack_from("<I", notes, 4)[0]
    in_second = at - (12 + 8 + (size + 3) // 4 * 4 + 12 + 8)
    flags = {168 + 24 * place for place in range(10)} | {160 + 24 * place for place in range(10)}
    long_registers = set(range(72, 136, 8))
    return in_second in flags | long_registers | {432} or in_second < 0


def test_a_domain_that_has_crashed_stays_so(domain: Domain):
    domain.panic()
    wait_until(lambda: domain.state() == "crashed (panicked)", "libvirt knows of the panic")
    done = domain.host.cli(*_words(domain), "-z", domain.host.directory / "crashed")
    assert done.returncode == 0, done.stderr
    assert domain.state() == "crashed (panicked)"


def test_info_and_dmesg_leave_the_domain_as_it_was(domain: Domain):
    done = domain.host.program("qemu_dump", "info", *_words(domain))
    assert done.returncode == 0, done.stderr
    assert "libvirt marks the domain as tainted" in done.stdout
    assert "process: usable" in done.stdout
    done = domain.host.program("qemu_dump", "dmesg", *_words(domain))
    assert done.returncode == 3, done.stderr  # there is no kernel
    assert domain.state() == _RUNS


def test_a_service_without_a_terminal_reaches_a_domain(domain: Domain, monkeypatch):
    monkeypatch.delenv("TERM", raising=False)
    done = domain.host.cli(*_words(domain), "-z", domain.host.directory / "by-service")
    assert done.returncode in {0, _INCOMPLETE}, done.stderr


def test_python_reaches_a_domain(domain: Domain):
    script = "import qemu_dump_ext as qd; print(qd.connect('libvirt:web1').info().architecture)"
    argv = ["env", f"LIBVIRT_DEFAULT_URI={domain.host.uri}", sys.executable, "-c", script]
    done = domain.host.run(*argv)
    assert done.stdout == "x86_64\n", done.stderr
    assert domain.state() == _RUNS


@contextmanager
def _in_the_middle(domain: Domain) -> Iterator[EnteredProcess[str]]:
    """Yield a dump that waits for who reads it, while the domain stands still."""
    fifo, begun = (domain.host.directory / name for name in ("reader", "begun"))
    for path in (fifo, begun):
        path.unlink(missing_ok=True)
    os.mkfifo(fifo)
    # What is written goes nowhere, once the reader lets it.
    command = f"|head -c 1 >{begun} && cat {fifo} && cat >/dev/null"
    argv = cli_argv("--no-sparse", *_words(domain), command)
    with domain.host.popen(*argv, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: begun.exists() and begun.stat().st_size, "the dump has begun")
        assert domain.state() == "paused (user)"
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)


def _go_on(domain: Domain) -> None:
    # Not by `open` alone, which would wait for a reader that may be gone.
    descriptor = os.open(domain.host.directory / "reader", os.O_RDWR)
    os.close(descriptor)


def test_who_is_killed_leaves_a_domain_that_runs(domain: Domain):
    with _in_the_middle(domain) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(SECONDS)
    wait_until(lambda: domain.state() == _RUNS, "the guardian has let it run")


def test_who_is_interrupted_leaves_a_domain_that_runs(domain: Domain):
    with _in_the_middle(domain) as process:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, said
    assert domain.state() == _RUNS


def test_what_others_make_of_the_domain_is_left(domain: Domain):
    with _in_the_middle(domain) as process:
        domain.host.virsh("resume", domain.name)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 3, said
    assert "somebody else let the guest run" in said
    assert domain.state() == _RUNS


def test_a_domain_that_is_destroyed_ends_the_dump(domain: Domain):
    with _in_the_middle(domain) as process:
        domain.host.virsh("destroy", domain.name)
        _go_on(domain)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 3, said
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1, said


def test_a_virsh_that_is_killed_costs_nothing(domain: Domain):
    with _in_the_middle(domain) as process:
        for pid in domain.host.pids_of("virsh"):
            os.kill(pid, signal.SIGKILL)
        _go_on(domain)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert domain.state() == _RUNS


def test_libvirtd_may_be_restarted_in_the_middle(domain: Domain):
    with _in_the_middle(domain) as process:
        domain.host.stop_daemon()
        domain.host.start_daemon()
        assert domain.state() == "paused (user)"
        _go_on(domain)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert domain.state() == _RUNS


def test_a_libvirtd_that_is_away_lets_the_domain_run_when_it_is_back(domain: Domain):
    with _in_the_middle(domain) as process:
        domain.host.stop_daemon()
        _go_on(domain)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 3, said
    assert "the guest is let run as soon as QEMU answers" in said
    domain.host.start_daemon()
    wait_until(lambda: domain.state() == _RUNS, "the guardian has let it run")


def test_a_job_of_libvirts_is_respected(domain: Domain):
    fifo = domain.host.directory / "slow"
    os.mkfifo(fifo)
    words = ("virsh", "-q", "-c", domain.host.uri, "dump", domain.name, fifo, "--memory-only")
    with domain.host.popen(*words, stdout=subprocess.DEVNULL) as dumping, fifo.open("rb") as reader:
        wait_until(lambda: "Dump" in domain.host.virsh("domjobinfo", domain.name), "it dumps")
        done = domain.host.cli(*_words(domain), domain.host.directory / "refused")
        assert done.returncode == 3
        assert "libvirt is busy with domain web1: dump (wait until" in done.stderr
        while reader.read(1 << 20):
            pass
        assert dumping.wait(SECONDS) == 0
    assert domain.state() == _RUNS


def test_a_connection_that_must_not_change_domains_is_named(domain: Domain):
    uri = "qemu+unix:///system?socket=/run/libvirt/libvirt-sock-ro"
    target = domain.host.directory / "refused"
    done = domain.host.cli("--libvirt", domain.name, "--connect", uri, target)
    assert done.returncode == 3
    assert "read only access prevents" in done.stderr
    assert "as root, or as libvirt's group" in done.stderr
    assert domain.state() == _RUNS


def test_a_domain_has_a_name_a_uuid_and_an_id(domain: Domain):
    for asked in ("domuuid", "domid"):
        word = domain.host.virsh(asked, domain.name)
        words = ("--libvirt", word, "--connect", domain.host.uri)
        done = domain.host.program("qemu_dump", "info", *words)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--libvirt", "nobody"], 3, "libvirt: failed to get domain 'nobody'"),
        (["--libvirt=-x"], 3, "libvirt: failed to get domain '-x'"),
        (["--libvirt", ""], 2, "'' is no name of a domain"),
        (["--libvirt", "web1", "--connect", "foo:///bar"], 3, "no connection driver available"),
        (["--connect", SYSTEM], 2, "--connect is where a domain is (--libvirt DOMAIN)"),
    ],
)
def test_what_is_wrong_with_a_name_is_said(
    host: LibvirtHost, words: list[str], status: int, said: str
):
    done = host.cli(*words, host.directory / "refused")
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.gdb
def test_gdb_asks_through_libvirt(host: LibvirtHost):
    stub = host.directory / "stub"
    domain = host.create(
        "debugged", paused=True, qmp=False, arguments=["-gdb", f"unix:{stub},server=on,wait=off"]
    )
    words = f"qemu-dump-guest-memory --libvirt debugged --connect {host.uri}"
    commands = [f"target remote {stub}", f"source {GDB_SCRIPT}"]
    commands += [f"{words} {host.directory / 'by-gdb'}", "disconnect"]
    done = host.run("env", f"VIRTUAL_ENV={sys.prefix}", *gdb_argv(commands))
    assert "elf, 16.2 MiB" in done.stdout, done.stdout + done.stderr
    target = host.directory / "by-our-gdb"
    done = host.cli("--gdb", stub, "--libvirt", "debugged", "--connect", host.uri, target)
    assert done.returncode == 0, done.stderr  # the stub has all registers
    assert domain.state().startswith("paused")
    host.virsh("destroy", "debugged")


def test_a_domain_of_a_users_own_session():
    if reason := missing_for_libvirt():
        pytest.skip(reason)
    with (
        tempfile.TemporaryDirectory(prefix="lv-") as folder,  # its sockets have long names
        LibvirtHost(Path(folder), SESSION).running() as host,
    ):
        domain = host.create("mine", paused=False, qmp=False)
        done = host.cli(*_words(domain), "-z", host.directory / "runtime" / "dump")
        assert done.returncode == 0, done.stderr
        assert "memory by process" in done.stderr
        assert domain.state() == _RUNS


def test_a_domain_is_dumped_while_it_runs(domain: Domain):
    target = domain.host.directory / "live.elf"
    done = domain.host.cli(*_words(domain), "--live", target)
    assert done.returncode == 0, done.stderr
    assert "the guest stood still for" in done.stderr
    assert "libvirt marks the domain as tainted" in done.stderr
    with open_dump(target) as dump:
        assert sum(size for _, size in dump.memory_ranges()) > 64 << 20
    _assert_nothing_is_left(domain)


def test_a_live_dump_that_is_killed_leaves_nothing_set(domain: Domain):
    with blocked_target(domain.host.directory) as target:
        words = cli_argv(*_words(domain), "--live", target.path)
        with domain.host.popen(*words, stderr=subprocess.PIPE) as dump:
            # As soon as QEMU has been told to stream.
            wait_until(lambda: _CAPABILITY_ON in _capabilities(domain), "it is set")
            dump.send_signal(signal.SIGKILL)
    wait_until(lambda: _CAPABILITY_ON not in _capabilities(domain), "its guardian takes it back")
    _assert_nothing_is_left(domain)


def _capabilities(domain: Domain) -> str:
    return domain.monitor("info migrate_capabilities")


def _assert_nothing_is_left(domain: Domain) -> None:
    assert _CAPABILITY_ON not in _capabilities(domain)
    wait_until(lambda: domain.state() == _RUNS, "it runs")
    domain.host.virsh("suspend", domain.name)
    assert domain.state() == "paused (user)"
    domain.host.virsh("resume", domain.name)
    assert domain.state() == _RUNS
    assert domain.host.daemon_runs()


def test_a_domain_of_another_host(domain: Domain):
    """By libvirt's own program behind ssh; only what connects the two ends is none."""
    ssh = domain.host.directory / "ssh"
    ssh.write_text(_RUNS_WHAT_SSHD_WOULD)
    ssh.chmod(0o755)
    uri = f"qemu+ssh://far/system?command={ssh}"
    target = domain.host.directory / "far.elf"
    done = domain.host.cli("--libvirt", domain.name, "--connect", uri, target)
    assert done.returncode == _INCOMPLETE, done.stderr  # no stub is opened where nobody can connect
    assert (
        f"{domain.name} is where {uri} leads to, not on this host: memory comes by" in done.stderr
    )
    assert "memory by pmemsave" in done.stderr  # whose files appear: it is not that far
    assert domain.state() == _RUNS
    assert domain.monitor("info chardev").count("gdb: ") == 0
    with open_dump(target) as dump:
        assert sum(size for _, size in dump.memory_ranges()) > 64 << 20
    ssh.write_text("#!/bin/sh\necho no route to host >&2\nexit 255\n")
    lost = domain.host.cli("--libvirt", domain.name, "--connect", uri, target, "--force")
    assert (lost.returncode, "libvirt: " in lost.stderr) == (3, True), lost.stderr


def test_the_proxy_gives_the_human_monitor_of_a_domain(domain: Domain):
    target = domain.host.directory / "by-proxy"
    lines = ["info status", "stop", "info status", f"dump-guest-memory {target}"]
    lines += ["c", "info status", f"dump-guest-memory --mended -z {target}.kdump", "nonsense"]
    text = "".join(f"{line}\n" for line in lines)
    done = domain.host.program("qemu_hmp_proxy", *_words(domain), input=text)
    assert done.returncode == 1, done.stderr  # that of the last line
    assert [line for line in done.stdout.splitlines() if "VM status" in line] == [
        "VM status: running",
        "VM status: paused",
        "VM status: running",
    ]
    assert "unknown command: 'nonsense'" in done.stderr
    assert domain.state() == _RUNS
    for path in (target, Path(f"{target}.kdump")):
        with open_dump(path) as dump:
            assert sum(size for _, size in dump.memory_ranges()) > 64 << 20


def test_the_proxy_serves_no_qmp_of_a_domain(domain: Domain):
    words = (*_words(domain), "--qmp-listen", domain.host.directory / "listen")
    done = domain.host.program("qemu_hmp_proxy", *words)
    assert done.returncode == 2
    assert "--qmp-listen needs a QEMU that is reached by QMP" in done.stderr


def test_the_collector_watches_domains_that_come_and_go(host: LibvirtHost):
    directory = host.directory / "collector"
    directory.mkdir()
    config = directory / "collector.json"
    entry = {"libvirt": host.uri, "name": "watched*", "format": "elf", "after": "resume"}
    settings = {"store": str(directory / "store"), "guests": [entry], "scan_interval": 0.1}
    config.write_text(json.dumps(settings))
    first = host.create("watched1", paused=False, panic=True, qmp=False)
    host.create("other", qmp=False)
    log = directory / "log"

    def guests() -> dict[str, bool]:
        done = host.program("qemu_crash_collector", "guests", "--config", config, "--json")
        listed = json.loads(done.stdout) if done.returncode == 0 else []
        return {guest["name"]: guest["connected"] for guest in listed}

    argv = [sys.executable, "-c", COLLECTOR, "run", "--config", config]
    with log.open("wb") as written, host.popen(*argv, stderr=written) as agent:
        try:
            wait_until(lambda: guests() == {"watched1": True}, "the domain is watched")
            first.panic()
            found = directory / "store" / "watched1"
            wait_until(lambda: list(found.glob("*/crash.json")), "the crash is stored")
            wait_until(lambda: first.state() == "running (unpaused)", "libvirt has resumed it")
            second = host.create("watched2", paused=False, qmp=False)
            wait_until(lambda: guests() == {"watched1": True, "watched2": True}, "both are watched")
            host.virsh("destroy", "watched1")
            wait_until(lambda: guests() == {"watched2": True}, "the first is gone")
            assert second.state().startswith("running")
        finally:
            agent.send_signal(signal.SIGTERM)
            agent.wait(SECONDS)
    [record] = [json.loads(path.read_text()) for path in found.glob("*/crash.json")]
    assert record["cause"]["kind"] == "guest-panicked"
    assert record["dump"]["verified_by"] == ["verify"], record["dump"]
    assert "libvirt marks the domain as tainted" in " ".join(record["remarks"])
    assert "Traceback" not in log.read_text(), log.read_text()
    for name in ("watched2", "other"):
        host.virsh("destroy", name)


def test_what_libvirt_does_on_a_crash_is_said(host: LibvirtHost):
    host.create("dumped", qmp=False, on_crash="coredump-destroy")
    config = host.directory / "check.json"
    entry = {"libvirt": host.uri, "name": "dumped"}
    config.write_text(json.dumps({"store": str(host.directory / "s"), "guests": [entry]}))
    done = host.program("qemu_crash_collector", "check-config", "--config", config)
    assert done.returncode == 0, done.stderr
    assert "libvirt dumps it by itself and ends it" in done.stdout
    log = (host.directory / "libvirtd.log").read_text()
    tainted = re.findall(r"name='dumped' .* is tainted: (\S+)", log)
    assert tainted
    assert "custom-monitor" not in tainted  # nothing was asked
    host.virsh("destroy", "dumped")
