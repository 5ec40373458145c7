"""Linux of every target in the manifest: QEMU's own dump and the readers decide.

x86_64 has test_doors.py and test_readers.py.
"""

from __future__ import annotations

import filecmp
import re
import subprocess
import sys
from mmap import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from qemu_dump_ext.guest_images.machine import BootedGuest
from tests.support.doors import child_environment, run_cli, run_gdb
from tests.support.folders import folder_for
from tests.support.foreign_makedumpfile import makedumpfile_for
from tests.support.levels_of_dumps import left_out_of
from tests.support.linux_guests import (
    BEFORE_CONNECTING,
    IMAGES,
    KERNEL_ADDRESSES,
    NOT_BY_GDB,
    of_guests,
    stop_in_kernel,
)
from tests.support.newer_qemu import refusal_of_own_qemu
from tests.support.note_search import search_for_note
from tests.support.oracle import OracleDumps
from tests.support.page_flags import PageFlags
from tests.support.pages_of_dumps import bitmaps_by_makedumpfile, pages_of_elf
from tests.support.raw_qmp import RawQmp

pytestmark = [pytest.mark.guest, pytest.mark.qemu, pytest.mark.gdb]

NOT_BY_QEMU = ("mips64el", "mipsel")
DUMPED_BY_QEMU = [name for name in IMAGES if name not in NOT_BY_QEMU]
# What a gdb without symbols has to be told of a target to show it; our commands need none of it.
GDB_SETTINGS = {"s390x": ["set endian big"]}
# Only the stub shows these: `qemu-dump-guest-memory --qmp` says that they are missing.
INCOMPLETE = re.compile(r"^incomplete: vCPU 0 has zero for (.*) in its note", re.MULTILINE)
ONLY_BY_STUB = {"mips64el": "badvaddr", "mipsel": "badvaddr"}

# Where memory begins; that of arm is where makedumpfile counts pages of a kdump from.
FIRST_PAGE = {"arm": 0x40000, "riscv64": 0x80000}

_LEVELS = (0, 2, 4, 8, 16, 31)
"""What other levels leave out is what these do, together."""

of_all = of_guests(*IMAGES)
of_those_dumped_by_qemu = of_guests(*DUMPED_BY_QEMU)
of_those_that_gdb_knows = of_guests(*(name for name in IMAGES if name not in NOT_BY_GDB))
of_those_that_qemu_and_gdb_know = of_guests(
    *(name for name in DUMPED_BY_QEMU if name not in NOT_BY_GDB)
)
of_the_others = of_guests(*NOT_BY_QEMU)


@pytest.fixture(scope="module")
def native(guest: BootedGuest, request: pytest.FixtureRequest) -> OracleDumps:
    return OracleDumps(guest, folder_for(request, "native"))


@pytest.fixture(scope="module")
def core(guest: BootedGuest, request: pytest.FixtureRequest) -> Path:
    """Our ELF core, by gdb and the stub alone."""
    path = folder_for(request, "ours") / "core"
    commands = [f"qemu-dump-guest-memory {path}", "print $_qemu_dump_status"]
    before = BEFORE_CONNECTING.get(guest.image.name, [])
    done = run_gdb(guest, commands, "gdb-multiarch", before=before)
    assert "$1 = 0\n" in done.stdout, done.stdout + done.stderr
    return path


@of_those_dumped_by_qemu
@pytest.mark.parametrize("dump_format", ["elf", "kdump-zlib"])
def test_exact_dump_by_qmp_is_qemus(
    guest: BootedGuest, native: OracleDumps, tmp_path: Path, dump_format: str
):
    ours = tmp_path / "ours"
    words = ("-z",) if dump_format == "kdump-zlib" else ()
    done = run_cli("--qmp", guest.qmp_sockets[0], "--exact", *words, ours)
    assert done.returncode == 0, done.stderr
    assert filecmp.cmp(ours, native.take(dump_format), shallow=False)


@of_those_dumped_by_qemu
def test_exact_dump_by_the_stub_is_qemus(guest: BootedGuest, native: OracleDumps, tmp_path: Path):
    ours = tmp_path / "ours"
    command = f"qemu-dump-guest-memory --exact -z {ours}"
    before = BEFORE_CONNECTING.get(guest.image.name, [])
    done = run_gdb(guest, [command], "gdb-multiarch", before=before)
    assert filecmp.cmp(ours, native.take("kdump-zlib"), shallow=False), done.stdout + done.stderr


@of_the_others
def test_qemu_itself_refuses_the_other_targets(guest: BootedGuest):
    refused = pytest.raises(RuntimeError, match=refusal_of_own_qemu())
    with RawQmp(guest.qmp_sockets[1]) as qmp, refused:
        qmp.execute("dump-guest-memory", paging=False, protocol="file:/dev/null")


