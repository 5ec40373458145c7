"""Windows dumps through every door, and what a guest that runs is left as."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import qemu_dump_ext as qd
from qemu_dump_ext.cli.dump_command import main
from qemu_dump_ext.crash_collector.config.settings import GuestEntry
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.errors import EXIT_INCOMPLETE
from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from tests.oracle.test_doors import DOORS
from tests.support.doors import run_cli, run_gdb
from tests.support.folders import folder_for
from tests.support.hmp_proxy import HmpSocket, Proxy, QmpSocket
from tests.support.oracle import OracleDumps
from tests.support.qtest import Qtest
from tests.support.raw_qmp import RawQmp
from tests.support.windows_guest import (
    NOTE_AT,
    VCPUS,
    WindowsImage,
    WindowsMachine,
    hand_over,
    windows_machine,
)

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]


@pytest.fixture(scope="module")
def windows(request: pytest.FixtureRequest) -> Iterator[WindowsMachine]:
    with windows_machine(["qemu-system-x86_64"], folder_for(request, "windows")) as machine:
        machine.plant(WindowsImage())
        yield machine


@pytest.fixture(scope="module")
def theirs(windows: WindowsMachine, request: pytest.FixtureRequest) -> Path:
    return OracleDumps(windows, folder_for(request, "native")).take("win-dmp")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("words", [("-w",), ("--format", "win-dmp")], ids=["w", "format"])
def test_exact(
    windows: WindowsMachine, theirs: Path, tmp_path: Path, door: str, words: tuple[str, ...]
):
    ours = tmp_path / "ours"
    DOORS[door](windows, "--exact", *words, ours)
    assert filecmp.cmp(ours, theirs, shallow=False)


@pytest.mark.parametrize("source", ["process", "native_stream", "pmemsave"])
def test_every_memory_source(windows: WindowsMachine, theirs: Path, tmp_path: Path, source: str):
    ours = tmp_path / "ours"
    DOORS["cli-by-qmp"](windows, "--exact", "-w", "--memory", source, ours)
    assert filecmp.cmp(ours, theirs, shallow=False)


def test_a_pipe(windows: WindowsMachine, theirs: Path, tmp_path: Path):
    ours = tmp_path / "ours"
    words = ["--qmp", windows.qmp_sockets[0], "-w", "--exact"]
    assert run_cli(*words, f"|cat > {ours}").returncode == 0
    assert filecmp.cmp(ours, theirs, shallow=False)
    refused = run_cli(*words[:3], "--omit-zero", f"|cat > {tmp_path / 'none'}")
    assert refused.returncode == qd.RequestError.exit_status
    assert "requires a seekable file" in refused.stderr


def test_the_proxy(windows: WindowsMachine, theirs: Path, tmp_path: Path):
    with (
        Proxy(tmp_path, "--qmp", windows.qmp_sockets[0], qmp=True) as proxy,
        HmpSocket(proxy.socket) as monitor,
        QmpSocket(proxy.qmp_socket) as qmp,
    ):
        by_hmp, by_qmp, mended = (tmp_path / name for name in ("hmp", "qmp", "mended"))
        monitor.command(f"dump-guest-memory -w {by_hmp}")
        assert filecmp.cmp(by_hmp, theirs, shallow=False)
        monitor.command(f"dump-guest-memory --mended -w {mended}")
        with qd.open_dump(mended) as dump:
            assert dump.format == "win-dmp"
        qmp.execute("qmp_capabilities")
        target = f"file:{by_qmp}"
        taken = qmp.execute("dump-guest-memory", paging=False, protocol=target, format="win-dmp")
        assert taken[-1]["return"] == {}
        assert filecmp.cmp(by_qmp, theirs, shallow=False)
        (capability,) = qmp.execute("query-dump-guest-memory-capability")
        assert "win-dmp" in capability["return"]["formats"]


def test_what_there_is_is_told(windows: WindowsMachine, tmp_path: Path):
    done = run_gdb(windows, ["qemu-query-dump"])
    assert "win-dmp" in done.stdout
    assert GuestEntry(socket="/x", format="win-dmp").format == "win-dmp"
    qd.dump(str(windows.qmp_sockets[0]), tmp_path / "dump", format="win-dmp")
    with qd.open_dump(tmp_path / "dump") as dump:
        assert dump.format == "win-dmp"


def test_the_guest_is_as_it_was(windows: WindowsMachine, tmp_path: Path):
    image = WindowsImage()
    windows.plant(image)
    argv = ["--qmp", str(windows.qmp_sockets[0]), "-w", "--exact", str(tmp_path / "dump")]
    assert main(argv) == 0
    with Qtest(windows.qtest_socket) as qtest:
        for gpa, page in image.pages.items():
            assert qtest.read(gpa, len(page)) == bytes(page)


def test_what_does_not_go_with_it(windows: WindowsMachine, tmp_path: Path):
    for words, said in (
        (("-p",), "doesn't support paging or filter"),
        (("--range", "0", "4096"), "doesn't support paging or filter"),
        (("-z",), "not allowed with"),
        (("-R",), "-R goes with -z"),
        (("--level", "3"), "has no levels"),
        (("--dump-level", "31"), "for Linux guests"),
        (("--mini",), "for Linux guests"),
        (("--kernel", "6.1"), "for Linux guests"),
        (("--omit-zero", "--exact"), "QEMU keeps pages of zeros"),
    ):
        done = run_cli("--qmp", windows.qmp_sockets[0], "-w", *words, tmp_path / "dump")
        assert done.returncode == qd.RequestError.exit_status
        assert said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["aarch64", "i386"])
def test_other_targets(target: str, tmp_path: Path):
    board = ["-M", "virt"] if target == "aarch64" else []
    with stopped_machine([f"qemu-system-{target}"], board) as machine:
        done = run_cli("--qmp", machine.qmp_sockets[0], "-w", "--exact", tmp_path / "dump")
        assert done.returncode == qd.RequestError.exit_status
        assert "Windows dump is only available for x86-64" in done.stderr
        _capability_is_that_of_qemu(machine, tmp_path)


def _capability_is_that_of_qemu(machine: QemuMachine, folder: Path) -> None:
    with (
        Proxy(folder, "--qmp", machine.qmp_sockets[0], qmp=True) as proxy,
        QmpSocket(proxy.qmp_socket) as qmp,
    ):
        qmp.execute("qmp_capabilities")
        (capability,) = qmp.execute("query-dump-guest-memory-capability")
        assert "win-dmp" not in capability["return"]["formats"]


def test_a_note_that_lies_about_its_size(windows: WindowsMachine, tmp_path: Path):
    """QEMU 7.2 ends with a segmentation fault when it is asked for such a dump itself."""
    windows.plant(WindowsImage())
    with Qtest(windows.qtest_socket) as qtest:
        hand_over(qtest, NOTE_AT, 100)
    done = run_cli("--qmp", windows.qmp_sockets[0], "-w", "--exact", tmp_path / "dump")
    assert done.returncode == qd.RequestError.exit_status
    assert "win-dump: invalid vmcoreinfo note size" in done.stderr
    assert windows.is_running()


@pytest.mark.parametrize("words", [(), ("--snapshot",), ("--live",)], ids=["whole", "copy", "live"])
def test_a_guest_that_runs_is_dumped_and_runs_again(
    request: pytest.FixtureRequest, tmp_path: Path, words: tuple[str, ...]
):
    image = WindowsImage()
    image.spin()
    folder = folder_for(request, "running")
    with windows_machine(["qemu-system-x86_64"], folder) as machine:
        machine.plant(image)
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("cont")
        argv = ["--qmp", str(machine.qmp_sockets[0]), "-w", *words, str(tmp_path / "dump")]
        # Of a guest that runs, QEMU's stream does not have all registers.
        assert main(argv) == (EXIT_INCOMPLETE if "--live" in words else 0)
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            assert qmp.execute("query-status")["status"] == "running"
    with open_dump(tmp_path / "dump") as dump:
        for vcpu in range(VCPUS):
            context = image.gpa_of(image.base + image.context_at(vcpu))
            assert int.from_bytes(dump.read(context + 0xF8, 8), "little") == image.rip


def test_the_crash_collector_stores_one(windows: WindowsMachine, tmp_path: Path):
    windows.plant(WindowsImage())
    crash = qd.collect_crash(windows.qmp_sockets[0], tmp_path, dump_format="win-dmp")
    facts = json.loads((crash / "crash.json").read_text("utf-8"))
    assert facts["dump"]["format"] == "win-dmp"
    assert facts["dump"]["verified_by"] == ["verify"]
