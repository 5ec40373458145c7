"""What goes wrong while a guest is streamed leaves it running, and nothing set."""

from __future__ import annotations

import filecmp
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine import live_guest as engine_live_guest
from qemu_dump_ext.engine.dump import dump
from qemu_dump_ext.engine.live_guest import live_guest
from qemu_dump_ext.errors import (
    EXIT_INCOMPLETE,
    CorruptDumpError,
    DumpWriteError,
    NotLiveError,
    PauseLimitError,
    RequestError,
    SourceError,
)
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest_images.machine import QemuMachine
from qemu_dump_ext.memory_sources import AUTO
from qemu_dump_ext.pages import _copy_store as copy_store
from qemu_dump_ext.plan.request import DumpRequest, Live
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.qemu import background_snapshot
from qemu_dump_ext.qemu.background_snapshot import LiveStream
from qemu_dump_ext.qemu.qmp import QmpMonitor, connect_qmp
from qemu_dump_ext.qemu.run_state import PauseLimit
from qemu_dump_ext.sinks import open_sink
from tests.oracle.test_live import capabilities_of, command_of, counter_of
from tests.oracle.test_migration_stream import migrate_to_file
from tests.support.bare_guests import COUNTING, PAGES, counting_arguments
from tests.support.doors import run_cli, run_gdb
from tests.support.newer_qemu import own_qemu_version
from tests.support.raw_qmp import RawQmp, tcp_address_of_qmp
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu

_NT_PRSTATUS = 1
_VERSIONS = pytest.mark.parametrize("newer", [False, True], ids=["older", "newer"], indirect=True)


@contextmanager
def running(folder: Path, *more: str, newer: bool) -> Iterator[QemuMachine]:
    """Yield a guest that counts."""
    arguments = [*counting_arguments("x86_64", folder, 1), *more]
    with QemuMachine(command_of("x86_64", newer=newer), arguments) as machine:
        yield machine


@pytest.fixture(scope="module")
def newer(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def machine(newer: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuMachine]:
    """One for all tests that leave it as it was, which is what they are about."""
    with running(tmp_path_factory.mktemp("guest"), newer=newer) as machine:
        yield machine


def _state(machine: QemuMachine) -> tuple[str, Sequence[str], str]:
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        migration = qmp.execute("query-migrate").get("status", "none")
        return qmp.execute("query-status")["status"], capabilities_of(qmp), migration


def _runs_on(machine: QemuMachine) -> None:
    """Wait until nothing is set any more, and see that the guest writes all of its pages."""
    wait_until(
        lambda: (
            _state(machine)[:2] == ("running", [])
            and _state(machine)[2] in {"none", "failed", "completed", "cancelled"}
        )
    )


def _stream(machine: QemuMachine, folder: Path, advance: Callable[[int], None]) -> None:
    with (
        connect_qmp(str(machine.qmp_sockets[0])) as monitor,
        live_guest(GuestAccess.by_qmp(monitor), folder, advance=advance),
    ):
        pass


@contextmanager
def _set_before(machine: QemuMachine, *capabilities: str) -> Iterator[RawQmp]:
    """Have capabilities set by somebody else inside the block."""
    with RawQmp(machine.qmp_sockets[1]) as qmp:

        def switch(*, on: bool) -> None:
            for capability in capabilities:
                wanted = [{"capability": capability, "state": on}]
                qmp.execute("migrate-set-capabilities", capabilities=wanted)

        switch(on=True)
        try:
            yield qmp
        finally:
            switch(on=False)


def _raiser(error: BaseException) -> Callable[[int], None]:
    def advance(_size: int) -> None:
        raise error

    return advance


@_VERSIONS
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), DumpWriteError("the disk is full")], ids=["Ctrl-C", "full disk"]
)
def test_what_ends_it_in_the_middle_leaves_the_guest_running(
    machine: QemuMachine, tmp_path: Path, error: BaseException
):
    with pytest.raises(type(error)):
        _stream(machine, tmp_path, _raiser(error))
    _runs_on(machine)
    _stream(machine, tmp_path, lambda _size: None)
    assert list(tmp_path.iterdir()) == []


