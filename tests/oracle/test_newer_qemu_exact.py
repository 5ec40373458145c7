"""QEMU 11 spells its dumps in its own way: `--exact` follows the attached version."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from tests.conftest import loaded_content
from tests.oracle import known_differences
from tests.oracle.test_doors import DOORS
from tests.support.folders import folder_for
from tests.support.newer_qemu import newer_qemu_command
from tests.support.oracle import OracleDumps, differing_fields, kdump_facts

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]


@pytest.fixture(scope="module")
def machine(request: pytest.FixtureRequest) -> Iterator[QemuMachine]:
    arguments = loaded_content(folder_for(request, "content"))
    with stopped_machine(newer_qemu_command(), arguments) as machine:
        yield machine


@pytest.fixture(scope="module")
def native(machine: QemuMachine, request: pytest.FixtureRequest) -> OracleDumps:
    return OracleDumps(machine, folder_for(request, "native"))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("dump_format", "words"),
    [("elf", ()), ("kdump-zlib", ("-z",)), ("kdump-raw-zlib", ("-z", "-R"))],
)
def test_exact_dump_is_that_of_the_attached_version(
    machine: QemuMachine,
    native: OracleDumps,
    tmp_path: Path,
    door: str,
    dump_format: str,
    words: tuple[str, ...],
):
    ours = tmp_path / "ours"
    DOORS[door](machine, "--exact", *words, ours)
    assert filecmp.cmp(ours, native.take(dump_format), shallow=False)


def test_default_dump_does_not_depend_on_the_version(
    machine: QemuMachine, native: OracleDumps, tmp_path: Path
):
    ours = tmp_path / "ours"
    DOORS["cli-by-qmp"](machine, "-z", "-R", ours)
    native_facts = kdump_facts(native.take("kdump-raw-zlib"))
    assert native_facts["machine"] == "Unknown"
    assert differing_fields(kdump_facts(ours), native_facts) == {
        "machine",
        "release",
        "sysname",
        "version",
        *known_differences.KDUMP_ZLIB,
    }
