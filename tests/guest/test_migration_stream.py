"""The stream of a running Linux guest is read as a dump of it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_dump_ext.cli import main
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.dump_readers.migration import MigrationFile
from qemu_dump_ext.guest_images.machine import BootedGuest
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def stream(linux_guest: BootedGuest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What QEMU wrote while the guest ran."""
    path = tmp_path_factory.mktemp("stream") / "stream"
    capability = {"capability": "background-snapshot", "state": True}
    with RawQmp(linux_guest.qmp_sockets[1]) as qmp:
        qmp.execute("migrate-set-capabilities", capabilities=[capability])
        qmp.execute("migrate", uri=f"exec:cat >{path}")
        wait_until(lambda: qmp.execute("query-migrate").get("status") in {"completed", "failed"})
        assert qmp.execute("query-migrate")["status"] == "completed"
        capability["state"] = False
        qmp.execute("migrate-set-capabilities", capabilities=[capability])
    return path


def test_page_tables_prove_where_its_memory_lies(stream: Path):
    with open_dump(stream) as dump:
        assert isinstance(dump, MigrationFile)
        assert dump.layout_proof in {
            "the page tables of a vCPU lead to its program counter",
            "the kernel's VMCOREINFO is where the kernel has said",
        }


def test_the_kernels_log_is_in_it(
    stream: Path, linux_guest: BootedGuest, capsys: pytest.CaptureFixture[str]
):
    assert main(["dmesg", str(stream)]) == 0
    log = capsys.readouterr().out
    assert "Linux version" in log
    assert linux_guest.image.kernel_log in log
    assert main(["verify", str(stream)]) == 0
