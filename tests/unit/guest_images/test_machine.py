from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qemu_dump_ext.errors import RequestError, SourceError
from qemu_dump_ext.guest_images.machine import BootedGuest, QemuMachine
from qemu_dump_ext.guest_images.manifest import find_image
from qemu_dump_ext.guest_images.store import FetchedImage


def test_a_socket_path_that_is_too_long_is_refused(tmp_path: Path):
    machine = QemuMachine(["true"], [], qmp_socket=tmp_path / ("x" * 100))
    with pytest.raises(RequestError, match="107 bytes"), machine:
        pass
    assert not machine.folder.exists()


def test_a_missing_program_is_named():
    machine = QemuMachine(["qemu-system-vax"], [])
    with pytest.raises(RequestError, match="cannot start qemu-system-vax"), machine:
        pass
    assert not machine.folder.exists()


def test_what_qemu_complained_about_is_told():
    script = "import sys; sys.exit('no such machine')"
    with (
        pytest.raises(SourceError, match="QEMU ended: no such machine"),
        QemuMachine([sys.executable, "-c", script], []),
    ):
        pass


def test_too_little_memory_to_fill_is_refused():
    root = Path("/nonexistent")
    files = FetchedImage(root, "6.1", "6.1", root, root, root, None, None)
    with pytest.raises(RequestError, match="256 MiB of guest memory cannot be filled"):
        BootedGuest(find_image("x86_64"), files, memory_mib=256, fill_mib=200, fill_disk=root)


@pytest.mark.qemu
def test_a_wrong_argument_ends_the_wait_at_once():
    with (
        pytest.raises(SourceError, match=r"QEMU ended: .*nonsense"),
        QemuMachine(["qemu-system-x86_64"], ["-device", "nonsense"]),
    ):
        pass


@pytest.mark.qemu
def test_leaving_kills_qemu_and_removes_its_folder():
    with QemuMachine(["qemu-system-x86_64"], ["-S", "-m", "64"]) as machine:
        assert machine.folder.stat().st_mode & 0o777 == 0o700
        assert subprocess.run(["kill", "-0", str(machine.pid)], check=False).returncode == 0
    assert not machine.is_running()
    assert not machine.folder.exists()
