"""Machines with memory of every kind: through each source, the dump is QEMU's own."""

from __future__ import annotations

import filecmp
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qemu_dump_ext.errors import GuestMemoryFaultError, SourceError
from qemu_dump_ext.guest.access import GuestAccess, SourceContext
from qemu_dump_ext.guest.memory import GuestMemory, is_sparse
from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from qemu_dump_ext.memory_sources import monitor_read, open_memory
from qemu_dump_ext.memory_sources.process import ProcessMemory
from qemu_dump_ext.qemu.probe import ProbedGuest, probe_guest
from qemu_dump_ext.qemu.qmp import connect_qmp
from tests.conftest import planted_content
from tests.support.doors import child_environment, cli_argv, run_cli
from tests.support.folders import folder_for
from tests.support.oracle import OracleDumps
from tests.support.raw_qmp import RawQmp, tcp_address_of_qmp
from tests.support.sample_kdump import read_kdump, unflatten

pytestmark = pytest.mark.qemu
MIB = 1 << 20
QEMU = "qemu-system-x86_64"


@pytest.fixture(scope="module")
def content(request: pytest.FixtureRequest) -> Path:
    path = folder_for(request, "content") / "content"
    path.write_bytes(planted_content())
    return path


def loaders(content: Path, *addresses: int) -> list[str]:
    words = []
    for address in addresses:
        words += ["-device", f"loader,file={content},addr={address:#x},force-raw=on"]
    return words


@pytest.fixture(scope="module")
def numa_machine(content: Path, request: pytest.FixtureRequest) -> Iterator[QemuMachine]:
    """Two NUMA nodes, one in a memfd and one in a file, video memory, and a hotplugged DIMM."""
    backing = folder_for(request, "backing") / "memory"
    arguments = [
        *("-M", "q35", "-m", "64M,slots=2,maxmem=256M", "-smp", "2", "-device", "VGA"),
        *("-object", "memory-backend-memfd,id=node0,size=32M,share=on"),
        *("-object", f"memory-backend-file,id=node1,size=32M,share=on,mem-path={backing}"),
        *("-numa", "node,memdev=node0,cpus=0", "-numa", "node,memdev=node1,cpus=1"),
        *loaders(content, 0x200000, 0x2400000),
    ]
    machine = stopped_machine([QEMU], arguments)
    with machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            backend = {"qom-type": "memory-backend-memfd", "id": "hot", "size": 32 * MIB}
            qmp.execute("object-add", **backend, share=True)
            qmp.execute("device_add", driver="pc-dimm", id="dimm", memdev="hot")
        yield machine


@pytest.fixture(scope="module")
def private_file_machine(content: Path, request: pytest.FixtureRequest):
    """Memory in a private mapping of a file that had content before QEMU was started."""
    backing = folder_for(request, "backing") / "memory"
    backing.write_bytes(b"\xa5\x5a" * 4096 * 64 + planted_content())
    os.truncate(backing, 32 * MIB)
    arguments = [
        *("-M", "q35,memory-backend=ram", "-m", "32"),
        *("-object", f"memory-backend-file,id=ram,size=32M,share=off,mem-path={backing}"),
        *loaders(content, 0x800000),
    ]
    with stopped_machine([QEMU], arguments) as machine:
        yield machine


@pytest.fixture(scope="module")
def memfd_machine(content: Path) -> Iterator[QemuMachine]:
    """Memory in a memfd that nobody has read: QEMU's own dump allocates all of it."""
    arguments = ["-M", "q35,memory-backend=ram", *loaders(content, 0x800000)]
    backend = ["-object", "memory-backend-memfd,id=ram,size=64M,share=on"]
    with stopped_machine([QEMU], [*arguments, *backend]) as machine:
        yield machine


@pytest.fixture(params=["numa_machine", "private_file_machine"])
def machine(request: pytest.FixtureRequest) -> QemuMachine:
    found: QemuMachine = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("source", ["auto", "process", "native_stream", "pmemsave"])