@of_those_that_gdb_knows
def test_gdb_shows_every_vcpu_where_it_stands(guest: BootedGuest, core: Path):
    command = 'thread apply all -ascending printf "pc %#lx\\n", $pc'
    settings = GDB_SETTINGS.get(guest.image.name, [])
    before = BEFORE_CONNECTING.get(guest.image.name, [])
    live = run_gdb(guest, [*settings, command], "gdb-multiarch", before=before)
    expected = re.findall(r"^pc (0x[0-9a-f]+)$", live.stdout, re.MULTILINE)
    done = subprocess.run(
        ["gdb-multiarch", "--nx", "--batch", "-c", core, "-ex", command],
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.findall(r"^pc (0x[0-9a-f]+)$", done.stdout, re.MULTILINE) == expected
    assert len(expected) == guest.image.cpus


@of_all
def test_the_core_has_the_kernels_banner(guest: BootedGuest, core: Path):
    assert f"Linux version {guest.files.release} ".encode() in core.read_bytes()


@of_all
def test_readelf_has_nothing_to_say(core: Path):
    done = subprocess.run(["readelf", "-hlnW", core], capture_output=True, text=True, check=True)
    assert "warning" not in done.stderr.lower()


@of_all
def test_kdump_is_sound(guest: BootedGuest, tmp_path: Path):
    ours = tmp_path / "ours"
    done = run_cli("--qmp", guest.qmp_sockets[0], "-z", "-R", ours)
    missing = INCOMPLETE.findall(done.stderr)
    expected = [ONLY_BY_STUB[guest.image.name]] if guest.image.name in ONLY_BY_STUB else []
    assert (missing, done.returncode) == (expected, 6 if expected else 0), done.stderr
    verify = "import sys; from qemu_dump_ext.cli import main; sys.exit(main())"
    subprocess.run(
        [sys.executable, "-c", verify, "verify", ours],
        check=True,
        capture_output=True,
        env=child_environment(),
    )


@of_guests("aarch64", "i386", "riscv64", "s390x")
def test_the_kernel_points_to_its_note(guest: BootedGuest):
    """A few MiB of its image are looked at, and not all memory."""
    found, searched = search_for_note(guest)
    assert found is not None
    assert searched < 48 << 20
    assert guest.files.release == found.release


@of_guests("aarch64", "arm", "i386", "ppc64le", "s390x")
def test_a_dump_level_leaves_what_makedumpfile_leaves(guest: BootedGuest, tmp_path: Path):
    name = guest.image.name
    # That of i386 wants virtual addresses in an ELF core. Pages of a kdump by QEMU may be larger.
    whole = _dump(guest, tmp_path / "whole", *(("-p",) if name == "i386" else ()))
    filtered = _dump(guest, tmp_path / "filtered", "--exact", "--dump-level", "31!")
    page_size = 65536 if name == "ppc64le" else 4096
    everything = pages_of_elf(whole, page_size)
    ours = {level: everything - pages for level, pages in left_out_of(whole, _LEVELS).items()}
    assert pages_of_elf(filtered, page_size) & everything == ours[31]
    if name == "arm":
        _let_makedumpfile_find_the_linear_map(whole)
    first = FIRST_PAGE.get(name, 0)
    makedumpfile = makedumpfile_for(name, guest.files.release)
    if name == "aarch64" and not guest.files.release.startswith("6.1."):
        # Addresses of 52 bits with pages of 4 KiB, which the kernel has since, none (1.7.8) knows.
        with pytest.raises(AssertionError, match="VA Bits 52 not supported"):
            bitmaps_by_makedumpfile(makedumpfile, whole, 31)
        return
    for level in _LEVELS:
        bitmaps = bitmaps_by_makedumpfile(makedumpfile, whole, level)
        covered, kept = ({page + first for page in pages} for pages in bitmaps)
        assert ours[level] == kept | (everything - covered), level


def _let_makedumpfile_find_the_linear_map(dump: Path) -> None:
    """Change the one entry of VMCOREINFO by which makedumpfile guesses PAGE_OFFSET of arm.

    It takes the 4 MiB in which the kernel's code begins, which is 0xc0400000 since Linux 5.15.
    """
    with dump.open("r+b") as file, mmap(file.fileno(), 0) as content:
        entry = re.search(rb"SYMBOL\(_stext\)=(c04)", content)
        assert entry is not None
        content[entry.start(1) : entry.end(1)] = b"c00"


@of_guests("loongarch64", "mips64el", "mipsel", "riscv64")
def test_a_dump_level_leaves_out_what_the_kernel_says_of_its_pages(
    guest: BootedGuest, tmp_path: Path
):
    """Debian has no makedumpfile for them, or one that leaves out other pages (1.7.8, riscv64).

    Between what the kernel says and the dump, the guest runs on: now and then, so much changes that
    it is asked again.
    """
    found: list[str] = []
    for _ in range(3):
        if not (found := _disagreements(guest, tmp_path / "ours")):
            break
    assert not found


def _disagreements(guest: BootedGuest, path: Path) -> list[str]:
    with RawQmp(guest.qmp_sockets[1]) as qmp:
        qmp.execute("cont")
        flags = PageFlags(guest, FIRST_PAGE.get(guest.image.name, 0))
        stop_in_kernel(qmp, KERNEL_ADDRESSES.get(guest.image.name))
    page_size = 16384 if guest.image.name == "loongarch64" else 4096

    def pages_in(*words: str) -> npt.NDArray[np.bool_]:
        done = run_cli("--qmp", guest.qmp_sockets[0], *words, "--force", path)
        assert done.returncode in {0, 6}, done.stderr
        pages = np.zeros(flags.count, bool)
        pages[[page for page in pages_of_elf(path, page_size) if page < flags.count]] = True
        return pages

    there = pages_in() & flags.there()
    exact = [] if guest.image.name in NOT_BY_QEMU else ["--exact"]
    found = []
    for words, level in ((exact, 8), (exact, 31), ([], 31)):
        out = there & ~pages_in(*words, "--dump-level", f"{level}!")
        told = there & flags.left_out(level)
        gone, left = int((out & ~told).sum()), int((told & ~out).sum())
        # Some of them were of what printed the flags, and are free since.
        if gone >= (50 if level == 8 else 1500) or left >= 0.02 * told.sum() + 250:
            found.append(f"level {level}: {gone} are gone, {left} of {told.sum()} are left")
    return found


def _dump(guest: BootedGuest, path: Path, *words: str) -> Path:
    done = run_cli("--qmp", guest.qmp_sockets[0], *words, path)
    assert done.returncode == 0, done.stderr
    return path
