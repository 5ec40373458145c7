from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pluggy
import pytest

from qemu_dump_ext.guest_images.machine import BootedGuest, QemuMachine, stopped_machine
from qemu_dump_ext.guest_images.manifest import default_cache, find_image
from qemu_dump_ext.guest_images.store import ImageStore
from tests.support.folders import folder_for
from tests.support.oracle import OracleDumps
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytest_plugins = [
    "pytester",
    "tests.support.linux_guests",
    "tests.support.native_dumps",
    "tests.support.scheduling",
]


_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def pytest_configure() -> None:
    """Let tests interrupt programs, which inherit what the shell of a background job ignores."""
    for number in _INTERRUPTS:
        if signal.getsignal(number) is signal.SIG_IGN:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)


@pytest.fixture(scope="session", autouse=True)
def _runtime_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # What dumps write down of guests they have stopped is not for who dumps others on this host.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        yield


@pytest.fixture(autouse=True)
def _interrupts_as_before() -> Iterator[None]:
    # A program's `main` handles them until its process ends. What stays blocked is inherited by
    # every process that later tests start, and nothing of ours may leave it so.
    before = [(number, signal.getsignal(number)) for number in _INTERRUPTS]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    for number, handler in before:
        signal.signal(number, handler)
    assert signal.pthread_sigmask(signal.SIG_SETMASK, blocked) == blocked


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Generator[None, pluggy.Result[pytest.TestReport], None]:
    """Where everything is installed, a test that is skipped has failed."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be: {report.longrepr}"


@pytest.fixture(scope="module")
def x86_64_guest() -> Iterator[BootedGuest]:
    """A guest of this module's own, which its tests may change in the order they stand in."""
    image = find_image("x86_64")
    with BootedGuest(image, ImageStore(default_cache()).fetch(image)) as guest:
        yield guest


@pytest.fixture(scope="session")
def linux_guest() -> Iterator[BootedGuest]:
    """One Linux guest for all tests that leave it as it was."""
    image = find_image("x86_64")
    with BootedGuest(image, ImageStore(default_cache()).fetch(image)) as guest:
        yield guest


@contextmanager
def _stopped(machine: QemuMachine) -> Iterator[None]:
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        wait_until(partial(_stops_idle, qmp), "no vCPU has anything to do")
    yield
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute("cont")


def _stops_idle(qmp: RawQmp) -> bool:
    """Stop a guest of x86_64; let it run on where another test has left it something to do."""
    qmp.execute("stop")
    registers = qmp.execute("human-monitor-command", **{"command-line": "info registers -a"})
    if registers.count("HLT=1") == registers.count("HLT="):
        return True
    qmp.execute("cont")
    return False


@pytest.fixture(scope="module")
def paused_linux(linux_guest: BootedGuest) -> Iterator[BootedGuest]:
    """The Linux guest, stopped while the tests of a module run."""
    with _stopped(linux_guest):
        yield linux_guest


@pytest.fixture(scope="module")
def paused_linux_native(paused_linux: BootedGuest, request: pytest.FixtureRequest) -> OracleDumps:
    """QEMU's own dumps of the stopped Linux guest."""
    return OracleDumps(paused_linux, folder_for(request, "native"))


@pytest.fixture(scope="module")
def vmlinux(paused_linux: BootedGuest) -> Path:
    """The kernel of the Linux guest, with DWARF."""
    store = ImageStore(default_cache())
    fetched = store.fetch(paused_linux.image, debug_symbols=True)
    assert fetched.vmlinux is not None
    return fetched.vmlinux


@pytest.fixture(scope="session")
def bare_machine(request: pytest.FixtureRequest) -> Iterator[QemuMachine]:
    """Two vCPUs that never ran, and memory with known content of every kind."""
    arguments = loaded_content(folder_for(request, "content"))
    with stopped_machine(["qemu-system-x86_64"], arguments) as machine:
        yield machine


PLANTED_AT = 0x200000


def loaded_content(directory: Path) -> list[str]:
    """Return the arguments of a small machine that has planted content in its memory."""
    content = directory / "content"
    content.write_bytes(planted_content())
    loader = f"loader,file={content},addr={PLANTED_AT:#x},force-raw=on"
    return ["-M", "q35", "-m", "16", "-smp", "2", "-device", loader]


def planted_content() -> bytes:
    """Pages that compress well, hardly, not at all, and pages of zeros in between."""
    text = Path(__file__).read_bytes()
    random_page = bytes((i * i * 31 + (i >> 3) * 17) & 0xFF for i in range(4096))
    pages = [(text * 3)[:4096], bytes(4096), random_page, b"\xa5" * 4096]
    return b"".join(pages * 64) + b"an unaligned end"


@pytest.fixture(scope="session")
def bare_native(bare_machine: QemuMachine, request: pytest.FixtureRequest) -> OracleDumps:
    """QEMU's own dumps of the machine that never ran."""
    return OracleDumps(bare_machine, folder_for(request, "native"))
