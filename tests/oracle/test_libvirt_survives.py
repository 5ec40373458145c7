"""No door lets QEMU announce a dump where libvirt listens: libvirtd 9.0 ends when it hears it."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from qemu_dump_ext.dump_readers import open_dump
from tests.support.doors import GDB_SCRIPT, gdb_argv
from tests.support.hmp_proxy import listens_at
from tests.support.libvirt_host import SYSTEM, Domain, LibvirtHost, missing_for_libvirt
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu
_INCOMPLETE = 6
_WHY = "libvirt listens to this QEMU"


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Domain]:
    """A domain with a second client's QMP socket, a gdbstub and a human monitor."""
    if reason := missing_for_libvirt():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("libvirt")
    with LibvirtHost(directory, SYSTEM).running() as host:
        stub = f"unix:{directory}/stub,server=on,wait=off"
        human = f"unix:{directory}/human,server=on,wait=off"
        words = ["-gdb", stub, "-monitor", human]
        yield host.create("web1", vcpus=2, arguments=words)


def _cli(domain: Domain, target: Path) -> str:
    done = domain.host.cli("--qmp", domain.qmp, target)
    assert done.returncode == _INCOMPLETE, done.stderr
    return done.stderr


def _native_stream(domain: Domain, target: Path) -> str:
    done = domain.host.cli("--qmp", domain.qmp, "--memory", "native_stream", target)
    assert done.returncode == 3, done.stderr
    assert not target.exists()
    target.write_bytes(b"")
    return done.stderr


def _exact(domain: Domain, target: Path) -> str:
    done = domain.host.cli("--exact", "--qmp", domain.qmp, target)
    assert done.returncode == _INCOMPLETE, done.stderr
    assert "_flags, " in done.stderr  # what is a guess is named
    return done.stderr


def _gdb_of_its_own(domain: Domain, target: Path) -> str:
    stub = domain.host.directory / "stub"
    done = domain.host.cli("--gdb", stub, "--qmp", domain.qmp, target)
    assert done.returncode == 0, done.stderr  # the stub has all registers
    return _WHY


def _in_gdb(domain: Domain, target: Path) -> str:
    commands = [f"target remote {domain.host.directory / 'stub'}", f"source {GDB_SCRIPT}"]
    commands += [f"qemu-dump-guest-memory {target}", "disconnect"]
    done = domain.host.run("env", f"VIRTUAL_ENV={sys.prefix}", *gdb_argv(commands))
    assert "elf, 16.2 MiB" in done.stdout, done.stdout + done.stderr
    return _WHY


def _info(domain: Domain, target: Path) -> str:
    done = domain.host.program("qemu_dump", "info", "--json", "--qmp", domain.qmp)
    assert done.returncode == 0, done.stderr
    target.write_bytes(b"")
    sources = dict(json.loads(done.stdout)["memory_sources"])
    assert sources["process"] is None
    return str(sources["native_stream"])


def _dmesg(domain: Domain, target: Path) -> str:
    done = domain.host.program("qemu_dump", "dmesg", "--qmp", domain.qmp)
    target.write_bytes(b"")
    assert done.returncode == 3  # there is no kernel
    return _WHY


def _proxy(domain: Domain, target: Path) -> str:
    return _by_proxy(domain, f"dump-guest-memory {target}\n")


def _native_by_proxy(domain: Domain, target: Path) -> str:
    target.write_bytes(b"")
    said = _by_proxy(domain, f"dump-guest-memory --native {target}\n")
    assert not target.stat().st_size
    return said


def _by_proxy(domain: Domain, text: str) -> str:
    done = domain.host.program("qemu_hmp_proxy", "--qmp", domain.qmp, input=text)
    said = f"{done.stdout}{done.stderr}"
    assert (done.returncode == 0) == ("Error" not in said), said
    return f"{said} {_WHY if done.returncode == 0 else ''}"


def _by_human_proxy(domain: Domain, target: Path) -> str:
    human = domain.host.directory / "human"
    words = ("--hmp", human)
    text = f"dump-guest-memory {target}\n"
    done = domain.host.program("qemu_hmp_proxy", *words, input=text)
    assert done.returncode == 0, done.stderr
    return f"{done.stdout} {_WHY if 'Error' not in done.stdout else ''}"


def _qmp_of_proxy(domain: Domain, target: Path) -> str:
    listen = domain.host.directory / "proxy"
    target.write_bytes(b"")
    answer = ""
    words = ["--qmp", domain.qmp, "--qmp-listen", listen]
    main = "import sys; from qemu_dump_ext.entry import qemu_hmp_proxy as run; sys.exit(run())"
    with domain.host.popen(sys.executable, "-c", main, *words) as proxy:
        wait_until(partial(listens_at, listen), "the proxy listens")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(listen))
            lines = client.makefile("rw")
            lines.readline()
            arguments = {"paging": False, "protocol": "file:/dev/fdset/0"}  # QEMU's to open
            for command in (
                {"execute": "qmp_capabilities"},
                {"execute": "dump-guest-memory", "arguments": arguments},
            ):
                lines.write(json.dumps(command) + "\n")
                lines.flush()
                answer = lines.readline()
        proxy.send_signal(signal.SIGTERM)
    return answer


def _collector(domain: Domain, target: Path) -> str:
    script = (
        "import sys; from qemu_dump_ext.crash_collector.collect_now import collect_crash;"
        "print(collect_crash(sys.argv[1], sys.argv[2], name='web1', dump_format='elf'))"
    )
    store = target.parent / "store"
    done = domain.host.run(sys.executable, "-c", script, domain.qmp, store)
    assert done.returncode == 0, done.stderr
    [dump] = store.rglob("vmcore.elf")
    shutil.move(dump, target)
    return _WHY


DOORS: dict[str, Callable[[Domain, Path], str]] = {
    "command-line": _cli,
    "native_stream": _native_stream,
    "exact": _exact,
    "gdb-of-its-own": _gdb_of_its_own,
    "gdb": _in_gdb,
    "info": _info,
    "dmesg": _dmesg,
    "proxy": _proxy,
    "native-by-proxy": _native_by_proxy,
    "proxy-at-the-human-monitor": _by_human_proxy,
    "qmp-of-proxy": _qmp_of_proxy,
    "collect_crash": _collector,
}


@pytest.mark.parametrize("door", DOORS)
def test_libvirtd_lives_and_sees_the_domain_as_before(domain: Domain, door: str):
    target = domain.host.directory / f"{door}.dump"
    before = domain.state(), domain.monitor("info status"), domain.pid()
    said = DOORS[door](domain, target)
    # It is told of what QEMU announces before it answers what it is asked later.
    assert domain.monitor("info dump") in {"", "Status: none"}
    assert domain.host.daemon_runs()
    assert (domain.state(), domain.monitor("info status"), domain.pid()) == before
    assert _WHY in said
    if target.stat().st_size:
        with open_dump(target) as dump:
            assert sum(size for _, size in dump.memory_ranges()) >= 16 << 20


def test_libvirtd_bears_a_dump_of_a_domain_that_runs_on(domain: Domain):
    domain.host.virsh("resume", domain.name)
    target = domain.host.directory / "live.dump"
    done = domain.host.cli("--live", "--qmp", domain.qmp, target)
    assert done.returncode == 0, done.stderr
    assert domain.monitor("info dump") in {"", "Status: none"}
    assert domain.state() == "running (unpaused)"
    assert domain.host.daemon_runs()
