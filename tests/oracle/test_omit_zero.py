"""Kdumps without pages of zeros: what is there is as in QEMU's ELF, what is not is zero there."""

from __future__ import annotations

import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.support.doors import run_cli
from tests.support.oracle import OracleDumps, elf_facts, kdump_facts, rearrange

pytestmark = pytest.mark.qemu


def pages_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Read a raw kdump with zlib pages by `struct` alone; drgn wants a VMCOREINFO."""
    data = path.read_bytes()
    facts = kdump_facts(path)
    block = facts["block_size"]
    descriptor = len(data) - len(facts["rest"])
    second = facts["bitmaps"][len(facts["bitmaps"]) // 2 :]
    for pfn in range(8 * len(second)):
        if second[pfn >> 3] >> (pfn & 7) & 1:
            offset, size, flags, _ = struct.unpack_from("<qIIQ", data, descriptor)
            content = data[offset : offset + size]
            yield pfn * block, zlib.decompress(content) if flags else content
            descriptor += 24


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("source", ["process", "native_stream", "pmemsave"])
def test_pages(
    bare_machine: QemuMachine,
    bare_native: OracleDumps,
    tmp_path: Path,
    source: str,
    flattened: bool,
):
    ours = tmp_path / "ours"
    qmp = ("--qmp", bare_machine.qmp_sockets[0], "--memory", source)
    words = () if flattened else ("-R",)
    done = run_cli(*qmp, "-z", "--omit-zero", *words, ours)
    assert done.returncode == 0, done.stderr
    assert "crash opens it with --zero_excluded only" in done.stdout + done.stderr
    if flattened:
        ours = rearrange(ours, tmp_path / "raw")
    expected = {}
    native = elf_facts(bare_native.elf)
    for (_, gpa, _, _), content in zip(native["loads"], native["memory"], strict=True):
        for offset in range(0, len(content), 4096):
            if any(content[offset : offset + 4096]):
                expected[gpa + offset] = content[offset : offset + 4096]
    assert dict(pages_of(ours)) == expected
    facts = kdump_facts(ours)
    half = len(facts["bitmaps"]) // 2
    theirs = kdump_facts(bare_native.kdump_raw_zlib)["bitmaps"]
    assert facts["bitmaps"][:half] == theirs[:half]
    assert facts["bitmaps"][half:] != theirs[half:]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("-z", "--exact", "--omit-zero"), "QEMU keeps pages of zeros"),
        (("--omit-zero",), "are for kdumps"),
        (("--level", "1"), "are for kdumps"),
        (("-z", "--exact", "--level", "1"), "--exact has no levels"),
        (("-s", "--level", "1"), "a kdump of codec snappy has no levels"),
        (("-z", "--level", "10"), "zlib has no level 10"),
        (("-z", "zstd", "--level", "-1"), "zstd has no level -1"),
        (("--threads", "0"), "is no number of 1 or more"),
        (("--max-pause", "0"), "is no number of seconds above 0"),
    ],
)
def test_what_contradicts_itself_is_refused_at_once(
    bare_machine: QemuMachine, tmp_path: Path, words: tuple[str, ...], reason: str
):
    done: subprocess.CompletedProcess[str] = run_cli(
        "--qmp", bare_machine.qmp_sockets[0], *words, tmp_path / "x"
    )
    assert done.returncode == 2
    assert any(part in done.stderr for part in reason.split("|")), done.stderr
    assert not list(tmp_path.iterdir())
