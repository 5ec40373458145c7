"""Ranges of guest memory: QEMU's bytes, and QEMU's words for what it refuses."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_dump_ext.cli.dump_command import main
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from tests.conftest import PLANTED_AT
from tests.support.doors import run_gdb
from tests.support.newer_qemu import newer_qemu_command
from tests.support.oracle import elf_facts, kdump_pages
from tests.support.raw_qmp import RawQmp

pytestmark = pytest.mark.qemu

# The machine has RAM at 0-0xbffff and from 0x100000 on, and its BIOS below 4 GiB.
RANGES = {
    "three-bytes": (PLANTED_AT + 1, 3),
    "within-a-block": (0x1234, 0x5678),
    "over-several-blocks": (0x80000, 0x100000),
    "over-the-hole": (0x800000, 0xFF900000),
    "partly-outside": (0xF00000, 0x80000000),
    "everything": (0, 1 << 40),
    "from-a-hole": (0xF0000000, 0x20000000),
    "one-block-exactly": (0, 0xA0000),
    "to-the-largest-number": (0x100000, (1 << 63) - 1 - 0x100000),
}


def ours(machine: QemuMachine, path: Path, *words: Any) -> int:
    argv = ["--qmp", str(machine.qmp_sockets[0]), *map(str, words[:-1]), str(path)]
    return main(argv + list(words[-1]))


def native(machine: QemuMachine, path: Path, **arguments: object) -> Path:
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{path}", **arguments)
    return path


@pytest.mark.parametrize("name", RANGES)
def test_exact_elf_of_a_range_is_qemus(bare_machine, tmp_path, name):
    begin, length = RANGES[name]
    theirs = native(bare_machine, tmp_path / "native", begin=begin, length=length)
    assert ours(bare_machine, tmp_path / "ours", "--exact", [hex(begin), str(length)]) == 0
    assert filecmp.cmp(tmp_path / "ours", theirs, shallow=False)
    assert ours(bare_machine, tmp_path / "o2", "--exact", "--range", begin, length, []) == 0
    assert filecmp.cmp(tmp_path / "o2", theirs, shallow=False)


@pytest.mark.gdb
def test_in_gdb_the_words_are_those_of_the_monitor(bare_machine, tmp_path):
    theirs = native(bare_machine, tmp_path / "native", begin=0x200000, length=0x1801)
    done = run_gdb(
        bare_machine,
        [f"qemu-dump-guest-memory --exact {tmp_path}/ours 2*(0x80000 + 0x80000) 014000 + 1"],
    )
    assert filecmp.cmp(tmp_path / "ours", theirs, shallow=False), done.stdout + done.stderr


WITH_REGISTERS = ("$pc-0x1ff0 $eax + 0x1000", "($cs*16 & 0xff000)+ $eip - 0xfff0 0x1023")


@pytest.mark.gdb
@pytest.mark.parametrize("words", WITH_REGISTERS)
def test_registers_are_those_of_the_monitor(bare_machine, tmp_path, words):
    with RawQmp(bare_machine.qmp_sockets[1]) as qmp:
        line = f"dump-guest-memory {tmp_path}/native {words}"
        assert qmp.execute("human-monitor-command", **{"command-line": line}) == ""
    assert ours(bare_machine, tmp_path / "ours", "--exact", words.split()) == 0
    assert filecmp.cmp(tmp_path / "ours", tmp_path / "native", shallow=False)
    done = run_gdb(bare_machine, [f"qemu-dump-guest-memory --exact {tmp_path}/gdb {words}"])
    assert filecmp.cmp(tmp_path / "gdb", tmp_path / "native", shallow=False), done.stderr


def test_a_register_that_the_monitor_does_not_know_is_refused(bare_machine, tmp_path, capsys):
    assert ours(bare_machine, tmp_path / "ours", ["$nosuch", "1"]) == 2
    assert "unknown register" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


REFUSED = {
    "length-0": ((PLANTED_AT, 0), {}),
    "wholly-outside": ((1 << 40, 0x1000), {}),
    "in-the-hole": ((0x2000000, 0x1000), {}),
    "kdump": ((0, 0x1000), {"format": "kdump-zlib"}),
    "kdump-with-begin-alone": ((0,), {"format": "kdump-zlib"}),
    "begin-alone": ((0x1000,), {}),
}


@pytest.fixture(scope="module", params=["installed", "newer"])
def any_machine(request: pytest.FixtureRequest, bare_machine: QemuMachine) -> Iterator[QemuMachine]:
    if request.param == "installed":
        yield bare_machine
    else:
        with stopped_machine(newer_qemu_command(), ["-M", "q35", "-m", "16"]) as machine:
            yield machine


@pytest.mark.parametrize("name", REFUSED)
def test_what_qemu_refuses_is_refused_in_its_words(any_machine, tmp_path, capsys, name):
    bounds, others = REFUSED[name]
    arguments = dict(zip(("begin", "length"), bounds, strict=False)) | others
    with pytest.raises(RuntimeError) as refusal:
        native(any_machine, tmp_path / "native", **arguments)
    words = ["--exact", *(["-z"] if others else [])]
    status = ours(any_machine, tmp_path / "ours", *words, [str(bound) for bound in bounds])
    assert status == 2
    message = capsys.readouterr().err
    assert str(refusal.value).removeprefix("dump-guest-memory: ") in message
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("bounds", [("0-4096", "8192"), ("0", "(-1)"), ("1", "~0")])
def test_negative_ranges_are_refused(tmp_path, capsys, bounds):
    assert main(["--qmp", "/nowhere", str(tmp_path / "ours"), *bounds]) == 2
    assert "must not be negative" in capsys.readouterr().err


def test_kdump_of_a_range_has_just_its_pages(bare_machine, bare_native, tmp_path):
    begin, length = PLANTED_AT + 0x801, 0x2800
    words: tuple[Any, ...] = ("-z", "-R", "--range", hex(begin), hex(length), [])
    assert ours(bare_machine, tmp_path / "ours", *words) == 0
    facts = elf_facts(bare_native.elf)
    content = dict(zip([load[1] for load in facts["loads"]], facts["memory"], strict=True))[
        0x100000
    ]
    with open_dump(tmp_path / "ours") as dump:
        assert verify_dump(dump).problems == []
        assert list(dump.memory_ranges()) == [(PLANTED_AT, 0x4000)]
        assert dump.read(PLANTED_AT, 0x4000) == content[PLANTED_AT - 0x100000 :][:0x4000]


@pytest.mark.guest
def test_kdump_of_a_range_of_linux_opens_in_drgn(paused_linux, tmp_path):
    words: tuple[Any, ...] = ("-z", "-R", "--range", "0x100000", "0x200000", [])
    assert ours(paused_linux, tmp_path / "ours", *words) == 0
    pages = [gpa for gpa, _ in kdump_pages(tmp_path / "ours")]
    assert pages == list(range(0x100000, 0x300000, 0x1000))


def test_a_kdump_of_a_range_is_refused_with_the_way_out(tmp_path, capsys):
    assert main(["--qmp", "/nowhere", "-z", str(tmp_path / "ours"), "0", "0x1000"]) == 2
    assert "--range BEGIN LENGTH does" in capsys.readouterr().err
    assert main(["--qmp", "/nowhere", "--exact", "-z", "--range", "0", "1", "x"]) == 2
    assert "doesn't support paging or filter" in capsys.readouterr().err


def test_default_elf_of_a_range_has_its_bytes(bare_machine, tmp_path):
    assert ours(bare_machine, tmp_path / "ours", [str(PLANTED_AT - 1), "5"]) == 0
    (load,) = elf_facts(tmp_path / "ours")["loads"]
    assert load == (PLANTED_AT - 1, PLANTED_AT - 1, 5, 5)