@pytest.mark.parametrize(("dump_format", "words"), [("elf", ()), ("kdump_zlib", ("-z",))])
def test_exact_dump_is_qemus(machine, tmp_path: Path, source, dump_format, words):
    # Ours first: QEMU's own dump touches all memory, and then nothing is unknown to the page map.
    ours = tmp_path / "ours"
    done = run_cli("--qmp", machine.qmp_sockets[0], "--exact", "--memory", source, *words, ours)
    assert done.returncode == 0, done.stderr
    native = getattr(OracleDumps(machine, tmp_path), dump_format)
    assert filecmp.cmp(ours, native, shallow=False)


def test_blocks_in_no_file_come_from_the_process(numa_machine, tmp_path: Path):
    native = OracleDumps(numa_machine, tmp_path).elf
    ours = tmp_path / "ours"
    done = run_cli(
        *("--qmp", numa_machine.qmp_sockets[0], "--exact", "--memory", "backing_file", ours)
    )
    assert "memory by backing_file+process" in done.stderr
    assert filecmp.cmp(ours, native, shallow=False)


def test_memory_that_is_not_shared_is_in_no_file(private_file_machine, tmp_path: Path):
    done = run_cli(
        *("--qmp", private_file_machine.qmp_sockets[0], "--memory", "backing_file", tmp_path / "x")
    )
    assert done.returncode == 3
    assert "guest memory is in no shared file" in done.stderr
    assert not list(tmp_path.iterdir())


@contextmanager
def opened(machine: QemuMachine, source: str) -> Iterator[tuple[GuestMemory, ProbedGuest]]:
    with connect_qmp(str(machine.qmp_sockets[0])) as monitor:
        access = GuestAccess.by_qmp(monitor)
        guest = probe_guest(access)
        with open_memory(source, access.source_context(guest.ram_blocks, None)) as chosen:
            yield chosen.memory, guest


SOURCES = ["backing_file", "process", "native_stream", "pmemsave"]


@pytest.mark.parametrize("source", SOURCES)
def test_reads_of_any_place_and_size_are_what_the_monitor_shows(numa_machine, source):
    with (
        opened(numa_machine, source) as (memory, guest),
        connect_qmp(str(numa_machine.qmp_sockets[1])) as monitor,
    ):
        for block in guest.ram_blocks:
            for gpa, size in (
                (block.gpa, 1),
                (block.gpa + 4093, 7),
                (block.gpa + 4096 * 3 - 1, 4098),
                (block.end - 5, 5),
                (block.end - 4097, 4097),
            ):
                seen = bytearray(size)
                memory.read_into(gpa, memoryview(seen))
                expected = b"".join(
                    monitor_read(monitor, at, min(512, gpa + size - at))
                    for at in range(gpa, gpa + size, 512)
                )
                assert seen == expected, (block, hex(gpa), size)


@pytest.mark.parametrize("source", ["backing_file", "process"])
def test_a_hole_between_blocks_is_refused(numa_machine, source):
    with opened(numa_machine, source) as (memory, guest):
        with pytest.raises(GuestMemoryFaultError):
            memory.read_into(guest.ram_blocks[-1].end, memoryview(bytearray(8)))
        with pytest.raises(GuestMemoryFaultError):
            memory.read_into(0xA0000, memoryview(bytearray(8)))


@pytest.mark.parametrize(
    ("kind", "source", "at_least"),
    [
        ("memfd_machine", "backing_file", 40 * MIB),
        ("numa_machine", "backing_file", 0),
        ("numa_machine", "process", 0),  # what QEMU has not mapped of a file may have content
        ("private_file_machine", "process", 0),
        ("bare_machine", "process", 12 * MIB),
    ],
)
def test_what_is_not_populated_is_zero(
    request: pytest.FixtureRequest, kind: str, source: str, at_least: int
):
    machine = request.getfixturevalue(kind)
    with opened(machine, source) as (memory, guest), opened_by_qmp2(machine) as other:
        assert memory.name.startswith(source)
        assert is_sparse(memory)
        skipped = 0
        for block in guest.ram_blocks:
            position = block.gpa
            for start, end in [*memory.populated(block.gpa, block.size), (block.end, block.end)]:
                assert block.gpa <= position <= start <= end <= block.end
                expected = bytearray(start - position)
                if expected:
                    other.read_into(position, memoryview(expected))
                assert not any(expected)
                skipped += start - position
                position = end
        assert skipped >= at_least


