"""Paged ELF of hand-made page tables and of Linux: with --exact, QEMU's own file."""

from __future__ import annotations

import filecmp
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from qemu_dump_ext.cli.dump_command import main
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.dump_readers.elf import ElfCoreFile, Segment
from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from tests.oracle.test_doors import DOORS
from tests.support.newer_qemu import newer_qemu_command
from tests.support.page_tables import (
    LA57,
    LONG,
    NO_EXECUTE,
    PAE,
    PSE,
    TABLES_AT,
    Mode,
    TableImage,
    large,
    page,
    random_tables,
    run_of_pages,
    set_modes,
)
from tests.support.raw_qmp import RawQmp

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

FLASH = 0xFFF00000
"""1 MiB, to 4 GiB."""
SEEDS = range(8)


def make_cases(image: TableImage) -> dict[str, list[Mode | None]]:
    """Every mode, each with what may go wrong in it."""
    cases: dict[str, list[Mode | None]] = {"no-paging": [None, None]}

    table = image.table(run_of_pages(0, 0x200000, 8) | {100: page(0xB8000), 200: page(0x9F000)}, 4)
    top = image.table({0x3FF: page(0x300000)}, 4)
    directory = image.table(
        {0: page(table), 768: page(table, 0x80), 769: page(0x3FFF000), 1023: page(top)}, 4
    )
    cases["32-bit"] = [Mode(directory), None]
    directory = image.table(
        {
            0: large(0),
            1: large(0x400000),
            5: large(0xFE000000),
            6: large(0x800000, 1 << 13),  # PA bit 32: no memory there
            768: page(table),
            1023: large(0x3C00000),
        },
        4,
    )
    cases["pse"] = [Mode(directory, PSE), Mode(directory, PSE)]
    cases["pse-bit-without-pse"] = [None, Mode(directory)]

    table = image.table(
        run_of_pages(5, 0x210000, 16)
        | run_of_pages(40, 0x210000, 4)
        | {60: page(FLASH), 61: page(FLASH + 0x1000), 70: page(0x1000000, 1 << 59)}
        | {80: page(0x1234000, NO_EXECUTE), 81: page(0x1235000, NO_EXECUTE | 0xE7E & ~0x80)}
        | {90: page(0xA0000), 91: page(0x9F000), 92: page(0xFEB00000)}
    )
    large_table = image.table(
        {0: large(0), 1: large(0x200000), 3: large(0x1800000, NO_EXECUTE), 4: large(0xE0000000)}
        | {5: page(table), 6: large(0x400000, 1 << 12), 511: page(table), 7: large(0x400000)}
    )
    # An entry for PDPT that does not begin at a page.
    offset = image.table({4: page(large_table), 5: page(large_table), 7: page(large_table)})
    cases["pae"] = [Mode(offset + 32, PAE), None]

    pointers = image.table(
        {0: page(large_table), 1: large(0), 2: large(0x40000000), 510: page(large_table)}
    )
    root = image.table({0: page(pointers), 255: page(pointers), 256: page(pointers)})
    cases["4-levels"] = [Mode(root, PAE, LONG), None]
    other = image.table({511: page(pointers), 3: page(0x8000000)})
    cases["4-levels-different"] = [Mode(root, PAE, LONG), Mode(other | 0x18, PAE, LONG)]
    cases["4-levels-same"] = [Mode(root, PAE, LONG)] * 2
    cases["second-vcpu-only"] = [None, Mode(root, PAE, LONG)]
    fifth = image.table({0: page(root), 255: page(other), 256: page(root), 511: page(other)})
    cases["5-levels"] = [Mode(fifth, PAE | LA57, LONG), None]
    cases["mixed-modes"] = [Mode(directory, PSE), Mode(root, PAE, LONG)]

    first = image.chain(run_of_pages(10, 0x20A000, 10), 1, 1, 272)
    below = image.chain(run_of_pages(9, 0x209000, 1), 1, 1, 272)
    cases["merged-in-front"] = [Mode(first, PAE, LONG), Mode(below, PAE, LONG)]
    last_page = image.chain(run_of_pages(500, 0x200000, 12), 511, 511, 511)
    overlap = image.chain({511: large(0x200000 - 500 * 0x1000 & ~0x1FFFFF)}, 511, 511)
    cases["top-of-the-address-space"] = [Mode(last_page, PAE, LONG), Mode(overlap, PAE, LONG)]
    aliased = image.chain({511: large(0x200000)}, 511, 511)
    shifted = image.chain(run_of_pages(500, 0x200000 + 500 * 0x1000, 12), 511, 511, 511)
    cases["top-merged"] = [Mode(aliased, PAE, LONG), Mode(shifted, PAE, LONG)]
    cases["top-merged-the-other-way"] = [Mode(shifted, PAE, LONG), Mode(aliased, PAE, LONG)]
    far = image.table({0: page(0x8000000), 1: page(0xFEB00000), 2: page(0xFFFFFFFFF000)})
    cases["tables-outside-memory"] = [Mode(image.table({0: page(far), 1: page(0)}), PAE, LONG)] * 2
    # The same table seen through A20 masked is the one 1 MiB below.
    low = image.table(run_of_pages(7, 0x200000, 3))
    image.data += bytes(low + (1 << 20) - TABLES_AT - len(image.data))
    high = image.chain(run_of_pages(70, 0x300000, 3), 1, 1, 300)
    cases["a20"] = [Mode(high, PAE, LONG), None]
    for seed in SEEDS:
        roots = [random_tables(image, 2 * seed), random_tables(image, 2 * seed + 1)]
        cases[f"random-{seed}"] = [Mode(root, PAE, LONG) for root in roots]
    return cases


