"""What opens a dump here; readers are programs of a name, wherever they come from."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
from pathlib import Path

import pytest

from qemu_dump_ext.engine import opening as module
from qemu_dump_ext.engine.opening import (
    Kernel,
    fetch_vmlinux,
    find_vmlinux,
    is_file,
    opening,
    read_build_id,
    symbols_command,
)
from qemu_dump_ext.errors import RequestError

RELEASE = "6.1.0-44-amd64"
KERNEL = Kernel(RELEASE)


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host without any reader or symbols; its programs are in `bin`."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv(module.VMLINUX_VARIABLE, raising=False)
    monkeypatch.setattr(module, "_DEBUG_ROOT", tmp_path / "debug")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    return tmp_path


def install(host: Path, *programs: str) -> None:
    for name in programs:
        program = host / "bin" / name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)


def compiled(path: Path, build_id: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    argv = ["/usr/bin/gcc", "-xc", "-", "-shared", "-nostdlib", f"-Wl,--build-id=0x{build_id}"]
    environment = {"PATH": "/usr/bin:/bin"}
    subprocess.run([*argv, "-o", path], input=b"int x;", check=True, env=environment)
    return path


def test_crash_comes_first_where_there_is_a_vmlinux(host):
    install(host, "crash", "drgn", "gdb")
    vmlinux = host / "debug/boot" / f"vmlinux-{RELEASE}"
    vmlinux.parent.mkdir(parents=True)
    vmlinux.write_bytes(b"")
    found = opening(Path("vm dump"), "elf", KERNEL, target=platform.machine())
    assert found is not None
    assert found.line() == f"crash {vmlinux} 'vm dump'"
    other = opening(Path("vm"), "elf", KERNEL, target="s390x")
    assert other is not None
    assert other.line() == f"drgn -c vm -s {vmlinux}"


def test_drgn_opens_without_symbols_and_says_what_brings_them(host):
    install(host, "crash", "drgn", "gdb")
    found = opening(Path("vm"), "kdump-zlib", KERNEL)
    assert found is not None
    assert found.line() == f"drgn -c vm    # symbols: apt install linux-image-{RELEASE}-dbg"


def test_gdb_opens_what_is_no_linux_and_only_elf(host):
    install(host, "crash", "drgn", "gdb")
    found = opening(Path("vm"), "elf", Kernel())
    assert found is not None
    assert found.argv == ("gdb", "-c", "vm")
    assert opening(Path("vm"), "kdump-zlib", Kernel()) is None


@pytest.mark.parametrize(
    ("reader", "dump_format", "said"),
    [
        ("crash", "elf", "it is not installed"),
        ("drgn", "elf", "it is not installed (pip install 'qemu_dump_ext[drgn]')"),
        ("gdb", "kdump-zlib", "it reads ELF cores alone"),
    ],
)
@pytest.mark.usefixtures("host")
def test_reader_that_cannot_says_why(reader, dump_format, said):
    with pytest.raises(RequestError) as caught:
        opening(Path("vm"), dump_format, KERNEL, reader=reader)
    assert str(caught.value) == f"{reader} cannot open vm: {said}"
    assert opening(Path("vm"), dump_format, KERNEL) is None


def test_vmlinux_is_that_of_the_build_id(host, monkeypatch):
    build_id, other = "ab" * 20, "cd" * 20
    by_release = compiled(host / "debug/boot" / f"vmlinux-{RELEASE}", other)
    assert read_build_id(by_release) == other
    assert find_vmlinux(KERNEL) == by_release
    assert find_vmlinux(Kernel(RELEASE, build_id)) is None
    by_id = compiled(host / "debug/.build-id/ab" / f"{'ab' * 19}.debug", build_id)
    assert find_vmlinux(Kernel(RELEASE, build_id)) == by_id
    configured = compiled(host / "kernels" / RELEASE / "vmlinux", build_id)
    monkeypatch.setenv(module.VMLINUX_VARIABLE, f"{host}/kernels/{{release}}/vmlinux")
    assert find_vmlinux(Kernel(RELEASE, build_id)) == configured


def test_places_where_nobody_may_look_have_nothing(host, monkeypatch):
    """As the home of another, or /boot: what is made of a dump does not fail for it."""
    closed = host / "home" / "cache"
    looked = os.stat

    def refuse(path, *arguments, **words):
        if str(path).startswith(str(closed)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return looked(path, *arguments, **words)

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(closed))
    monkeypatch.setenv(module.VMLINUX_VARIABLE, f"{closed}/vmlinux")
    kernel = Kernel(RELEASE, "ab" * 20)
    assert find_vmlinux(kernel) is None
    install(host, "debuginfod-find")
    (host / "bin/debuginfod-find").write_text(f"#!/bin/sh\necho {closed}/debuginfo\n")
    monkeypatch.setenv("DEBUGINFOD_URLS", "http://127.0.0.1:9/")
    assert fetch_vmlinux(kernel) is None
    assert not is_file(closed / "dump")


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"\x7fELF\x02\x01" + b"\xff" * 80])
def test_what_has_no_build_id_has_none(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert read_build_id(tmp_path / "file") is None
    assert read_build_id(tmp_path) is None


@pytest.mark.parametrize("release", ["../../etc/passwd", "x; rm -rf /", "$(x)", "", "a/b", "\n"])
@pytest.mark.usefixtures("host")
def test_release_of_a_hostile_guest_is_in_no_path_and_no_command(release):
    assert find_vmlinux(Kernel(release, "../x")) is None
    assert symbols_command(Kernel(release)) is None


def test_packages_of_distributions_are_named():
    assert symbols_command(KERNEL) == f"apt install linux-image-{RELEASE}-dbg"
    assert symbols_command(Kernel("6.8.0-31-generic")) == (
        "apt install linux-image-6.8.0-31-generic-dbgsym"
    )
    assert symbols_command(Kernel("5.14.0-70.el9.x86_64")) == (
        "dnf debuginfo-install kernel-5.14.0-70.el9.x86_64"
    )
    assert symbols_command(Kernel("6.9.0-rc1+")) is None
