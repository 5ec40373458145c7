"""One stopped guest, through every door and memory source: the files are QEMU's own."""

from __future__ import annotations

import filecmp
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.oracle import known_differences
from tests.support.doors import guest_status, run_cli, run_gdb
from tests.support.newer_qemu import own_qemu_version
from tests.support.oracle import (
    OracleDumps,
    differing_fields,
    elf_facts,
    kdump_facts,
    kdump_pages,
    rearrange,
)

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]
MIB = 1 << 20

Door = Callable[..., None]


def _gdb_stub_only(machine: QemuMachine, *words: object) -> None:
    _in_gdb(machine, *words)


def _gdb_with_qmp(machine: QemuMachine, *words: object) -> None:
    _in_gdb(machine, "--qmp", machine.qmp_sockets[0], *words)


def _in_gdb(machine: QemuMachine, *words: object) -> None:
    command = " ".join(["qemu-dump-guest-memory", *map(str, words)])
    done = run_gdb(machine, [command, "print $_qemu_dump_status"])
    assert "$1 = 0\n" in done.stdout, done.stdout + done.stderr


def _cli_by_qmp(machine: QemuMachine, *words: object) -> None:
    done = run_cli("--qmp", machine.qmp_sockets[0], *words)
    assert done.returncode == 0, done.stderr


def _cli_by_gdb(machine: QemuMachine, *words: object) -> None:
    # With QMP it is known that the guest was stopped before gdb came, and has to stay so.
    done = run_cli("--gdb", machine.gdb_socket, "--qmp", machine.qmp_sockets[0], *words)
    assert done.returncode == 0, done.stderr


DOORS: dict[str, Door] = {
    "gdb-stub-only": _gdb_stub_only,
    "gdb-with-qmp": _gdb_with_qmp,
    "cli-by-qmp": _cli_by_qmp,
    "cli-by-gdb": _cli_by_gdb,
}
SOURCES_OF_DOORS = [
    (door, source)
    for door in DOORS
    for source in ("process", "native_stream", "pmemsave", "gdbstub")
    # There is no stub behind a QMP socket, and no QMP behind a stub.
    if (door, source) not in {("cli-by-qmp", "gdbstub"), ("gdb-stub-only", "native_stream")}
]
FORMATS = {
    "elf": (),
    "kdump_zlib": ("-z",),
    "kdump_raw_zlib": ("-z", "-R"),
}


@pytest.mark.parametrize(("door", "source"), SOURCES_OF_DOORS)
@pytest.mark.parametrize("dump_format", FORMATS)
def test_exact_dump_of_a_machine_that_never_ran_is_qemus(
    bare_machine: QemuMachine,
    bare_native: OracleDumps,
    tmp_path: Path,
    door: str,
    source: str,
    dump_format: str,
):
    ours = tmp_path / "ours"
    DOORS[door](bare_machine, "--exact", "--memory", source, *FORMATS[dump_format], ours)
    assert filecmp.cmp(ours, getattr(bare_native, dump_format), shallow=False)
    assert guest_status(bare_machine) == "prelaunch"


@pytest.mark.guest
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("dump_format", FORMATS)
def test_exact_dump_of_linux_is_qemus(
    paused_linux: QemuMachine,
    paused_linux_native: OracleDumps,
    tmp_path: Path,
    door: str,
    dump_format: str,
):
    ours = tmp_path / "ours"
    DOORS[door](paused_linux, "--exact", *FORMATS[dump_format], ours)
    assert filecmp.cmp(ours, getattr(paused_linux_native, dump_format), shallow=False)
    assert guest_status(paused_linux) == "paused"


@pytest.mark.guest
def test_exact_dump_of_linux_by_the_stub_alone_is_qemus(
    paused_linux: QemuMachine, paused_linux_native: OracleDumps, tmp_path: Path
):
    ours = tmp_path / "ours"
    _gdb_stub_only(paused_linux, "--exact", "--memory", "gdbstub", "-z", ours)
    assert filecmp.cmp(ours, paused_linux_native.kdump_zlib, shallow=False)


