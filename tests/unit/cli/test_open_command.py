"""`qemu-dump open`: what no reader opens is not given to one."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest

from qemu_dump_ext.cli import main
from qemu_dump_ext.crash_collector.config.places import CONFIGURATION_VARIABLE
from qemu_dump_ext.engine import opening
from tests.support.sample_elf import Load, make_elf
from tests.support.sample_kdump import BLOCK, make_kdump, prstatus
from tests.support.sample_migration import PAGE, make_migration

VMCOREINFO = b"OSRELEASE=6.1.0\nPAGESIZE=4096\n"
NAMES, MACHINE = slice(12, 12 + 4 * 65), slice(12 + 4 * 65, 12 + 4 * 65 + 6)
"""sysname, nodename, release and version in the header of a kdump; and what is behind them."""
DUMP_LEVEL = 8
"""Offset in the sub-header."""


def _install(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "bin" / name
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.delenv(opening.VMLINUX_VARIABLE, raising=False)


@pytest.fixture
def drgn_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, "drgn", monkeypatch)


@pytest.mark.usefixtures("drgn_alone")
def test_a_kdump_that_does_not_name_the_kernel_is_not_for_drgn(tmp_path, capsys):
    path = tmp_path / "vm.kdump"
    data = make_kdump({0: b"text" * 1024}, vmcoreinfo=VMCOREINFO).data
    for number, name in enumerate((b"Linux", b"host", b"6.1.0", b"#1 SMP")):
        start = 12 + 65 * number
        data[start : start + len(name)] = name
    path.write_bytes(data)
    assert main(["open", "--print", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"drgn -c {path}")
    data[NAMES] = bytes(4 * 65)  # as QEMU has it
    path.write_bytes(data)
    assert main(["open", "--print", str(path)]) == 2
    assert "makes what readers open" in capsys.readouterr().err
    assert main(["open", "--print", "--reader", "drgn", str(path)]) == 2
    assert "its header does not name the kernel" in capsys.readouterr().err


@pytest.mark.usefixtures("drgn_alone")
def test_what_no_reader_knows_is_to_be_converted(tmp_path, capsys):
    path = tmp_path / "of test"
    path.write_bytes(make_migration(b"\1" * PAGE))
    assert main(["open", "--print", str(path)]) == 2
    assert (
        f"('qemu-dump convert '{path}' vm.elf' makes what readers open)" in capsys.readouterr().err
    )
    assert main(["open", "--print", "--reader", "drgn", str(path)]) == 2
    assert "drgn cannot open" in capsys.readouterr().err


@pytest.fixture
def crash_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, "crash", monkeypatch)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setattr(opening, "_MACHINES", {"x86_64": os.uname().machine})


@pytest.mark.usefixtures("crash_alone")
def test_crash_needs_no_more_than_a_vmlinux_that_is_named(tmp_path, capsys, monkeypatch):
    """As of QEMU's dump of a guest without a vmcoreinfo device, and of Xen's."""
    path, vmlinux = tmp_path / "vm.elf", tmp_path / "vmlinux"
    path.write_bytes(make_elf([Load(0, b"text" * 1024)], notes=prstatus(1)))
    monkeypatch.setenv(opening.VMLINUX_VARIABLE, str(vmlinux))
    words = ["open", "--print", str(path)]
    assert main([*words, "--vmlinux", str(vmlinux)]) == 2
    assert f"--vmlinux: there is no file {vmlinux}" in capsys.readouterr().err
    vmlinux.write_bytes(b"")
    assert main(words) == 2
    assert "nothing on this host opens" in capsys.readouterr().err
    assert main([*words, "--vmlinux", str(vmlinux)]) == 0
    assert capsys.readouterr().out == f"crash {vmlinux} {path}\n"


@pytest.mark.usefixtures("crash_alone")
def test_crash_takes_pages_for_zeros_where_some_were_left_out_alone(tmp_path, capsys):
    path, vmlinux = tmp_path / "vm.kdump", tmp_path / "vmlinux"
    vmlinux.write_bytes(b"")
    sample = make_kdump({0: b"text" * 1024, 2: bytes(PAGE)}, vmcoreinfo=VMCOREINFO)
    data = sample.data
    data[MACHINE] = b"x86_64"
    struct.pack_into("<i", data, BLOCK + DUMP_LEVEL, 1)
    for bits, flags in ((0b101, ""), (0b111, "--zero_excluded ")):
        data[sample.bitmaps] = bits
        path.write_bytes(data)
        assert main(["open", "--print", str(path), "--vmlinux", str(vmlinux)]) == 0
        assert capsys.readouterr().out == f"crash {flags}{vmlinux} {path}\n"


def test_what_is_no_file_is_no_crash_either(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(CONFIGURATION_VARIABLE, str(tmp_path / "none.yaml"))
    monkeypatch.chdir(tmp_path)
    assert main(["open", "web1"]) == 2
    assert "there is no file web1, and no crash collector that" in capsys.readouterr().err
    assert main(["open", "crashes/web1"]) == 2
    assert "cannot open crashes/web1: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["latest", "web1", "web1/latest", "web1/20260131T101112Z-0a1b"])
def test_what_may_be_a_crash_is_for_the_collector(tmp_path, capsys, monkeypatch, word):
    """The folders of a store have the names of guests."""
    (tmp_path / "store/web1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "store")
    configuration = tmp_path / "collector.yaml"
    configuration.write_text(f"store: {tmp_path}/store\nguests: [{{qmp: /x, name: web1}}]\n")
    monkeypatch.setenv(CONFIGURATION_VARIABLE, str(configuration))
    assert main(["open", word]) == 2
    assert capsys.readouterr().err.startswith("qemu-dump collect open: there is no crash in")


def test_what_is_there_and_no_file_is_told_as_such(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    for name in ("fifo", "folder", "socket"):
        assert main(["open", str(tmp_path / name)]) == 5
        assert f"{tmp_path / name} is not a regular file" in capsys.readouterr().err
    (tmp_path / "link").symlink_to("nowhere")
    assert main(["open", str(tmp_path / "link")]) == 2
    assert f"cannot open {tmp_path / 'link'}: No such file" in capsys.readouterr().err