def _be_killed_in_the_middle(machine: QemuMachine, folder: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from qemu_dump_ext.engine.live_guest import live_guest\n"
        "from qemu_dump_ext.guest.access import GuestAccess\n"
        "from qemu_dump_ext.qemu.qmp import connect_qmp\n"
        "def die(size): os.kill(os.getpid(), signal.SIGKILL)\n"
        "with connect_qmp(sys.argv[1]) as qmp:\n"
        "    with live_guest(GuestAccess.by_qmp(qmp), Path(sys.argv[2]), advance=die): pass\n"
    )
    words = [sys.executable, "-c", program, str(machine.qmp_sockets[0]), str(folder)]
    done = subprocess.run(words, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@_VERSIONS
def test_a_process_that_is_killed_leaves_the_guest_running(machine: QemuMachine, tmp_path: Path):
    _be_killed_in_the_middle(machine, tmp_path)
    _runs_on(machine)
    _stream(machine, tmp_path, lambda _size: None)


@_VERSIONS
def test_a_process_that_is_killed_leaves_a_capability_that_was_set_before(
    machine: QemuMachine, tmp_path: Path
):
    with _set_before(machine, "background-snapshot") as qmp:
        _be_killed_in_the_middle(machine, tmp_path)
        wait_until(lambda: qmp.execute("query-migrate")["status"] in {"failed", "completed"})
        assert capabilities_of(qmp) == ["background-snapshot"]
        counter = counter_of(qmp, COUNTING["x86_64"])
        wait_until(lambda: counter_of(qmp, COUNTING["x86_64"]) > counter + 16 * PAGES, seconds=60)
    _runs_on(machine)


@_VERSIONS
def test_qemu_that_has_not_heard_of_the_stream_keeps_no_end_of_it(
    machine: QemuMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def pipes() -> int:
        ends = Path(f"/proc/{machine.pid}/fd").iterdir()
        return sum(str(end.readlink()).startswith("pipe:") for end in ends)

    begin = QmpMonitor.begin_qmp

    def interrupted(qmp: QmpMonitor, command: str, *arguments: Any) -> Callable[[], Any]:
        if command == "migrate":
            raise KeyboardInterrupt
        return begin(qmp, command, *arguments)

    before = pipes()
    with monkeypatch.context() as patched:
        patched.setattr(QmpMonitor, "begin_qmp", interrupted)
        patched.setattr(background_snapshot, "_END_SECONDS", 5.0)
        with pytest.raises(KeyboardInterrupt):
            _stream(machine, tmp_path, lambda _size: None)
    assert pipes() == before
    _runs_on(machine)


@_VERSIONS
def test_qemu_that_stands_still_is_not_waited_for_without_end(
    machine: QemuMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(_size: int) -> None:
        os.kill(machine.pid, signal.SIGSTOP)

    monkeypatch.setattr(background_snapshot, "_END_SECONDS", 0.5)
    try:
        with connect_qmp(str(machine.qmp_sockets[0])) as monitor:
            monitor._answer_seconds = 0.5
            live = live_guest(GuestAccess.by_qmp(monitor), tmp_path, advance=stop)
            with pytest.raises(SourceError), live:
                pass
    finally:
        os.kill(machine.pid, signal.SIGCONT)
    _runs_on(machine)
    _stream(machine, tmp_path, lambda _size: None)


@_VERSIONS
def test_no_room_for_the_copy_is_told_before_the_guest_is_stopped(
    machine: QemuMachine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(copy_store, "available_memory", lambda: 0)
    with pytest.raises(DumpWriteError, match="cannot create a file in /proc"):
        _stream(machine, Path("/proc"), lambda _size: None)
    _runs_on(machine)


@_VERSIONS
def test_a_copy_in_a_file_is_the_same(
    machine: QemuMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(copy_store, "available_memory", lambda: 0)
    with (
        connect_qmp(str(machine.qmp_sockets[0])) as monitor,
        live_guest(GuestAccess.by_qmp(monitor), tmp_path) as live,
    ):
        assert "in a nameless file" in live.remarks[1]
        pages = live.read(0x2000000, 1 << 20)
        assert any(pages)
        found = live.memory.populated(0x2000000, 1 << 20)  # type: ignore[attr-defined]
        assert found[0][0] == 0x2000000
        assert live.read(0xFFFF0000, 5)[:4] == bytes.fromhex("fa2e660f"), "the BIOS is in it"


@_VERSIONS
def test_a_qemu_that_could_hang_the_guest_is_asked_only_where_it_must(
    machine: QemuMachine, newer: bool, tmp_path: Path
):
    done = run_cli("--qmp", machine.qmp_sockets[0], "--live=prefer", tmp_path / "x")
    assert done.returncode == 0, done.stderr
    lets_go = newer or own_qemu_version() >= (10, 0, 0)
    assert ("memory by background-snapshot" in done.stderr) == lets_go
    assert ("this QEMU hangs the guest if anything ends its stream" in done.stderr) != lets_go
    _runs_on(machine)


@_VERSIONS
def test_a_pause_that_was_too_long_gives_the_dump_up(machine: QemuMachine, tmp_path: Path):
    with (
        connect_qmp(str(machine.qmp_sockets[0])) as monitor,
        pytest.raises(PauseLimitError, match="stood still for 1e-09 s"),
        live_guest(GuestAccess.by_qmp(monitor), tmp_path, limit=PauseLimit(1e-9)),
    ):
        pass
    _runs_on(machine)


@_VERSIONS
def test_a_capability_that_was_set_before_stays_set(machine: QemuMachine, tmp_path: Path):
    with _set_before(machine, "background-snapshot", "events") as qmp:
        _stream(machine, tmp_path, lambda _size: None)
        assert sorted(capabilities_of(qmp)) == ["background-snapshot", "events"]
    _runs_on(machine)


@_VERSIONS
def test_parameters_of_migrations_stay_as_they_are(machine: QemuMachine, tmp_path: Path):
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        before = qmp.execute("query-migrate-parameters")
        _stream(machine, tmp_path, lambda _size: None)
        assert qmp.execute("query-migrate-parameters") == before


@_VERSIONS
def test_a_migration_under_way_is_left_alone(machine: QemuMachine, tmp_path: Path):
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute("migrate-set-parameters", **{"max-bandwidth": 1000})
        qmp.execute("migrate", uri="exec:cat >/dev/null")
        try:
            for words in (("--live",), ("--live=prefer",)):
                done = run_cli("--qmp", machine.qmp_sockets[0], *words, tmp_path / "x")
                assert done.returncode == RequestError.exit_status
                assert "migration/snapshot in progress" in done.stderr
            assert qmp.execute("query-migrate")["status"] == "active"
        finally:
            qmp.execute("migrate_cancel")
            qmp.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 27})
            wait_until(lambda: qmp.execute("query-migrate")["status"] == "cancelled")
    assert not list(tmp_path.iterdir())
    _runs_on(machine)


@_VERSIONS
def test_a_guest_that_is_paused_is_dumped_as_it_stands(machine: QemuMachine, tmp_path: Path):
    path = tmp_path / "x"
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute("stop")
        try:
            done = run_cli("--qmp", machine.qmp_sockets[0], "--live", path)
            assert done.returncode == 0, done.stderr
            assert "not live, but as with --snapshot: the guest does not run, it is paused" in (
                done.stderr
            )
            assert qmp.execute("query-status")["status"] == "paused"
            assert qmp.execute("query-migrate").get("status") != "active"
        finally:
            qmp.execute("cont")
    assert path.exists()


def test_a_guest_that_gdb_holds_is_dumped_as_it_stands(tmp_path: Path):
    ours, native = tmp_path / "ours", tmp_path / "native"
    with running(tmp_path, newer=False) as machine:
        words = f"--qmp {machine.qmp_sockets[0]} --live --exact {ours}"
        done = run_gdb(machine, [f"qemu-dump-guest-memory {words}", "output $_qemu_dump_status"])
        assert done.stdout.endswith("0"), done
        assert "not live, but as with --snapshot: the guest does not run" in done.stdout
        state = _state(machine)
        assert state == ("paused", [], "none"), "it stands still where gdb has left it"
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{native}")
    assert filecmp.cmp(ours, native, shallow=False)


@_VERSIONS
def test_a_guest_that_never_ran_is_dumped_as_it_stands(newer: bool, tmp_path: Path):
    with running(tmp_path, "-S", newer=newer) as machine:
        done = run_cli("--qmp", machine.qmp_sockets[0], "--live", tmp_path / "x")
        assert done.returncode == 0, done.stderr
        assert "the guest does not run, it is prelaunch" in done.stderr
        assert _state(machine)[:2] == ("prelaunch", [])


@_VERSIONS
def test_memory_that_cannot_be_protected_is_refused_in_one_line(newer: bool, tmp_path: Path):
    backend = f"memory-backend-file,id=m,size=64M,mem-path={tmp_path / 'ram'},share=off"
    words = ("-object", backend, "-machine", "memory-backend=m")
    with running(tmp_path, *words, newer=newer) as machine:
        done = run_cli("--qmp", machine.qmp_sockets[0], "--live", tmp_path / "x")
        assert done.returncode == NotLiveError.exit_status
        assert done.stderr.count("\n") == 1
        assert "not compatible with guest memory configuration" in done.stderr
        assert not (tmp_path / "x").exists()
        _runs_on(machine)
        done = run_cli("--qmp", machine.qmp_sockets[0], "--live=prefer", tmp_path / "x")
        assert done.returncode == 0, done.stderr
        assert "not live, but as with --snapshot: " in done.stderr
        _runs_on(machine)


@_VERSIONS
@pytest.mark.parametrize("backend", ["memfd,share=on", "memfd,share=off", "ram"])
def test_memory_backends_that_can_be_streamed(newer: bool, tmp_path: Path, backend: str):
    kind, _, options = backend.partition(",")
    what = f"memory-backend-{kind},id=m,size=64M{',' * bool(options)}{options}"
    words = ("-object", what, "-machine", "memory-backend=m")
    with running(tmp_path, *words, newer=newer) as machine:
        path = tmp_path / "x"
        done = run_cli("--qmp", machine.qmp_sockets[0], "--live", path)
        assert done.returncode == 0, done.stderr
        assert "memory by background-snapshot" in done.stderr
        with open_dump(path) as dump:
            assert dump.read(0xF0000, 4) == bytes.fromhex("fa2e660f")
        _runs_on(machine)


def test_memory_that_qemu_leaves_out_of_its_streams_is_not_taken_for_zeros(tmp_path: Path):
    words = ("-object", "memory-backend-memfd,id=m,size=64M,share=on", "-M", "memory-backend=m")
    wanted = [{"capability": "x-ignore-shared", "state": True}]
    with running(tmp_path, *words, newer=False) as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("migrate-set-capabilities", capabilities=wanted)
        done = run_cli("--qmp", machine.qmp_sockets[0], "--live", tmp_path / "x")
        assert done.returncode == NotLiveError.exit_status
        assert "leaves shared memory out of its streams (x-ignore-shared)" in done.stderr
        assert _state(machine)[:2] == ("running", ["x-ignore-shared"])
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            migrate_to_file(qmp, tmp_path / "stream")
    with pytest.raises(CorruptDumpError, match="by the capability x-ignore-shared"):
        open_dump(tmp_path / "stream")


def test_a_device_that_forbids_it_is_named(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    drive = f"file={disk},if=none,id=d,format=raw"
    with running(
        tmp_path, "-drive", drive, "-device", "nvme,drive=d,serial=1", newer=False
    ) as machine:
        done = run_cli("--qmp", machine.qmp_sockets[0], "--live", tmp_path / "x")
        assert done.returncode == NotLiveError.exit_status
        assert re.search(r"QEMU.*nvme", done.stderr), done.stderr
        _runs_on(machine)


@_VERSIONS
def test_a_stream_that_does_not_describe_itself_has_no_registers(newer: bool, tmp_path: Path):
    with running(tmp_path, "-M", "q35,suppress-vmdesc=on", newer=newer) as machine:
        done = run_cli("--qmp", machine.qmp_sockets[0], "--live", tmp_path / "x")
        assert done.returncode == 6, done.stderr
        assert "registers: the stream does not describe its devices" in done.stderr
        _runs_on(machine)


def _pids(path: Path) -> list[int]:
    # Of vCPUs in protected mode.
    with open_dump(path) as dump:
        return [
            int.from_bytes(note.descriptor[24:28], "little")
            for note in dump.notes
            if note.type == _NT_PRSTATUS
        ]


@_VERSIONS
def test_what_is_plugged_behind_the_questions_is_in_the_dump_or_named(
    newer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # The CPU 2 first: vCPUs are in the order of their making.
    plugged = ("-m", "64M,slots=2,maxmem=1G", "-smp", "1,sockets=4,maxcpus=4")
    memory = ("-object", "memory-backend-ram,id=m1,size=128M")
    with running(tmp_path, "-M", "q35", *plugged, *memory, newer=newer) as machine:

        def stream_later(*arguments: Any) -> LiveStream:
            with RawQmp(machine.qmp_sockets[1]) as qmp:
                qmp.execute("device_add", driver="pc-dimm", id="d1", memdev="m1")
                for socket in (2, 1):
                    where = {"socket-id": socket, "core-id": 0, "thread-id": 0}
                    qmp.execute("device_add", driver="qemu64-x86_64-cpu", **where)
            return background_snapshot.stream_running_guest(*arguments)

        monkeypatch.setattr(engine_live_guest, "stream_running_guest", stream_later)
        ours, native = tmp_path / "ours", tmp_path / "native"
        with connect_qmp(str(machine.qmp_sockets[0])) as monitor:
            access = GuestAccess.by_qmp(monitor)
            with open_sink(str(ours), force=False, standard_output=None) as sink:
                request = DumpRequest(live=Live.REQUIRE)
                report = dump(request, access, sink, memory=AUTO, progress=ProgressMeter(None))
        assert report.exit_status == EXIT_INCOMPLETE
        assert any(
            "had 64 MiB of memory when it was asked, and has 192" in x for x in report.lines()
        )
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{native}")
    assert _pids(ours) == _pids(native) == [1, 3, 2]


@_VERSIONS
def test_qemu_that_is_gone_is_told(newer: bool, tmp_path: Path):
    with running(tmp_path, newer=newer) as machine:

        def kill(_size: int) -> None:
            os.kill(machine.pid, signal.SIGKILL)

        with pytest.raises(SourceError):
            _stream(machine, tmp_path, kill)


def test_a_socket_that_passes_no_descriptors_is_refused(tmp_path: Path):
    words = ("-qmp", "tcp:127.0.0.1:0,server=on,wait=off")
    with running(tmp_path, *words, newer=False) as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            address = tcp_address_of_qmp(qmp)
        done = run_cli("--qmp", address, "--live", tmp_path / "x")
        assert done.returncode == NotLiveError.exit_status
        assert "only to a descriptor that it gets by QMP" in done.stderr


def test_two_ways_to_a_short_pause_are_refused(tmp_path: Path):
    done = run_cli("--qmp", tmp_path / "none", "--live", "--snapshot", tmp_path / "x")
    assert done.returncode == RequestError.exit_status
    assert "--live and --snapshot exclude each other" in done.stderr