@pytest.mark.guest
@pytest.mark.parametrize("door", DOORS)
def test_default_elf_differs_by_what_is_named(
    paused_linux: QemuMachine, paused_linux_native: OracleDumps, tmp_path: Path, door: str
):
    ours = tmp_path / "ours"
    DOORS[door](paused_linux, ours)
    differences = differing_fields(elf_facts(ours), elf_facts(paused_linux_native.elf))
    assert differences == set(known_differences.ELF)
    assert elf_facts(ours)["e_phoff"] == elf_facts(ours)["e_ehsize"] == 64


def test_default_kdump_of_a_bare_machine_differs_by_what_is_named(
    bare_machine: QemuMachine, bare_native: OracleDumps, tmp_path: Path
):
    ours = tmp_path / "ours"
    _gdb_stub_only(bare_machine, "-z", "-R", ours)
    facts = kdump_facts(ours)
    assert differing_fields(facts, kdump_facts(bare_native.kdump_raw_zlib)) == {
        *known_differences.KDUMP,
        *known_differences.KDUMP_ZLIB,
        "machine",
    }
    # Real mode: QEMU's name is that of its binary.
    assert (facts["sysname"], facts["machine"]) == ("Linux", "i686")


@pytest.mark.guest
@pytest.mark.parametrize("door", DOORS)
def test_default_kdump_of_linux_differs_by_what_is_named(
    paused_linux: QemuMachine, paused_linux_native: OracleDumps, tmp_path: Path, door: str
):
    ours = rearrange_if_needed(paused_linux, tmp_path, door)
    facts = kdump_facts(ours)
    differences = differing_fields(facts, kdump_facts(paused_linux_native.kdump_raw_zlib))
    says_no_machine = own_qemu_version() >= (9, 2, 0)
    assert differences == {
        *known_differences.KDUMP,
        *known_differences.KDUMP_ZLIB,
        *known_differences.KDUMP_LINUX,
        *(known_differences.KDUMP_LINUX_NEWER if says_no_machine else ()),
    }
    text = facts["vmcoreinfo"].decode()
    phys_base = int(text.partition("NUMBER(phys_base)=")[2].partition("\n")[0])
    assert facts["phys_base"] == phys_base % 2**64
    assert f"OSRELEASE={facts['release']}\n" in text
    assert facts["version"].startswith("#1 SMP")


def rearrange_if_needed(machine: QemuMachine, tmp_path: Path, door: str) -> Path:
    flattened = tmp_path / "flattened"
    DOORS[door](machine, "-z", flattened)
    return rearrange(flattened, tmp_path / "raw")


@pytest.mark.guest
@pytest.mark.parametrize("codec", ["zlib", "lzo", "snappy", "zstd", "none"])
def test_pages_of_every_codec_are_those_of_qemus_elf(
    paused_linux: QemuMachine, paused_linux_native: OracleDumps, tmp_path: Path, codec: str
):
    ours = tmp_path / "ours"
    _gdb_stub_only(paused_linux, "-z", codec, "-R", ours)
    native = elf_facts(paused_linux_native.elf)
    pages = 0
    blocks = [
        (paddr, content)
        for (_, paddr, _, _), content in zip(native["loads"], native["memory"], strict=True)
    ]
    for gpa, page in kdump_pages(ours):
        start, content = next(b for b in blocks if b[0] <= gpa < b[0] + len(b[1]))
        assert page == content[gpa - start : gpa - start + len(page)], hex(gpa)
        pages += 1
    assert pages * 4096 == sum(len(content) for _, content in blocks)


def test_the_short_options_mean_what_they_mean_in_hmp(bare_machine: QemuMachine, tmp_path: Path):
    for option, flag in (("-l", 2), ("-s", 4)):
        ours = tmp_path / f"ours{option}"
        _cli_by_qmp(bare_machine, option, "-R", ours)
        assert kdump_facts(ours)["status"] == flag
    ours = tmp_path / "ours-R"
    _cli_by_qmp(bare_machine, "-R", ours)  # without a codec, -R has no meaning: ELF
    assert ours.read_bytes()[:4] == b"\x7fELF"