IMAGE = TableImage()
CASES = make_cases(IMAGE)


@pytest.fixture(scope="module", params=["installed", "newer"])
def tables_machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[QemuMachine]:
    """A machine with all tables in memory, and flash instead of a BIOS."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "tables").write_bytes(IMAGE.data)
    (folder / "flash").write_bytes(bytes(range(256)) * 4096)
    arguments = ["-M", "q35", "-cpu", "max", "-m", "64", "-smp", "2"]
    arguments += ["-device", f"loader,file={folder / 'tables'},addr=0x400000,force-raw=on"]
    arguments += ["-drive", f"if=pflash,format=raw,readonly=on,file={folder / 'flash'}"]
    command = ["qemu-system-x86_64"] if request.param == "installed" else newer_qemu_command()
    with stopped_machine(command, arguments) as machine:
        yield machine


def ours(machine: QemuMachine, path: Path, *words: str, bounds: Sequence[str] = ()) -> Path:
    socket = str(machine.qmp_sockets[0])
    assert main(["--qmp", socket, "-p", *words, str(path), *bounds]) == 0
    return path


def native(machine: QemuMachine, path: Path, **arguments: int) -> Path:
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute("dump-guest-memory", paging=True, protocol=f"file:{path}", **arguments)
    return path


def segments(path: Path) -> list[Segment]:
    with open_dump(path) as dump:
        assert isinstance(dump, ElfCoreFile)
        return dump.segments


def assert_exact(machine: QemuMachine, folder: Path, **arguments: int) -> list[Segment]:
    theirs = native(machine, folder / "native", **arguments)
    bounds = [hex(value) for value in arguments.values()]
    exact = ours(machine, folder / "ours", "--exact", bounds=bounds)
    loads = segments(theirs)
    assert segments(exact) == loads
    assert filecmp.cmp(exact, theirs, shallow=False)
    for path in (theirs, exact):
        path.unlink()
    return loads


@pytest.mark.parametrize("name", CASES)
def test_exact_paged_elf_is_qemus(tables_machine, tmp_path, name):
    set_modes(tables_machine, CASES[name])
    loads = assert_exact(tables_machine, tmp_path)
    assert bool(loads) == (name != "tables-outside-memory")


@pytest.mark.parametrize("name", ["no-paging", "4-levels-different", "random-1"])
@pytest.mark.parametrize(
    ("begin", "length"), [(0x201800, 0x10000), (0x9F800, 0x2000000), (0, 1 << 33)]
)
def test_exact_paged_elf_of_a_range_is_qemus(tables_machine, tmp_path, name, begin, length):
    set_modes(tables_machine, CASES[name])
    assert_exact(tables_machine, tmp_path, begin=begin, length=length)


@contextmanager
def a20_masked(machine: QemuMachine) -> Iterator[None]:
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        for value in (2, 0):
            qmp.execute("human-monitor-command", **{"command-line": f"o /b 0x92 {value}"})
        assert "A20=0" in qmp.execute("human-monitor-command", **{"command-line": "info registers"})
    yield
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute("human-monitor-command", **{"command-line": "o /b 0x92 2"})


@pytest.mark.parametrize("name", ["4-levels", "32-bit", "a20"])
def test_exact_paged_elf_with_a20_masked_is_qemus(tables_machine, tmp_path, name):
    set_modes(tables_machine, CASES[name])
    open_gate = assert_exact(tables_machine, tmp_path)
    with a20_masked(tables_machine):
        masked = assert_exact(tables_machine, tmp_path)
    if name == "a20":
        assert masked != open_gate


@pytest.mark.parametrize("name", CASES)
def test_default_paged_elf_is_what_the_emulator_translates(tables_machine, tmp_path, name):
    """Every page of every segment, first and last byte, asked of QEMU's own MMU."""
    set_modes(tables_machine, CASES[name])
    loads = segments(ours(tables_machine, tmp_path / "ours"))
    assert [load.p_vaddr for load in loads] == sorted(load.p_vaddr for load in loads)
    assert all(load.p_filesz == load.p_memsz for load in loads)
    places = {
        (load.p_vaddr + offset, load.p_paddr + offset)
        for load in loads
        for offset in (0, load.p_memsz // 2 & ~0xFFF, load.p_memsz - 1)
    }
    sample = sorted(places)[:: max(1, len(places) // 100)]
    seen = set()
    with RawQmp(tables_machine.qmp_sockets[1]) as qmp:
        for vcpu in (0, 1):
            for gva, gpa in sample:
                command = {"command-line": f"gva2gpa {gva:#x}", "cpu-index": vcpu}
                answer = qmp.execute("human-monitor-command", **command)
                if answer.startswith("gpa: ") and int(answer[5:], 16) == gpa:
                    seen.add((gva, gpa))
    assert seen == set(sample)


def many_mappings(image: TableImage, count: int) -> Mode:
    """One page of memory at `count` virtual addresses."""
    full = page(image.table(dict.fromkeys(range(512), page(0x200000))))
    rest = image.table(dict.fromkeys(range(count % 512), page(0x200000)))
    directory = image.table(dict.fromkeys(range(count // 512), full) | {511: page(rest)})
    return Mode(image.chain({0: page(directory)}, 300), PAE, LONG)


MANY = {count: many_mappings(IMAGE, count) for count in (65533, 65534, 70000)}


# QEMU takes longer than we do; what changed in a newer one would be the limit.
@pytest.mark.parametrize(
    ("tables_machine", "count"),
    [*(("installed", count) for count in MANY), ("newer", 65534)],
    indirect=["tables_machine"],
    scope="module",
)
def test_more_segments_than_e_phnum_holds(tables_machine, tmp_path, count):
    set_modes(tables_machine, [MANY[count], None])
    # A short range, but QEMU looks for every mapping in it.
    bounds = {"begin": 0x200000, "length": 0x1000}
    assert len(assert_exact(tables_machine, tmp_path, **bounds)) == count
    mended = ours(tables_machine, tmp_path / "mended", bounds=["0x200000", "0x1000"])
    assert len(segments(mended)) == count
    readelf = subprocess.run(
        ["readelf", "-hW", mended], check=True, capture_output=True, text=True
    ).stdout
    assert f"Number of program headers:         {1 + count if count < 65534 else 65535}" in readelf
    assert (f"65535 ({1 + count})" in readelf) == (count > 65533)
    opened = subprocess.run(
        ["gdb", "--nx", "--batch", "-ex", f"core-file {mended}", "-ex", "info files"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert len(re.findall(r" is load\d+", opened.stdout)) == count, opened.stderr


@pytest.mark.guest
def test_exact_paged_elf_of_linux_is_qemus(paused_linux, tmp_path):
    assert len(assert_exact(paused_linux, tmp_path)) > 100


@pytest.mark.guest
def test_paged_elf_of_linux_opens_in_drgn(paused_linux, tmp_path):
    import drgn  # noqa: PLC0415

    path = ours(paused_linux, tmp_path / "ours")
    program = drgn.Program()
    program.set_core_dump(path)
    text = program["VMCOREINFO"].string_() if "VMCOREINFO" in program else None
    facts = dict(
        line.split(b"=", 1) for line in (text or vmcoreinfo_of(path)).splitlines() if b"=" in line
    )
    banner = program.read(int(facts[b"SYMBOL(init_uts_ns)"], 16), 400)
    assert facts[b"OSRELEASE"] in banner


def vmcoreinfo_of(path: Path) -> bytes:
    with open_dump(path) as dump:
        assert dump.vmcoreinfo is not None
        return dump.vmcoreinfo


@pytest.mark.parametrize("door", ["gdb-stub-only", "cli-by-gdb"])
def test_other_doors_pass_everything_on(tables_machine, tmp_path, door):
    set_modes(tables_machine, CASES["4-levels-different"])
    theirs = native(tables_machine, tmp_path / "native", begin=0x201800, length=0x10000)
    words = ["--exact", "-p", tmp_path / "ours", "0x200000+0x1800", "65536"]
    DOORS[door](tables_machine, *words)
    assert filecmp.cmp(tmp_path / "ours", theirs, shallow=False)
    DOORS[door](tables_machine, "-p", "--range", "0x201800", "0x10000", tmp_path / "mended")
    assert {load.p_paddr >> 16 for load in segments(tmp_path / "mended")} == {0x20, 0x21}
