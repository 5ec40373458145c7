"""The readers open what we write by default of a Linux guest with KASLR, and answer right."""

from __future__ import annotations

import filecmp
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import drgn
import pytest
from drgn.helpers.linux.cpumask import for_each_online_cpu
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.printk import get_dmesg
from drgn.helpers.linux.sched import cpu_curr

from qemu_dump_ext.guest_images.machine import BootedGuest
from tests.support.crash_reader import ask_crash
from tests.support.doors import run_cli, run_gdb
from tests.support.folders import folder_for

pytestmark = pytest.mark.guest

DUMPS = {
    "elf": (),
    "kdump-zlib": ("-z", "zlib"),
    "kdump-lzo": ("-l",),
    "kdump-raw-zlib": ("-z", "zlib", "-R"),
    "kdump-raw-lzo": ("-l", "-R"),
    "kdump-raw-snappy": ("-s", "-R"),
    "kdump-raw-zstd": ("-z", "zstd", "-R"),
    "elf-level-31": ("--dump-level", "31!"),
    "kdump-raw-level-31": ("-z", "zlib", "-R", "--dump-level", "31!"),
    "kdump-raw-omit-zero": ("-z", "zlib", "-R", "--dump-level", "31!", "--omit-zero"),
}
# The ROM at the end of the first 4 GiB keeps makedumpfile from filtering a kdump of a PC.
WITHOUT_ROM = "kdump-raw-zlib-without-rom"
# Debian's makedumpfile reads neither snappy nor zstd, and flattened files with -R only.
MAKEDUMPFILE_READS = ("elf", "kdump-raw-zlib", "kdump-raw-lzo")
# Where the stack of a vCPU begins that was stopped in the kernel.
STACK_ROOTS = {"start_secondary", "rest_init", "ret_from_fork", "entry_SYSCALL_64"}
DumpOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def dump_of(paused_linux: BootedGuest, request: pytest.FixtureRequest) -> DumpOf:
    """Takes each dump once."""
    directory = folder_for(request, "dumps")

    @cache
    def take(name: str) -> Path:
        path = directory / name
        ram = ("-z", "-R", "--range", "0", f"{paused_linux.image.memory_mib}*1048576")
        words = ram if name == WITHOUT_ROM else DUMPS[name]
        done = run_cli("--qmp", paused_linux.qmp_sockets[0], *words, path)
        assert done.returncode == 0, done.stderr
        return path

    return take


@pytest.fixture(scope="module")
def program_counters(paused_linux: BootedGuest) -> dict[int, int]:
    """Where each vCPU stands, as gdb shows it at the stub."""
    done = run_gdb(paused_linux, ['thread apply all -ascending printf "pc %#lx\\n", $pc'])
    found = re.findall(r"CPU#(\d+) .*\n+pc (0x[0-9a-f]+)$", done.stdout, re.MULTILINE)
    return {int(index): int(counter, 16) for index, counter in found}


@pytest.mark.parametrize("name", DUMPS)
def test_drgn_knows_tasks_log_and_stacks(
    dump_of: DumpOf,
    vmlinux: Path,
    paused_linux: BootedGuest,
    program_counters: dict[int, int],
    name: str,
):
    program = drgn.Program()
    program.set_core_dump(dump_of(name))
    program.load_debug_info([vmlinux])
    release = program["init_uts_ns"].name.release.string_().decode()
    assert release == paused_linux.files.release
    assert b"KERNELOFFSET=0\n" not in program["VMCOREINFO"].string_()
    assert list(for_each_online_cpu(program)) == list(range(paused_linux.image.cpus))
    names = {task.comm.string_().decode() for task in for_each_task(program)}
    assert set(paused_linux.image.processes) <= names
    assert paused_linux.image.kernel_log in get_dmesg(program).decode()
    assert len(program_counters) == paused_linux.image.cpus
    for cpu, counter in program_counters.items():
        trace = program.stack_trace(cpu_curr(program, cpu))
        assert trace[0].pc == counter
        assert len(trace) > 3
        assert STACK_ROOTS & {frame.name for frame in trace}


