"""The command line must refuse, and survive, what users and guests do to it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from tests.support.bad_input import BAD_INPUT, strange_files
from tests.support.doors import child_environment, cli_argv, guest_status, run_cli, run_often
from tests.support.processes import Process
from tests.support.raw_qmp import RawQmp, tcp_address_of_qmp
from tests.support.traces import no_trace, partial_size
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

_QEMU = ["qemu-system-x86_64"]
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MIB = 1 << 20
DOORS = ("qmp", "gdb")


@pytest.fixture(scope="module")
def stopped() -> Iterator[QemuMachine]:
    with stopped_machine(_QEMU) as machine:
        yield machine


@pytest.fixture(scope="module")
def large() -> Iterator[QemuMachine]:
    """A guest whose firmware runs, with memory enough that a dump takes a while."""
    with QemuMachine(_QEMU, ["-m", "2048"]) as machine:
        yield machine


@pytest.fixture
def running(large: QemuMachine) -> QemuMachine:
    with RawQmp(large.qmp_sockets[1]) as qmp:
        qmp.execute("cont")
    return large


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    strange_files(tmp_path)
    return tmp_path


def way_to(door: str, machine: QemuMachine) -> list[str]:
    return {
        "qmp": ["--qmp", str(machine.qmp_sockets[0])],
        "gdb": ["--gdb", str(machine.gdb_socket)],
        "gdb and qmp": ["--gdb", str(machine.gdb_socket), "--qmp", str(machine.qmp_sockets[0])],
    }[door]


def assert_one_line(error: str, pattern: str) -> None:
    lines = error.splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("qemu-dump-guest-memory: ")
    assert re.search(pattern, lines[0]), error


def refuse(
    result: subprocess.CompletedProcess[str], status: int, pattern: str, output: str | None = ""
) -> None:
    assert_one_line(result.stderr, pattern)
    assert (result.returncode, result.stdout) == (status, output)


@pytest.mark.parametrize("door", DOORS)
def test_bad_words_are_refused(stopped: QemuMachine, folder: Path, door: str):
    lines = [[*way_to(door, stopped), *bad.words_in(folder)] for bad in BAD_INPUT]
    with no_trace(folder):
        results = run_often("qemu_dump_guest_memory", lines)
    for bad, result in zip(BAD_INPUT, results, strict=True):
        refuse(result, bad.status, bad.message)
    assert guest_status(stopped) == "prelaunch"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fd:three"], r"number of an open descriptor, as in fd:3$"),
        (["fd:77"], r"fd:77 is no open descriptor"),
        (["fd:5"], r"fd:5 is no open descriptor"),  # and not one of the program's own
        (["fd:99999999999999999999"], r"is no open descriptor"),
        (["fd:0"], r"open for reading only"),
        (["--json", "-"], r"cannot both go to standard output"),
    ],
)
def test_bad_descriptors_are_refused(stopped: QemuMachine, words: list[str], message: str):
    with Path("/dev/null").open("rb") as for_reading:
        refuse(run_cli(*way_to("qmp", stopped), *words, stdin=for_reading), 2, message)


@pytest.mark.parametrize("target", ["-", "fd:1"])
def test_gdb_has_no_descriptors_of_ours(stopped: QemuMachine, target: str):
    refuse(run_cli(*way_to("gdb", stopped), target), 2, r"gdb has its own descriptors \(name a")


def test_a_guest_must_be_named(tmp_path: Path):
    refuse(
        run_cli(tmp_path / "new"),
        2,
        r"which guest\? \(--guest NAME, --qmp SOCKET or --gdb ADDRESS\)",
    )


def test_a_terminal_gets_no_dump(stopped: QemuMachine):
    controller, terminal = pty.openpty()
    try:
        for target in ("-", os.ttyname(terminal)):
            result = run_cli(*way_to("qmp", stopped), target, stdout=terminal)
            refuse(result, 2, r"is a terminal, and a dump is not text", output=None)
        os.set_blocking(controller, False)
        with pytest.raises(BlockingIOError):
            os.read(controller, 1)
    finally:
        os.close(controller)
        os.close(terminal)


def test_raw_does_not_append(stopped: QemuMachine, tmp_path: Path):
    with (tmp_path / "log").open("ab") as log:
        result = run_cli(*way_to("qmp", stopped), "-z", "-R", "-", stdout=log)
    refuse(result, 2, r"seekable", output=None)
    assert (tmp_path / "log").read_bytes() == b""


@pytest.mark.parametrize("door", DOORS)
def test_an_unwritable_directory(stopped: QemuMachine, tmp_path: Path, door: str):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    argv = cli_argv(*way_to(door, stopped), closed / "new")
    if os.geteuid() == 0:  # to whom no mode applies, without this
        capabilities = "-dac_override,-dac_read_search"
        argv = ["setpriv", f"--bounding-set={capabilities}", f"--inh-caps={capabilities}", *argv]
    with no_trace(tmp_path):
        result = subprocess.run(
            argv, capture_output=True, text=True, env=child_environment(), check=False, timeout=60
        )
    refuse(result, 4, r"cannot create .*/closed/new: Permission denied")


@pytest.mark.parametrize("door", DOORS)
def test_force_replaces_also_behind_a_link(stopped: QemuMachine, folder: Path, door: str):
    for name in ("existing", "link"):
        inode = (folder / "existing").stat().st_ino
        (folder / "existing").write_text("precious")
        result = run_cli(*way_to(door, stopped), "--force", folder / name)
        assert result.returncode == 0, result.stderr
        assert (folder / "link").is_symlink()
        assert (folder / "existing").read_bytes()[:4] == b"\x7fELF"
        assert (folder / "existing").stat().st_ino != inode


@pytest.mark.parametrize("door", DOORS)
def test_any_name_will_do(stopped: QemuMachine, tmp_path: Path, door: str):
    path = tmp_path / 'it\'s two "words", a back\\slash and an ümlaut'
    result = run_cli(*way_to(door, stopped), "-z", path)
    assert result.returncode == 0, result.stderr
    assert path.is_file()


@pytest.mark.parametrize("door", DOORS)
def test_a_device_and_a_fifo_stay(stopped: QemuMachine, tmp_path: Path, door: str):
    # A node of the test's own: a defect must not cost the machine its /dev/null.
    null = tmp_path / "null"
    try:
        os.mknod(null, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        null.open("wb").close()
    except PermissionError:
        pytest.skip("makes a device")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert run_cli(*way_to(door, stopped), "-z", "--force", null).returncode == 0
    assert null.is_char_device()
    with (tmp_path / "copy").open("wb") as copy, Process(["cat", fifo], stdout=copy):
        assert run_cli(*way_to(door, stopped), "-z", "--force", fifo).returncode == 0
    assert (tmp_path / "copy").read_bytes()[:12] == b"makedumpfile"
    assert fifo.is_fifo()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--memory", "pmemsave"],
            r"no room for .*: the dump takes 64 MiB, the file system has 0 MiB left \(-z takes",
        ),
        (["--memory", "pmemsave", "-z", "none"], r"cannot write .*/new: No space left on device"),
    ],
)
def test_no_room(stopped: QemuMachine, tmp_path: Path, door: str, words: list[str], message: str):
    argv = cli_argv(*way_to(door, stopped), *words, tmp_path / "new")
    # The bitmaps, page descriptors and pages of firmware take more than 512 KiB.
    script = (
        f'mount -t tmpfs -o size=512k tmpfs {tmp_path} && "$@"; s=$?; ls -A {tmp_path}; exit $s'
    )
    with no_trace(tmp_path):
        result = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, "sh", *argv],
            capture_output=True,
            text=True,
            env=child_environment(),
            check=False,
            timeout=300,
        )
    refuse(result, 4, message)


def test_the_reader_of_standard_output_goes_away(stopped: QemuMachine):
    with open_dump(way_to("qmp", stopped), "-") as dump:
        assert dump.stdout is not None
        dump.stdout.read(1000)
        dump.stdout.close()
        dump.stdout = None
        _, error = dump.communicate(timeout=300)
    assert dump.returncode == 4
    assert_one_line(error.decode(), r"cannot write -: its reader has gone away$")


@contextmanager
def open_dump(words: Sequence[str], *more: object) -> Iterator[subprocess.Popen[bytes]]:
    """Start a dump whose output the caller reads."""
    with subprocess.Popen(
        cli_argv(*words, *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=child_environment(),
    ) as dump:
        try:
            yield dump
        finally:
            dump.kill()


def finish(dump: subprocess.Popen[bytes]) -> tuple[int, str]:
    _, error = dump.communicate(timeout=300)
    return dump.returncode, error.decode()


# --- addresses ---


def test_what_is_no_qmp_socket(stopped: QemuMachine, folder: Path):
    by_path, by_port = "unix:PATH", "tcp:HOST:PORT"
    for address, reason, hint in (
        (folder / "none", "No such file or directory", by_path),
        (folder / "existing", "it is no socket", by_path),
        (stopped.console_log.parent / "stderr", "it is no socket", by_path),
        (folder, "it is no socket", by_path),
        ("127.0.0.1:1", r"[Cc]onnect|refused", by_port),
        ("no-host.invalid:4444", r".", by_port),
    ):
        with no_trace(folder):
            result = run_cli("--qmp", address, folder / "new")
        refuse(result, 3, rf"cannot connect to QMP socket {address}: .*{reason}.*-qmp {hint}")


def test_sockets_that_speak_something_else(tmp_path: Path):
    hmp = tmp_path / "hmp"
    monitor = ["-monitor", f"unix:{hmp},server=on,wait=off"]
    with stopped_machine(_QEMU, monitor) as machine:
        for address, reason in (
            (hmp, r"this is the human monitor, not a QMP socket \(use --hmp\)$"),
            (machine.gdb_socket, r"this is a gdbstub, not a QMP socket \(use --gdb\)$"),
        ):
            with no_trace(tmp_path):
                result = run_cli("--qmp", address, tmp_path / "new")
            refuse(result, 3, reason)
        assert guest_status(machine) == "prelaunch"


def test_a_busy_qmp_socket(stopped: QemuMachine, tmp_path: Path):
    with RawQmp(stopped.qmp_sockets[0]), no_trace(tmp_path):
        result = run_cli(*way_to("qmp", stopped), tmp_path / "new")
    refuse(result, 3, r"is busy: held by PID \d+ .*\(QEMU serves one client on a QMP socket")


def test_a_server_that_closes_at_once(tmp_path: Path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "server"))
    server.listen()
    with server, no_trace(tmp_path):
        dump = subprocess.Popen(
            cli_argv("--qmp", tmp_path / "server", tmp_path / "new"),
            stderr=subprocess.PIPE,
            env=child_environment(),
        )
        server.accept()[0].close()
        status, error = finish(dump)
    assert status == 3
    assert_one_line(error, r"cannot connect to QMP socket .*: it was closed at once \(")


def test_tcp_passes_no_descriptors(tmp_path: Path):
    with stopped_machine(_QEMU, ["-qmp", "tcp:127.0.0.1:0,server=on,wait=off"]) as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            address = tcp_address_of_qmp(qmp)
        by_tcp = run_cli("--qmp", address, tmp_path / "tcp")
        by_both = run_cli("--gdb", machine.gdb_socket, "--qmp", address, tmp_path / "both")
        run_cli(*way_to("qmp", machine), tmp_path / "unix")
    assert (by_tcp.returncode, by_both.returncode) == (0, 0), by_tcp.stderr + by_both.stderr
    assert (tmp_path / "tcp").read_bytes() == (tmp_path / "unix").read_bytes()


def test_no_gdbstub_there(tmp_path: Path):
    address = tmp_path / "none"
    with no_trace(tmp_path):
        result = run_cli("--gdb", address, tmp_path / "new")
    refuse(result, 3, rf"cannot connect to gdbstub {address}: .*behind QEMU's -gdb")


@pytest.mark.skipif(shutil.which("gdbserver") is None, reason="needs gdbserver")
def test_a_stub_that_is_not_qemu(tmp_path: Path):
    with foreign_stub() as address, no_trace(tmp_path):
        result = run_cli("--gdb", address, tmp_path / "new")
    # gdbserver 16 ends itself when another client comes after the first, which has looked at it.
    refuse(result, 3, r"is no gdbstub of QEMU|gdb cannot connect to")


@contextmanager
def foreign_stub() -> Iterator[str]:
    with subprocess.Popen(
        ["gdbserver", "127.0.0.1:0", "sleep", "600"], stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        port = ""
        while not port:
            found = re.search(r"Listening on port (\d+)", server.stderr.readline())
            port = found[1] if found else ""
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.kill()


# --- QEMU and other clients, in the middle ---


@pytest.mark.parametrize("door", DOORS)
def test_qemu_is_gone(tmp_path: Path, door: str):
    with stopped_machine(_QEMU) as machine:
        os.kill(machine.pid, signal.SIGKILL)
        wait_until(lambda: not machine.is_running(), "QEMU ended")
        with no_trace(tmp_path):
            result = run_cli(*way_to(door, machine), tmp_path / "new")
    refuse(result, 3, r"Connection refused|could not connect")


@pytest.mark.parametrize(
    ("door", "memory"), [("qmp", "pmemsave"), ("gdb", "pmemsave"), ("gdb", "gdbstub")]
)
def test_qemu_is_killed_in_the_middle(tmp_path: Path, door: str, memory: str):
    size = "128" if memory == "gdbstub" else "2048"  # MiB: so that a dump takes a while
    with QemuMachine(_QEMU, ["-m", size]) as machine, no_trace(tmp_path):
        words = [*way_to(door, machine), "--memory", memory]
        with open_dump(words, tmp_path / "new") as dump:
            wait_until(lambda: partial_size(tmp_path) > _MIB, "the dump has begun")
            os.kill(machine.pid, signal.SIGKILL)
            status, error = finish(dump)
    assert status == 3
    assert_one_line(error, r"the guest is gone: QEMU closed ")


@pytest.mark.parametrize(("action", "after"), [("cont", "running"), ("system_reset", "prelaunch")])
def test_somebody_lets_it_run_or_resets_it(tmp_path: Path, action: str, after: str):
    with (
        QemuMachine(_QEMU, ["-m", "64"]) as machine,
        RawQmp(machine.qmp_sockets[1]) as other,
        no_trace(tmp_path),
    ):
        other.execute("stop")
        with open_dump(way_to("qmp", machine), "-") as dump:
            assert dump.stdout is not None
            dump.stdout.read(1000)
            other.execute(action)
            if action == "system_reset":
                other.wait_for_event("RESET")
            status, error = finish(dump)
        assert other.execute("query-status")["status"] == after
    assert status == 3
    assert_one_line(error, r"somebody else let the guest run, or reset it, while it was dumped \(")


@pytest.mark.parametrize("door", DOORS)
def test_qemu_dumps_by_itself(tmp_path: Path, door: str):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with QemuMachine(_QEMU, ["-m", "64"]) as machine, RawQmp(machine.qmp_sockets[1]) as other:
        protocol = f"file:{fifo}"
        other.execute("dump-guest-memory", paging=False, protocol=protocol, detach=True)
        with no_trace(tmp_path):
            result = run_cli(*way_to(door, machine), tmp_path / "new")
        assert other.execute("query-status")["status"] == "save-vm"
        assert other.execute("query-dump")["status"] == "active"
        os.close(reader)  # which ends QEMU's dump
        other.wait_for_event("DUMP_COMPLETED")
        wait_until(lambda: other.execute("query-status")["running"], "the guest runs")
    refuse(result, 3, r"QEMU is writing a dump of its own \(try again when 'info dump' says")


def test_two_dumps_at_the_same_time(tmp_path: Path):
    with QemuMachine(_QEMU, ["-m", "64"]) as machine:
        second = ["--qmp", str(machine.qmp_sockets[1])]
        with open_dump(way_to("qmp", machine), "-") as first:
            assert first.stdout is not None
            first.stdout.read(1000)
            assert run_cli(*second, "-z", tmp_path / "second").returncode == 0
            status, error = finish(first)
        assert status == 0, error
        assert guest_status(machine) == "running"


# --- interrupts ---


@pytest.mark.parametrize(
    ("door", "number"),
    [
        *(("qmp", number) for number in _SIGNALS),
        *(("gdb", number) for number in _SIGNALS),
        ("gdb and qmp", signal.SIGINT),
    ],
)
def test_an_interrupt_lets_the_guest_run_again(
    running: QemuMachine, tmp_path: Path, door: str, number: signal.Signals
):
    words = [*way_to(door, running), "--memory", "pmemsave"]
    with no_trace(tmp_path), open_dump(words, tmp_path / "new") as dump:
        wait_until(lambda: partial_size(tmp_path) > _MIB, "the dump has begun")
        os.kill(dump.pid, number)
        status, error = finish(dump)
    assert status == 130
    assert_one_line(error, r": interrupted: no partial dump was left behind$")
    assert guest_status(running) == "running"


@pytest.mark.parametrize("door", ["qmp", "gdb", "gdb and qmp"])
def test_an_interrupt_leaves_a_stopped_guest_stopped(
    stopped: QemuMachine, tmp_path: Path, door: str
):
    memory = "pmemsave" if door == "qmp" else "gdbstub"
    words = [*way_to(door, stopped), "--memory", memory, f"|cat >{tmp_path}/fifo"]
    os.mkfifo(tmp_path / "fifo")
    with no_trace(tmp_path), open_dump(words) as dump, (tmp_path / "fifo").open("rb") as reader:
        reader.read(1000)
        os.kill(dump.pid, signal.SIGINT)
        status, error = finish(dump)
    assert status == 130
    assert_one_line(error, r": interrupted: no partial dump was left behind$")
    assert guest_status(stopped) == "prelaunch"


def test_an_interrupt_at_any_moment(running: QemuMachine, tmp_path: Path):
    argv = cli_argv(*way_to("qmp", running), "--memory", "pmemsave", tmp_path / "new")
    # What comes before is Python's own start.
    argv[2] = argv[2].replace("sys.exit", "print(flush=True); sys.exit")
    for delay in range(20, 700, 50):  # milliseconds, from the first imports to the dump
        with (
            no_trace(tmp_path),
            subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=child_environment()
            ) as dump,
        ):
            assert dump.stdout is not None
            dump.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                dump.wait(delay / 1000)
            dump.send_signal(signal.SIGINT)
            status, error = finish(dump)
            if (tmp_path / "new").exists():  # complete before the interrupt, as its name tells
                (tmp_path / "new").unlink()
                break
        assert status in {130, -signal.SIGINT}, error
        assert len(error.splitlines()) == (status == 130), error
        assert guest_status(running) == "running"


def test_more_interrupts_do_not_disturb_the_clean_up(running: QemuMachine, tmp_path: Path):
    words = [*way_to("qmp", running), "--memory", "pmemsave"]
    with no_trace(tmp_path), open_dump(words, tmp_path / "new") as dump:
        wait_until(lambda: partial_size(tmp_path) > _MIB, "the dump has begun")
        while dump.poll() is None:
            os.kill(dump.pid, signal.SIGINT)
        status, error = finish(dump)
    assert status == 130, error
    assert guest_status(running) == "running"


def test_the_packages_are_named_that_are_missing(stopped: QemuMachine, tmp_path: Path):
    # As a Python without them: -S leaves the site directories out.
    for words, package in (
        ([*way_to("qmp", stopped)], "qemu.qmp"),
        ([*way_to("gdb", stopped)], "(?:pygdbmi|qemu.qmp)"),
    ):
        argv = cli_argv(*words, tmp_path / "new")
        result = subprocess.run(
            [argv[0], "-S", *argv[1:]],
            capture_output=True,
            text=True,
            env=child_environment(),
            check=False,
            timeout=300,
        )
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        refuse(
            result,
            2,
            rf"needs the Python package {package}, which Python {version} lacks \(\S+ -m pip ",
        )
