"""What is imported for a dump, and when: importing takes longer than all else in a small one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from tests.support.doors import child_environment

pytestmark = pytest.mark.qemu

_SCRIPT = """
import json, sys
from contextlib import contextmanager
from qemu_dump_ext.cli.dump_command import main
from qemu_dump_ext.engine import stopped_guest as module

stop, imported = module.stopped, []

@contextmanager
def stopped(*arguments, **options):
    with stop(*arguments, **options) as pause:
        before = set(sys.modules)
        yield pause
        imported.extend(sorted(set(sys.modules) - before))

module.stopped = stopped
status = main(sys.argv[1:])
print(json.dumps({"status": status, "imported": imported, "all": sorted(sys.modules)}))
"""
_PACKAGE = "qemu_dump_ext"
# Each costs a tenth of a small dump or more, and what it is for is done otherwise.
_NOT_FOR_A_SMALL_GUEST = {
    *("ctypes.util", "datetime", "email", "hashlib", "importlib.metadata", "multiprocessing"),
    "numpy",
    *(f"{_PACKAGE}.cli.gdb_driver", f"{_PACKAGE}.windows"),
    *(f"{_PACKAGE}.connections.libvirt", f"{_PACKAGE}.qemu.hmp", f"{_PACKAGE}.dump_readers"),
    *(f"{_PACKAGE}.engine.estimate", f"{_PACKAGE}.engine.live_guest"),
    *(f"{_PACKAGE}.linux.call_trace", f"{_PACKAGE}.linux.kernel_pages"),
    *(f"{_PACKAGE}.structures.migration", f"{_PACKAGE}.pages.copied_memory"),
    *(f"{_PACKAGE}.architectures.{name}" for name in ("aarch64", "mips", "s390x", "ppc64")),
}
# May become less.
_MODULES_OF_OURS = 150


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
    assert (done["status"], done["imported"]) == (0, [])
    # Nothing is left out of this guest, for nothing tells of a kernel; it would be by numpy.
    tells_pages_apart = bool({"--dump-level", "--max-bytes"} & set(words))
    assert ("numpy" in done["all"]) == tells_pages_apart


def test_nor_while_a_guest_stands_still_whose_memory_is_worth_numpy(tmp_path):
    with stopped_machine(["qemu-system-x86_64"], ["-m", "65"]) as larger:
        done = _dump(larger, tmp_path / "dump", "-z")
    assert (done["status"], done["imported"]) == (0, [])
    assert "numpy" in done["all"]


def test_a_small_guest_is_dumped_with_little(machine, tmp_path):
    modules = _dump(machine, tmp_path / "dump", "-z")["all"]
    loaded = {name for name in _NOT_FOR_A_SMALL_GUEST if name in modules}
    assert not loaded
    assert sum(name.startswith(_PACKAGE) for name in modules) <= _MODULES_OF_OURS
