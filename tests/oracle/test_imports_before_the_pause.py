"""What is imported and started for a dump, and when: it takes longer than to read a small guest."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_dump_ext.engine.dump import dump
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from qemu_dump_ext.plan.request import DumpRequest, Live
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.qemu.qmp import connect_qmp
from qemu_dump_ext.sinks import open_sink
from tests.support.doors import child_environment
from tests.support.leftovers import nothing_left

pytestmark = pytest.mark.qemu

_SCRIPT = """
import json, sys
from contextlib import contextmanager
from qemu_dump_ext.cli.dump_command import main
from qemu_dump_ext.engine import stopped_guest as module

stop, imported, started = module.stopped, [], []
stands_still = False

def note(event, arguments):
    if event == "subprocess.Popen":
        started.append(stands_still)

@contextmanager
def stopped(*arguments, **options):
    global stands_still
    with stop(*arguments, **options) as pause:
        before, stands_still = set(sys.modules), True
        yield pause
        imported.extend(sorted(set(sys.modules) - before))
        stands_still = False

module.stopped = stopped
sys.addaudithook(note)
status = main(sys.argv[1:])
print(json.dumps({
    "status": status,
    "imported": imported,
    "all": sorted(sys.modules),
    "started": started,
}))
"""
_PACKAGE = "qemu_dump_ext"
# What it is for is done otherwise, or not at all.
_NOT_FOR_A_SMALL_GUEST = {
    *("ctypes.util", "datetime", "email", "hashlib", "importlib.metadata", "multiprocessing"),
    "numpy",
    *(f"{_PACKAGE}.cli.gdb_driver", f"{_PACKAGE}.windows"),
    *(f"{_PACKAGE}.connections.libvirt", f"{_PACKAGE}.qemu.hmp", f"{_PACKAGE}.dump_readers"),
    *(f"{_PACKAGE}.engine.estimate", f"{_PACKAGE}.engine.live_guest"),
    *(f"{_PACKAGE}.linux.call_trace", f"{_PACKAGE}.linux.kernel_pages"),
    *(f"{_PACKAGE}.structures.migration", f"{_PACKAGE}.pages.copied_memory"),
    *(f"{_PACKAGE}.architectures.{name}" for name in ("aarch64", "mips", "s390x", "ppc64")),
    *(f"{_PACKAGE}.dump_formats.win_dmp", f"{_PACKAGE}.structures.win_dmp"),
    *(f"{_PACKAGE}.qemu.saved_guest", f"{_PACKAGE}.qemu.control_group"),
}
_NOT_FOR_AN_ELF_CORE = {
    *(f"{_PACKAGE}.dump_formats.kdump", f"{_PACKAGE}.page_codecs", f"{_PACKAGE}.pages.packing"),
    *(f"{_PACKAGE}.pages.dedup", f"{_PACKAGE}.structures.kdump"),
}
# May become less.
_MODULES_OF_OURS = 145
_MODULES_OF_OURS_FOR_ELF = 127


@pytest.fixture(scope="module")
def machine() -> Iterator[QemuMachine]:
    with stopped_machine(["qemu-system-x86_64"], ["-m", "64"]) as machine:
        yield machine


def _dump(machine: QemuMachine, file: Path, *words: str) -> Any:
    argv = [sys.executable, "-c", _SCRIPT, "--qmp", str(machine.qmp_sockets[0]), *words, str(file)]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=True, env=child_environment(), timeout=300
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "words",
    [
        ("--format", "elf"),
        ("--format", "kdump-raw-zstd"),
        ("--format", "kdump-raw-zlib"),
        ("--format", "kdump-raw-snappy"),
        ("-z", "--snapshot"),
        ("-z", "--dump-level", "31"),
        ("-p", "--max-bytes", "1GiB"),
    ],
    ids=" ".join,
)
def test_nothing_is_imported_while_the_guest_stands_still(machine, tmp_path, words):
    done = _dump(machine, tmp_path / "dump", *words)
    assert (done["status"], done["imported"], done["started"]) == (0, [], [])
    # Nothing is left out of this guest, for nothing tells of a kernel; it would be by numpy.
    tells_pages_apart = bool({"--dump-level", "--max-bytes"} & set(words))
    assert ("numpy" in done["all"]) == tells_pages_apart


def test_nor_while_a_guest_stands_still_whose_memory_is_worth_numpy(tmp_path):
    with stopped_machine(["qemu-system-x86_64"], ["-m", "65"]) as larger:
        done = _dump(larger, tmp_path / "dump", "-z")
    assert (done["status"], done["imported"]) == (0, [])
    assert "numpy" in done["all"]


@pytest.fixture(scope="module")
def larger() -> Iterator[QemuMachine]:
    with stopped_machine(["qemu-system-x86_64"], ["-m", "257"]) as machine:
        yield machine


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (("-z", "--threads", "3"), 1),
        (("-z", "zstd", "-R", "--threads", "2", "--snapshot"), 1),
        (("-z", "--threads", "2", "--dump-level", "1"), 1),
        (("-z", "--threads", "1"), 0),
        (("--threads", "2"), 0),
        (("-z", "--threads", "2", "--range", "0", "0x1000000"), 0),
    ],
    ids=str,
)
def test_what_packs_is_started_before_the_guest_stands_still(larger, tmp_path, words, count):
    done = _dump(larger, tmp_path / "dump", *words)
    assert (done["status"], done["imported"]) == (0, [])
    assert done["started"] == [False] * count


def test_what_packs_is_started_late_where_a_level_leaves_nothing_out(larger, tmp_path):
    done = _dump(larger, tmp_path / "dump", "-z", "--threads", "2", "--dump-level", "31")
    assert (done["status"], done["started"]) == (0, [True])


def test_what_packs_is_started_where_the_highest_level_may_leave_enough(tmp_path):
    backend = "memory-backend-ram,id=ram,size=4G,reserve=off"
    arguments = ["-M", "q35,memory-backend=ram", "-m", "4096", "-object", backend]
    words = ("-z", "--threads", "2", "--dump-level", "31")
    with stopped_machine(["qemu-system-x86_64"], arguments) as large:
        done = _dump(large, tmp_path / "dump", *words)
    assert (done["status"], done["imported"], done["started"]) == (0, [], [False])


def test_what_packs_ends_where_the_guest_is_not_even_stopped(tmp_path):
    arguments = ["-m", "257", "-incoming", "defer"]
    with (
        stopped_machine(["qemu-system-x86_64"], arguments) as machine,
        connect_qmp(str(machine.qmp_sockets[0])) as monitor,
    ):
        access, quiet = GuestAccess.by_qmp(monitor), ProgressMeter(None)
        for live in (None, *Live):
            request = DumpRequest(format="kdump-zlib", threads=2, live=live)
            with (
                nothing_left(),
                open_sink(str(tmp_path / str(live)), force=False, standard_output=None) as sink,
                pytest.raises(RequestError, match="incoming"),
            ):
                dump(request, access, sink, memory="auto", progress=quiet)


@pytest.mark.parametrize(
    ("words", "others", "most"),
    [
        (("-z",), _NOT_FOR_A_SMALL_GUEST, _MODULES_OF_OURS),
        ((), _NOT_FOR_A_SMALL_GUEST | _NOT_FOR_AN_ELF_CORE, _MODULES_OF_OURS_FOR_ELF),
    ],
    ids=["kdump", "elf"],
)
def test_a_small_guest_is_dumped_with_little(machine, tmp_path, words, others, most):
    modules = _dump(machine, tmp_path / "dump", *words)["all"]
    loaded = others & set(modules)
    assert not loaded
    assert sum(name.startswith(_PACKAGE) for name in modules) <= most
