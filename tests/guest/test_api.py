"""The examples of docs/api.md that want a Linux guest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qemu_dump_ext as qd
from qemu_dump_ext.guest_images.machine import BootedGuest
from qemu_dump_ext.guest_images.manifest import default_cache
from qemu_dump_ext.guest_images.store import ImageStore
from tests.support.api_page import run_examples
from tests.support.doors import guest_status

pytestmark = pytest.mark.guest


@pytest.fixture
def directory(linux_guest: BootedGuest, tmp_path: Path, monkeypatch) -> Path:
    fetched = ImageStore(default_cache()).fetch(linux_guest.image, debug_symbols=True)
    assert fetched.vmlinux is not None
    (tmp_path / "vmlinux").symlink_to(fetched.vmlinux)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_examples_of_the_page(linux_guest, directory, capsys):
    qmp = str(linux_guest.qmp_sockets[0])
    with qd.connect(qmp) as guest, guest.stopped() as still:
        release = re.search(rb"^OSRELEASE=(.*)$", still.vmcoreinfo, re.MULTILINE)
        address = re.search(rb"^SYMBOL\(init_uts_ns\)=(\w+)$", still.vmcoreinfo, re.MULTILINE)
        assert release
        assert address
        log = still.log()
    run_examples(linux_guest.qmp_sockets[0], of_linux=True, address=address[1].decode())
    shown = capsys.readouterr().out
    assert linux_guest.image.kernel_log in log
    assert release[1].decode() == linux_guest.files.release
    assert shown.count(linux_guest.image.kernel_log) == 2
    assert f"{release[1]!r}" in shown
    for name in linux_guest.image.processes:
        assert f"{name.encode()!r}" in shown
    assert "volatile unsigned long)" in shown
    assert guest_status(linux_guest) == "running"
    with qd.open_dump(directory / "linux.kdump") as dump:
        assert dump.vmcoreinfo.startswith(b"OSRELEASE=" + release[1])
        assert linux_guest.image.kernel_log in dump.log()