@contextmanager
def opened_by_qmp2(machine: QemuMachine) -> Iterator[GuestMemory]:
    with connect_qmp(str(machine.qmp_sockets[1])) as monitor:
        guest = probe_guest(GuestAccess.by_qmp(monitor))
        with open_memory("pmemsave", SourceContext(monitor, None, guest.ram_blocks)) as chosen:
            yield chosen.memory


def test_qemu_does_not_grow(content: Path, tmp_path: Path):
    with stopped_machine([QEMU], ["-M", "q35", "-m", "8192", *loaders(content, 1 << 20)]) as large:
        before = memory_of(large.pid)
        for words in ((), ("-z",)):
            done = run_cli(*("--qmp", large.qmp_sockets[0], "--force", *words, tmp_path / "x"))
            assert done.returncode == 0, done.stderr
            assert "memory by process" in done.stderr
        after = memory_of(large.pid)
    assert after["VmRSS"] - before["VmRSS"] < 4 << 10  # KiB; its monitor allocates a little
    assert after["VmPTE"] - before["VmPTE"] < 256


def memory_of(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines)
    return {name: int(value.split()[0]) for name, value in pairs if value.endswith(" kB")}


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives up privileges of root")
WITHOUT_PTRACE = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"]


def run_unprivileged(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*WITHOUT_PTRACE, *cli_argv(*words)],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
        timeout=300,
    )


@needs_root
def test_a_process_of_another_user_is_named(tmp_path: Path):
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", QEMU]
    machine = stopped_machine(command)
    machine.folder.chmod(0o777)
    with machine:
        socket = machine.qmp_sockets[0]
        done = run_unprivileged("--qmp", socket, "--memory", "process", tmp_path / "x")
        assert done.returncode == 3
        assert f"process {machine.pid} belongs to user 65534, not to 0" in done.stderr
        assert "CAP_SYS_PTRACE" in done.stderr
        assert not list(tmp_path.iterdir())
        done = run_cli("--qmp", socket, "--memory", "process", tmp_path / "x")
        assert done.returncode == 0, done.stderr


@needs_root
def test_a_process_in_another_pid_namespace_is_not_guessed(tmp_path: Path):
    # The namespace is ours: what QEMU is, is not visible in it.
    with stopped_machine([QEMU]) as machine:
        words = cli_argv("--qmp", machine.qmp_sockets[0], "--memory", "process", tmp_path / "x")
        done = subprocess.run(
            ["unshare", "--pid", "--fork", "--mount-proc", *words],
            capture_output=True,
            text=True,
            check=False,
            env=child_environment(),
            timeout=300,
        )
        assert done.returncode == 3
        assert "no process here that we may look at has the other end" in done.stderr


def test_over_tcp_the_process_is_found_as_well(tmp_path: Path):
    arguments = ["-qmp", "tcp:127.0.0.1:0,server=on,wait=off"]
    with stopped_machine([QEMU], arguments) as machine, RawQmp(machine.qmp_sockets[1]) as qmp:
        address = tcp_address_of_qmp(qmp)
        done = run_cli("--qmp", address, "--memory", "process", tmp_path / "x")
        assert done.returncode == 0, done.stderr
        assert "memory by process" in done.stderr


def test_a_daemonized_qemu_is_found(tmp_path: Path):
    # The socket listens in the process that forked, and so has another pid in its credentials.
    socket, pid_file = tmp_path / "qmp", tmp_path / "pid"
    command = [QEMU, "-S", "-m", "16", "-nodefaults", "-display", "none", "-daemonize"]
    command += ["-qmp", f"unix:{socket},server=on,wait=off", "-pidfile", str(pid_file)]
    subprocess.run(command, check=True, timeout=300)
    try:
        done = run_cli("--qmp", socket, "--memory", "process", tmp_path / "x")
        assert done.returncode == 0, done.stderr
    finally:
        os.kill(int(pid_file.read_text()), 15)