@pytest.mark.parametrize(
    "name",
    ["elf", "kdump-zlib", "kdump-raw-lzo", "kdump-raw-zstd", "elf-level-31", "kdump-raw-level-31"],
)
def test_crash_knows_the_system_and_its_log(
    dump_of: DumpOf, vmlinux: Path, paused_linux: BootedGuest, name: str
):
    done = _crash(vmlinux, dump_of(name))
    assert_crash_answered(done, paused_linux)


def test_crash_opens_a_dump_without_zeros_when_told_so(
    dump_of: DumpOf, vmlinux: Path, paused_linux: BootedGuest
):
    path = dump_of("kdump-raw-omit-zero")
    assert _crash(vmlinux, path).returncode != 0
    assert_crash_answered(_crash("--zero_excluded", vmlinux, path), paused_linux)


def _crash(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return ask_crash("sys\nlog\nbt -a\n", *words)


def assert_crash_answered(
    done: subprocess.CompletedProcess[str], paused_linux: BootedGuest
) -> None:
    """The system, its log, and stacks of all vCPUs are in the answer."""
    assert re.search(rf"CPUS: {paused_linux.image.cpus}$", done.stdout, re.MULTILINE), done.stderr
    assert f"RELEASE: {paused_linux.files.release}\n" in done.stdout
    assert paused_linux.image.kernel_log in done.stdout
    for cpu in range(paused_linux.image.cpus):
        assert f'CPU: {cpu}    COMMAND: "' in done.stdout


@pytest.mark.parametrize("name", MAKEDUMPFILE_READS)
def test_makedumpfile_reads_the_log(
    dump_of: DumpOf, paused_linux: BootedGuest, tmp_path: Path, name: str
):
    log = tmp_path / "log"
    subprocess.run(
        ["makedumpfile", "--dump-dmesg", dump_of(name), log], check=True, capture_output=True
    )
    assert paused_linux.image.kernel_log in log.read_text()


def test_makedumpfile_rearranges_the_flattened_dump_into_the_raw_one(
    dump_of: DumpOf, tmp_path: Path
):
    raw = tmp_path / "raw"
    # Not zlib: ISA-L may pack a page in one of several ways.
    with dump_of("kdump-lzo").open("rb") as stream:
        subprocess.run(["makedumpfile", "-R", raw], stdin=stream, check=True, capture_output=True)
    assert filecmp.cmp(raw, dump_of("kdump-raw-lzo"), shallow=False)


@pytest.mark.parametrize("name", ["elf", WITHOUT_ROM])
def test_makedumpfile_filters(
    dump_of: DumpOf, vmlinux: Path, paused_linux: BootedGuest, tmp_path: Path, name: str
):
    filtered = tmp_path / "filtered"
    subprocess.run(
        ["makedumpfile", "-d", "31", "-c", dump_of(name), filtered],
        check=True,
        capture_output=True,
    )
    program = drgn.Program()
    program.set_core_dump(filtered)
    program.load_debug_info([vmlinux])
    assert paused_linux.image.kernel_log in get_dmesg(program).decode()


def test_gdb_shows_every_vcpu_as_a_thread(dump_of: DumpOf, program_counters: dict[int, int]):
    argv = ["gdb", "--nx", "--batch", "-ex", 'thread apply all printf "pc %#lx\\n", $pc']
    done = subprocess.run([*argv, "-c", dump_of("elf")], capture_output=True, text=True, check=True)
    found = re.findall(r"^Thread \d+ \(LWP (\d+)\):\npc (0x[0-9a-f]+)$", done.stdout, re.MULTILINE)
    assert {int(lwp) - 1: int(counter, 16) for lwp, counter in found} == program_counters


def test_readelf_has_nothing_to_say(dump_of: DumpOf):
    done = subprocess.run(
        ["readelf", "-hlnW", dump_of("elf")], capture_output=True, text=True, check=True
    )
    assert "warning" not in done.stderr.lower()
    assert done.stdout.count("NT_PRSTATUS") == 2
    assert "VMCOREINFO" in done.stdout
