"""Memory that is not simply there: hotplugged, written by others, in huge pages, behind walls."""

from __future__ import annotations

import filecmp
import mmap
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from tests.conftest import planted_content
from tests.support.doors import child_environment, cli_argv, guest_status, run_cli
from tests.support.oracle import OracleDumps
from tests.support.raw_qmp import RawQmp

pytestmark = pytest.mark.qemu
MIB = 1 << 20
QEMU = "qemu-system-x86_64"
SHARED_RAM = ["-M", "q35,memory-backend=ram", "-m", "64,slots=2,maxmem=256M"]
HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives up privileges of root")


def memfd_of(machine: QemuMachine, size: int) -> Path:
    """Return the memfd of QEMU's that has a size."""
    found = [
        link
        for link in Path(f"/proc/{machine.pid}/fd").iterdir()
        if str(link.readlink()).startswith("/memfd:memory-backend-memfd")
        and link.stat().st_size == size
    ]
    assert len(found) == 1
    return found[0]


@pytest.fixture
def written_by_others() -> Iterator[QemuMachine]:
    """RAM and a hotplugged DIMM in memfds that another process writes to, as for vhost-user.

    Anew for each test: of what was dumped once, QEMU has page table entries.
    """
    backend = ["-object", "memory-backend-memfd,id=ram,size=64M,share=on"]
    with stopped_machine([QEMU], [*SHARED_RAM, *backend]) as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            dimm = {"qom-type": "memory-backend-memfd", "id": "hot", "size": 32 * MIB}
            qmp.execute("object-add", **dimm, share=True)
            qmp.execute("device_add", driver="pc-dimm", id="dimm", memdev="hot")
            # Connected: QEMU closes no descriptor meanwhile.
            for size, offset in ((64 * MIB, 5 * MIB), (32 * MIB, 11 * MIB + 4096)):
                with (
                    memfd_of(machine, size).open("r+b") as backing,
                    mmap.mmap(backing.fileno(), size) as ours,
                ):
                    ours[offset : offset + len(planted_content())] = planted_content()
        yield machine


@pytest.mark.parametrize("source", ["auto", "backing_file", "process", "native_stream", "pmemsave"])
@pytest.mark.parametrize("words", [(), ("--snapshot",)])
def test_what_another_process_wrote_is_dumped(
    written_by_others: QemuMachine, tmp_path: Path, source: str, words: tuple[str, ...]
):
    ours = tmp_path / "ours"
    qmp = ("--qmp", written_by_others.qmp_sockets[0])
    done = run_cli(*qmp, "--exact", "--memory", source, *words, ours)
    assert done.returncode == 0, done.stderr
    assert ours.read_bytes().count(planted_content()) == 2
    assert filecmp.cmp(ours, OracleDumps(written_by_others, tmp_path).elf, shallow=False)


# Another file system at the same place, as in a container.
_OWN_SHM = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$0" "$@"']


@needs_root
@pytest.mark.parametrize(
    ("source", "usable"),
    [("backing_file", True), ("process", True), ("native_stream", True), ("pmemsave", False)],
)
def test_qemu_in_another_mount_namespace(tmp_path: Path, source: str, *, usable: bool):
    backend = "memory-backend-file,id=ram,size=64M,share=on,mem-path=/dev/shm/ram"
    with stopped_machine([*_OWN_SHM, QEMU], [*SHARED_RAM, "-object", backend]) as machine:
        assert not Path("/dev/shm/ram").exists()
        done = run_cli(
            *("--qmp", machine.qmp_sockets[0], "--memory", source, "--exact", tmp_path / "x")
        )
        if not usable:
            assert done.returncode == 3
            assert "(QEMU is in another mount namespace, or of another user)" in done.stderr
            assert not list(tmp_path.iterdir())
            return
        assert done.returncode == 0, done.stderr
        assert f"memory by {source}" in done.stderr
        assert filecmp.cmp(tmp_path / "x", OracleDumps(machine, tmp_path).elf, shallow=False)