def test_two_machines_are_not_mistaken_for_each_other():
    with (
        stopped_machine([QEMU]) as first,
        stopped_machine([QEMU]) as second,
        opened(first, "process") as (one, _),
        opened(second, "process") as (other, _),
    ):
        assert isinstance(one, ProcessMemory)
        assert isinstance(other, ProcessMemory)
        assert (one._pid, other._pid) == (first.pid, second.pid)


def test_a_guest_that_ends_is_an_error_of_one_line():
    with stopped_machine([QEMU]) as machine, opened(machine, "process") as (memory, _):
        machine.stop()
        with pytest.raises(SourceError, match="the guest is gone"):
            memory.read_into(0, memoryview(bytearray(8)))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "words",
    [
        ("-z", "--level", "4"),  # not ISA-L, which may pack a page in one of several ways
        ("-z", "zstd", "-R"),
        ("-z", "--level", "4", "--omit-zero"),
        (),
    ],
)
def test_the_number_of_threads_changes_nothing(numa_machine, tmp_path: Path, threads, words):
    default, other = tmp_path / "default", tmp_path / "threads"
    qmp = ("--qmp", numa_machine.qmp_sockets[0])
    assert run_cli(*qmp, *words, default).returncode == 0
    assert run_cli(*qmp, *words, "--threads", threads, other).returncode == 0
    assert filecmp.cmp(default, other, shallow=False)


@pytest.mark.parametrize("words", [("-z",), ("-z", "-R"), ("-z", "--omit-zero", "-R"), ()])
def test_without_third_party_packages_the_pages_are_the_same(numa_machine, tmp_path: Path, words):
    # As in a gdb whose Python is another one: no numpy, and zlib of the standard library.
    block = (
        "import sys; sys.modules.update(numpy=None, isal=None);"
        "from qemu_dump_ext.cli.dump_command import main; sys.exit(main())"
    )
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    options = ["--qmp", numa_machine.qmp_sockets[0], *words]
    level = ["--level", "4"] if words else []  # ISA-L has none of that level
    command = [sys.executable, "-c", block, *map(str, options), *level, str(plain)]
    subprocess.run(command, check=True, env=child_environment(), timeout=300)
    assert run_cli(*options, *level, ours).returncode == 0
    if not words:
        assert filecmp.cmp(plain, ours, shallow=False)
        return
    # Without numpy, pages of equal content are stored each by itself.
    images = [dump.read_bytes() for dump in (plain, ours)]
    if "-R" not in words:
        images = [bytes(unflatten(image)) for image in images]
    assert len(images[1]) <= len(images[0])
    for page, other in zip(*(read_kdump(image, "<", 8) for image in images), strict=True):
        assert page == other


def test_a_sparse_elf_reads_as_a_full_one(numa_machine, tmp_path: Path):
    sparse, full, piped = (tmp_path / name for name in ("sparse", "full", "piped"))
    qmp = ("--qmp", numa_machine.qmp_sockets[0])
    assert run_cli(*qmp, sparse).returncode == 0
    assert run_cli(*qmp, "--no-sparse", full).returncode == 0
    assert run_cli(*qmp, f"|cat >{piped}").returncode == 0
    assert filecmp.cmp(sparse, full, shallow=False)
    assert filecmp.cmp(sparse, piped, shallow=False)
    assert sparse.stat().st_blocks * 512 < full.stat().st_blocks * 512 // 8


def test_no_holes_are_left_where_a_file_had_content(numa_machine, tmp_path: Path):
    full, ours = tmp_path / "full", tmp_path / "ours"
    qmp = ("--qmp", numa_machine.qmp_sockets[0])
    assert run_cli(*qmp, full).returncode == 0
    ours.write_bytes(b"\xff" * full.stat().st_size)
    with ours.open("r+b") as stream:
        done = run_cli(*qmp, f"fd:{stream.fileno()}", pass_fds=[stream.fileno()])
    assert done.returncode == 0, done.stderr
    assert filecmp.cmp(full, ours, shallow=False)
