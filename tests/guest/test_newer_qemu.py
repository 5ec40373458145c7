from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import BootedGuest, stopped_machine
from qemu_dump_ext.guest_images.manifest import default_cache, find_image
from qemu_dump_ext.guest_images.store import ImageStore
from tests.support.newer_qemu import newer_qemu_command
from tests.support.raw_qmp import RawQmp

pytestmark = pytest.mark.guest


def _ask(option: str, *values: str) -> str:
    command = [*newer_qemu_command(), option, *values]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_it_is_newer_and_has_its_machines():
    version = int(_ask("--version").split("version ")[1].split(".")[0])
    assert version > 7
    assert "q35" in _ask("-machine", "help")


def test_it_dumps(tmp_path: Path):
    with (
        stopped_machine(newer_qemu_command(), ["-M", "q35"]) as machine,
        RawQmp(machine.qmp_sockets[0]) as qmp,
    ):
        assert qmp.greeting["version"]["qemu"]["major"] > 7
        assert "kdump-raw-zlib" in qmp.execute("query-dump-guest-memory-capability")["formats"]
        dump = tmp_path / "dump"
        qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{dump}")
        assert dump.read_bytes()[:4] == b"\x7fELF"


def test_it_boots_the_guest():
    image = find_image("x86_64")
    files = ImageStore(default_cache()).fetch(image)
    with BootedGuest(image, files, command=newer_qemu_command()) as guest:
        assert image.marker in guest.console_text()