@needs_root
def test_where_only_the_qmp_socket_can_be_reached(tmp_path: Path):
    # QEMU is of another user, without our /dev/shm; we may look into no process.
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    machine = stopped_machine([*_OWN_SHM, *as_nobody, QEMU], ["-M", "q35", "-m", "64"])
    machine.folder.chmod(0o777)
    with machine:
        words = ["--qmp", machine.qmp_sockets[0], "--exact", "--verbose", tmp_path / "x"]
        done = subprocess.run(
            ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace", *cli_argv(*words)],
            capture_output=True,
            text=True,
            check=False,
            env=child_environment(),
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert "memory by native_stream" in done.stderr
        assert re.search(r"process was not used: .*belongs to user 65534, not to 0", done.stderr)
        assert guest_status(machine) == "prelaunch"
        tmp_path.chmod(0o777)
        for parent in tmp_path.parents:
            if parent == Path(tempfile.gettempdir()):
                break
            parent.chmod(0o755)
        assert filecmp.cmp(tmp_path / "x", OracleDumps(machine, tmp_path).elf, shallow=False)


@needs_root
def test_where_only_the_stub_of_another_user_can_be_reached(tmp_path: Path):
    """QEMU may not enter our directory; auto takes the stub."""
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    machine = stopped_machine([*as_nobody, QEMU], ["-M", "q35", "-m", "4"])
    machine.folder.chmod(0o777)
    reason = "Permission denied (QEMU is in another mount namespace, or of another user)"
    with machine:
        asked, auto = (
            subprocess.run(
                [
                    *("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"),
                    *cli_argv("--gdb", machine.gdb_socket, "--memory", source, tmp_path / source),
                ],
                capture_output=True,
                text=True,
                check=False,
                env=child_environment(),
                timeout=300,
            )
            for source in ("pmemsave", "auto")
        )
        assert guest_status(machine) == "prelaunch"
    assert reason in asked.stderr
    assert asked.returncode == 3
    assert "pmemsave was not used: QEMU's pmemsave: Error: Could not open" in auto.stderr
    assert reason in auto.stderr
    assert "memory by gdbstub" in auto.stderr
    assert (tmp_path / "auto").exists()


@needs_root
def test_an_unprivileged_user_dumps_by_files_that_qemu_of_root_may_open():
    as_another = ["setpriv", "--reuid=23456", "--regid=23456", "--clear-groups"]
    # For Python alone, which may be in a folder of root's.
    may_read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    with stopped_machine([QEMU], ["-M", "q35", "-m", "16"]) as machine:
        machine.folder.chmod(0o711)
        machine.gdb_socket.chmod(0o777)
        home = machine.folder / "home"
        home.mkdir()
        os.chown(home, 23456, 23456)
        words = ["--gdb", machine.gdb_socket, "--verbose", home / "dump"]
        done = subprocess.run(
            [*as_another, *may_read, *cli_argv(*words)],
            capture_output=True,
            text=True,
            check=False,
            env=child_environment(HOME=str(home), TMPDIR=str(home)),
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert "memory by pmemsave" in done.stderr
        assert guest_status(machine) == "prelaunch"


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Huge pages for one machine, given back afterwards."""
    setting = HUGE_PAGES / "nr_hugepages"
    if not setting.exists() or not os.access(setting, os.W_OK):
        pytest.skip("the kernel's number of huge pages cannot be set here")
    before = setting.read_text("ascii")
    try:
        for _ in range(5):
            setting.write_text(str(int(before) + 48), "ascii")
            if int((HUGE_PAGES / "free_hugepages").read_text("ascii")) >= 32:
                break
            Path("/proc/sys/vm/compact_memory").write_text("1", "ascii")
        else:
            pytest.skip("the kernel has no huge pages left")
        yield
    finally:
        setting.write_text(before, "ascii")


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("share", ["on", "off"])
def test_memory_in_huge_pages(tmp_path: Path, share: str):
    content = tmp_path / "content"
    content.write_bytes(planted_content())
    backend = f"memory-backend-memfd,id=ram,size=64M,share={share},hugetlb=on,hugetlbsize=2M"
    loader = f"loader,file={content},addr={5 * MIB:#x},force-raw=on"
    arguments = [*SHARED_RAM, "-object", backend, "-device", loader]
    with stopped_machine([QEMU], arguments) as machine:
        for source in ("auto", "process", "native_stream", "pmemsave"):
            done = run_cli(
                *("--qmp", machine.qmp_sockets[0], "--memory", source, "--exact"),
                tmp_path / source,
            )
            assert done.returncode == 0, done.stderr
            if source == "auto":
                fastest = "backing_file" if share == "on" else "process"
                assert f"memory by {fastest}" in done.stderr
        native = OracleDumps(machine, tmp_path).elf
        for source in ("auto", "process", "native_stream", "pmemsave"):
            assert filecmp.cmp(tmp_path / source, native, shallow=False), source
