from __future__ import annotations

import gzip
import lzma
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import zstandard

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest_images.initramfs import (
    CpioEntry,
    build_initramfs,
    load_order,
    module_dependencies,
    write_cpio,
)
from qemu_dump_ext.guest_images.manifest import find_image

_ENTRIES = [
    CpioEntry("bin", stat.S_IFDIR | 0o755),
    CpioEntry("bin/odd", stat.S_IFREG | 0o750, b"12345"),
    CpioEntry("empty", stat.S_IFREG | 0o644),
    CpioEntry("a-name-of-other-length", stat.S_IFREG | 0o644, b"x" * 4096),
]


def _module(*dependencies: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + ",".join(dependencies).encode() + b"\0name=x\0"


@pytest.fixture
def modules_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "6.1.0-test"
    (folder / "kernel/net").mkdir(parents=True)
    (folder / "modules.builtin").write_text("kernel/drivers/built-in.ko\n")
    (folder / "kernel/low.ko.xz").write_bytes(lzma.compress(_module()))
    (folder / "kernel/net/mid-dle.ko.gz").write_bytes(gzip.compress(_module("low", "built_in")))
    (folder / "kernel/net/high.ko.zst").write_bytes(
        zstandard.ZstdCompressor().compress(_module("mid-dle", "low"))
    )
    (folder / "kernel/alone.ko").write_bytes(_module())
    return folder


@pytest.mark.skipif(not shutil.which("cpio"), reason="needs cpio")
def test_cpio_reads_the_archive(tmp_path: Path):
    archive = write_cpio(_ENTRIES)
    subprocess.run(["cpio", "-i", "-m", "--quiet"], input=archive, cwd=tmp_path, check=True)
    for entry in _ENTRIES:
        path = tmp_path / entry.name
        assert path.stat().st_mode == entry.mode
        if not path.is_dir():
            assert path.stat().st_mtime == 0
            assert path.read_bytes() == entry.content
    listing = subprocess.run(
        ["cpio", "-t", "-v", "--quiet"],
        input=write_cpio([CpioEntry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))]),
        capture_output=True,
        check=True,
    ).stdout.decode()
    assert listing.startswith("crw-------")
    assert " 5,   1 " in listing


def test_an_archive_is_a_multiple_of_its_alignment():
    assert len(write_cpio(_ENTRIES)) % 4 == 0


def test_dependencies_of_a_module():
    assert module_dependencies(_module("a", "b")) == ["a", "b"]
    assert module_dependencies(_module()) == []
    assert module_dependencies(b"no modinfo") == []


def test_modules_come_after_what_they_need(modules_folder: Path):
    modules = load_order(modules_folder, ["high", "alone", "mid_dle", "built-in"])
    assert [name for name, _ in modules] == ["low", "mid_dle", "high", "alone"]
    assert all(content.startswith(b"\x7fELF") for _, content in modules)


def test_a_module_that_the_kernel_lacks(modules_folder: Path):
    with pytest.raises(RequestError, match=r"kernel 6.1.0-test has no module nothing"):
        load_order(modules_folder, ["nothing"])


def test_the_same_input_gives_the_same_bytes(modules_folder: Path, tmp_path: Path):
    (tmp_path / "busybox").write_bytes(b"\x7fELF")
    for name in ("qemu_fw_cfg", "pvpanic-mmio"):
        (modules_folder / f"{name}.ko").write_bytes(_module())
    first, second = (
        build_initramfs(
            find_image("x86_64"),
            busybox=tmp_path / "busybox",
            modules_folder=modules_folder,
            fill=False,
        )
        for _ in range(2)
    )
    assert first == second
    content = gzip.decompress(first)
    assert b"modules/000-qemu_fw_cfg.ko\0" in content
    assert b"echo 'the guest is ready'" in content
