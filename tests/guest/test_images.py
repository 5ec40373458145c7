from __future__ import annotations

import filecmp
from pathlib import Path

import pytest

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest_images.machine import BootedGuest, stopped_machine
from qemu_dump_ext.guest_images.manifest import default_cache, find_image
from qemu_dump_ext.guest_images.store import ImageStore
from tests.support.doors import run_cli, run_gdb
from tests.support.oracle import OracleDumps
from tests.support.raw_qmp import RawQmp
from tests.support.user_mode import stop_in_user_mode

_MIB = 1 << 20


@pytest.mark.qemu
def test_a_machine_without_a_guest_dumps(tmp_path: Path):
    with (
        stopped_machine(["qemu-system-x86_64"], ["-M", "q35"]) as machine,
        RawQmp(machine.qmp_sockets[0]) as first,
        RawQmp(machine.qmp_sockets[1]) as second,
    ):
        assert first.execute("query-status")["running"] is False
        dump = tmp_path / "dump"
        second.execute("dump-guest-memory", paging=False, protocol=f"file:{dump}")
        assert dump.read_bytes()[:4] == b"\x7fELF"


@pytest.mark.guest
def test_the_guest_is_as_the_manifest_says(x86_64_guest: BootedGuest):
    image = x86_64_guest.image
    assert image.marker in x86_64_guest.console_text().splitlines()
    with RawQmp(x86_64_guest.qmp_sockets[0]) as qmp:
        assert len(qmp.execute("query-cpus-fast")) == image.cpus
    x86_64_guest.send_console("dmesg | tail -n 1; cat /proc/[0-9]*/comm; echo E''ND\n")
    text = x86_64_guest.wait_for_console("END", timeout_seconds=300)
    assert image.kernel_log in text
    assert set(image.processes) <= set(text.splitlines())


@pytest.mark.guest
def test_the_kernel_has_given_its_vmcoreinfo(x86_64_guest: BootedGuest, tmp_path: Path):
    dump = tmp_path / "dump"
    with RawQmp(x86_64_guest.qmp_sockets[1]) as qmp:
        qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{dump}", begin=0, length=1)
    assert b"VMCOREINFO\0" in dump.read_bytes()
    assert f"OSRELEASE={x86_64_guest.files.release}\n".encode() in dump.read_bytes()


@pytest.mark.guest
@pytest.mark.gdb
def test_exact_dumps_of_programs_are_qemus(x86_64_guest: BootedGuest, tmp_path: Path):
    stop_in_user_mode(x86_64_guest)
    native = OracleDumps(x86_64_guest, tmp_path)
    by_qmp, by_stub = tmp_path / "by-qmp", tmp_path / "by-stub"
    done = run_cli("--qmp", x86_64_guest.qmp_sockets[0], "--exact", by_qmp)
    assert done.returncode == 0, done.stderr
    in_gdb = run_gdb(x86_64_guest, [f"qemu-dump-guest-memory --exact {by_stub}"])
    assert filecmp.cmp(by_qmp, native.elf, shallow=False)
    assert filecmp.cmp(by_stub, native.elf, shallow=False), in_gdb.stdout + in_gdb.stderr
    with RawQmp(x86_64_guest.qmp_sockets[0]) as qmp:
        qmp.execute("cont")


@pytest.mark.guest
def test_a_crash_pauses_the_guest(x86_64_guest: BootedGuest):
    with RawQmp(x86_64_guest.qmp_sockets[0]) as qmp:
        x86_64_guest.send_console("echo c >/proc/sysrq-trigger\n")
        panic = qmp.wait_for_event("GUEST_PANICKED")
        assert panic["data"]["action"] == "pause"
        assert qmp.execute("query-status")["status"] == "guest-panicked"


@pytest.mark.guest
def test_memory_is_filled_before_the_marker():
    image = find_image("x86_64")
    store = ImageStore(default_cache())
    with BootedGuest(
        image, store.fetch(image), cpus=1, fill_mib=64, fill_disk=store.fill_disk(64)
    ) as guest:
        guest.send_console("stat -c %s /fill/content; echo E''ND\n")
        assert str(64 * _MIB) in guest.wait_for_console("END", timeout_seconds=300)


@pytest.mark.guest
def test_a_broken_boot_fails_at_once():
    image = find_image("x86_64")
    files = ImageStore(default_cache()).fetch(image)
    guest = BootedGuest(image, files, kernel_arguments="rdinit=/bin root=none")
    with pytest.raises(SourceError, match="the guest failed: Kernel panic"), guest:
        pass
