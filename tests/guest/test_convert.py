"""What others wrote of a Linux guest, converted: the pages of QEMU's own dump, and readers open it.

All is of the same guest, which stands still.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import drgn
import pytest
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.printk import get_dmesg
from drgn.helpers.linux.sched import cpu_curr
from volatility3.framework.layers import elf
from volatility3.plugins import banners

from qemu_dump_ext.cli import main
from qemu_dump_ext.guest_images.machine import BootedGuest
from tests.support.convert_sources import ConvertSources
from tests.support.crash_reader import ask_crash
from tests.support.folders import folder_for
from tests.support.oracle import OracleDumps, elf_facts
from tests.support.volatility import volatility_layer

pytestmark = pytest.mark.guest

SOURCES = ("native-elf", "native-flattened", "savevm", "virtualbox", "lime", "gcore")
WITH_REGISTERS = SOURCES[:4]
WITH_FLOATING_POINT = ("virtualbox",)
WITHOUT_ROM = ("gcore",)


@pytest.fixture(scope="module")
def sources(
    paused_linux: BootedGuest, paused_linux_native: OracleDumps, request: pytest.FixtureRequest
) -> ConvertSources:
    """Makes each source once."""
    return ConvertSources(paused_linux, paused_linux_native, folder_for(request, "sources"))


@pytest.fixture(scope="module")
def memory(sources: ConvertSources) -> Mapping[int, bytes]:
    """Content by gpa, as QEMU dumps it."""
    return sources.memory


@pytest.fixture(scope="module", params=SOURCES)
def converted(
    request: pytest.FixtureRequest,
    sources: ConvertSources,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """Name of the source, and the ELF core that is made of it."""
    source = sources.make(request.param)
    target = tmp_path_factory.mktemp("converted") / "elf"
    status = main(["convert", str(source), str(target)])
    assert status == (0 if request.param in WITH_REGISTERS else 6)
    if request.param == "gcore":
        source.unlink()  # as large as all of QEMU
    return request.param, target


def test_every_page_is_that_of_qemus_own_dump(
    converted: tuple[str, Path], memory: Mapping[int, bytes], paused_linux: BootedGuest
):
    name, path = converted
    facts = elf_facts(path)
    found = {load[1]: data for load, data in zip(facts["loads"], facts["memory"], strict=True)}
    expected = {
        gpa: content
        for gpa, content in memory.items()
        if name not in WITHOUT_ROM or gpa < paused_linux.image.memory_mib << 20
    }
    assert found == expected


def test_registers_are_those_of_qemus_own_dump(
    converted: tuple[str, Path], paused_linux_native: OracleDumps
):
    name, path = converted
    notes, native = elf_facts(path)["notes"], elf_facts(paused_linux_native.elf)["notes"]
    if name in WITH_REGISTERS and name not in WITH_FLOATING_POINT:
        assert notes.startswith(native[: notes.index(b"VMCOREINFO") - 12])
    assert notes.count(b"VMCOREINFO") == 1
    assert b"\nPAGESIZE=4096\n" in notes


def test_drgn_opens_it(converted: tuple[str, Path], vmlinux: Path, paused_linux: BootedGuest):
    name, path = converted
    program = drgn.Program()
    program.set_core_dump(path)
    program.load_debug_info([vmlinux])
    names = {task.comm.string_().decode() for task in for_each_task(program)}
    assert set(paused_linux.image.processes) <= names
    assert paused_linux.image.kernel_log in get_dmesg(program).decode()
    if name in WITH_REGISTERS:
        assert len(program.stack_trace(cpu_curr(program, 0))) > 3


def test_volatility_finds_the_kernels_name(converted: tuple[str, Path], paused_linux: BootedGuest):
    with volatility_layer(converted[1], elf.Elf64Layer) as layer:
        _, banner = next(banners.Banners.locate_banners(layer.context, layer.name))
        assert layer.maximum_address >= (paused_linux.image.memory_mib << 20) - 1
    assert re.match(r"Linux version \d+\.\d+\.\d+", banner)


def test_makedumpfile_reads_and_filters_it(
    converted: tuple[str, Path], paused_linux: BootedGuest, tmp_path: Path
):
    _, path = converted
    _makedumpfile("--dump-dmesg", path, tmp_path / "log")
    assert paused_linux.image.kernel_log in (tmp_path / "log").read_text()
    _makedumpfile("-d", "31", "-c", path, tmp_path / "filtered")


def _makedumpfile(*words: str | Path) -> None:
    subprocess.run(["makedumpfile", *words], check=True, capture_output=True)


def test_crash_opens_a_kdump_without_registers(
    sources: ConvertSources, vmlinux: Path, paused_linux: BootedGuest, tmp_path: Path
):
    target = tmp_path / "kdump"
    assert main(["convert", str(sources.make("lime")), str(target), "-z", "-R"]) == 6
    done = ask_crash("sys\nlog\n", vmlinux, target)
    assert re.search(rf"CPUS: {paused_linux.image.cpus}$", done.stdout, re.MULTILINE), done.stderr
    assert f"RELEASE: {paused_linux.files.release}\n" in done.stdout


def test_parts_that_makedumpfile_splits_are_one_dump(sources: ConvertSources, tmp_path: Path):
    elf = tmp_path / "elf"
    assert main(["convert", str(sources.make("native-elf")), str(elf)]) == 0
    parts = [str(tmp_path / f"part{number}") for number in range(3)]
    _makedumpfile("-d", "31", "-c", "--split", elf, *parts)
    whole, joined, again = (str(tmp_path / name) for name in ("whole", "joined", "again"))
    _makedumpfile("--reassemble", *parts, whole)
    more = [word for part in parts[:2] for word in ("--part", part)]
    assert main(["verify", parts[2], *more]) == 0
    assert main(["convert", parts[2], joined, *more]) == 0
    assert main(["convert", whole, again]) == 0
    assert Path(joined).read_bytes() == Path(again).read_bytes()
