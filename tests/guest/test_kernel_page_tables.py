"""Linux on targets whose page tables QEMU's dump-guest-memory does not follow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qemu_dump_ext.cli import main as qemu_dump
from qemu_dump_ext.cli.dump_command import main as dump_guest_memory
from qemu_dump_ext.dump_reader import open_dump
from qemu_dump_ext.elf_core_reader import ElfCoreFile
from qemu_dump_ext.guest_images.machine import BootedGuest
from qemu_dump_ext.guest_images.manifest import default_cache, find_image
from qemu_dump_ext.guest_images.store import ImageStore
from tests.support.raw_qmp import RawQmp

pytestmark = [pytest.mark.qemu, pytest.mark.guest]


@pytest.fixture(scope="module", params=["aarch64", "riscv64", "i386"])
def other_guest(request: pytest.FixtureRequest) -> Iterator[BootedGuest]:
    """Stopped once it has booted, with its log on its console."""
    image = find_image(request.param)
    with BootedGuest(image, ImageStore(default_cache()).fetch(image)) as guest:
        with RawQmp(guest.qmp_sockets[1]) as qmp:
            qmp.execute("stop")
        yield guest


def test_log(other_guest, capsys):
    assert qemu_dump(["dmesg", "--qmp", str(other_guest.qmp_sockets[0])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert other_guest.files.release in "".join(lines[:3])
    assert other_guest.image.kernel_log in lines[-1]
    assert len(lines) > 150


def test_segments_are_what_the_emulator_translates(other_guest, tmp_path, capsys):
    """First and last byte of segments of every size, asked of QEMU's own MMU."""
    path = tmp_path / "paged"
    assert dump_guest_memory(["--qmp", str(other_guest.qmp_sockets[0]), "-p", str(path)]) == 0
    followed = "the kernel's own page tables" in capsys.readouterr().err
    assert followed == (other_guest.image.name != "i386")  # whose vCPUs' tables are known
    with open_dump(path) as dump:
        assert isinstance(dump, ElfCoreFile)
        loads = dump.segments
        facts = dump.vmcoreinfo_facts
    assert len(loads) > 50
    by_size = sorted(loads, key=lambda load: load.p_memsz)
    sample = by_size[-10:] + by_size[:: max(1, len(by_size) // 60)]
    with RawQmp(other_guest.qmp_sockets[1]) as qmp:
        for load in sample:
            for offset in (0, load.p_memsz - 1):
                line = {"command-line": f"gva2gpa {load.p_vaddr + offset:#x}"}
                answers = [
                    qmp.execute("human-monitor-command", **line, **{"cpu-index": vcpu})
                    for vcpu in range(other_guest.image.cpus)
                ]
                # QEMU tells the page; for some targets without the offset in it.
                pages = {int(one[5:], 16) >> 12 for one in answers if one.startswith("gpa: ")}
                assert (load.p_paddr + offset) >> 12 in pages, (load, answers)
    name = int(facts["SYMBOL(init_uts_ns)"], 16)
    assert any(load.p_vaddr <= name < load.p_vaddr + load.p_memsz for load in loads)


def test_exact_is_qemus(other_guest, tmp_path):
    """For all but x86 QEMU takes virtual addresses for physical ones."""
    with RawQmp(other_guest.qmp_sockets[1]) as qmp:
        native = f"file:{tmp_path / 'native'}"
        qmp.execute("dump-guest-memory", paging=True, protocol=native)
    words = ["--qmp", str(other_guest.qmp_sockets[0]), "--exact", "-p", str(tmp_path / "ours")]
    assert dump_guest_memory(words) == 0
    with open_dump(tmp_path / "native") as theirs, open_dump(tmp_path / "ours") as ours:
        assert isinstance(theirs, ElfCoreFile)
        assert isinstance(ours, ElfCoreFile)
        assert ours.segments == theirs.segments
