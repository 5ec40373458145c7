"""A Linux guest without the vmcoreinfo device: its note is found, and readers open the dump."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qemu_dump_ext.cli import main as qemu_dump
from qemu_dump_ext.cli.dump_command import main as dump_guest_memory
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.guest_images.machine import BootedGuest
from qemu_dump_ext.guest_images.manifest import default_cache, find_image
from qemu_dump_ext.guest_images.store import ImageStore
from tests.support.doors import run_gdb
from tests.support.note_search import search_for_note
from tests.support.raw_qmp import RawQmp

pytestmark = [pytest.mark.qemu, pytest.mark.guest]


@pytest.fixture(scope="module")
def deviceless() -> Iterator[BootedGuest]:
    """Stopped once it has booted, with everything that the kernel logs on its console."""
    image = find_image("x86_64")
    image = replace(
        image,
        devices=("pvpanic",),
        modules=("pvpanic-mmio",),
        kernel_arguments=image.kernel_arguments.replace("quiet", "ignore_loglevel"),
    )
    with BootedGuest(image, ImageStore(default_cache()).fetch(image)) as guest:
        with RawQmp(guest.qmp_sockets[1]) as qmp:
            qmp.execute("stop")
        yield guest


def dump(guest: BootedGuest, path: Path, *words: str) -> Path:
    assert dump_guest_memory(["--qmp", str(guest.qmp_sockets[0]), *words, str(path)]) == 0
    return path


FORMATS = {"elf": (), "kdump": ("-z", "-R"), "paged": ("-p",)}


@pytest.mark.parametrize("name", FORMATS)
def test_readers_open_the_dump_as_if_there_were_the_device(deviceless, tmp_path, name):
    path = dump(deviceless, tmp_path / "dump", *FORMATS[name])
    release = deviceless.files.release
    with open_dump(path) as opened:
        assert opened.vmcoreinfo_facts["OSRELEASE"] == release
        assert opened.vmcoreinfo is not None
        assert opened.notes[-1].name == "VMCOREINFO" or name == "kdump"
    done = subprocess.run(
        [sys.executable, "-m", "drgn", "-c", path, "-q", "-e", "print(prog['UTS_RELEASE'])"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert release in done.stdout, done.stderr
    if name != "paged":
        subprocess.run(
            ["makedumpfile", "--dump-dmesg", path, tmp_path / "log"],
            check=True,
            capture_output=True,
        )
        assert deviceless.image.kernel_log in (tmp_path / "log").read_text()


def test_without_the_note_it_is_what_qemu_dumps(deviceless, tmp_path):
    with RawQmp(deviceless.qmp_sockets[1]) as qmp:
        path = tmp_path / "native"
        qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{path}")
    native = path.read_bytes()
    for words in (["--exact"], ["--exact", "--no-vmcoreinfo"]):
        assert dump(deviceless, tmp_path / "ours", "--force", *words).read_bytes() == native
    with open_dump(dump(deviceless, tmp_path / "ours", "--force", "--no-vmcoreinfo")) as opened:
        assert opened.vmcoreinfo is None


def test_the_stub_alone_finds_it_as_well(deviceless, tmp_path):
    """Slow as the stub is, a look at page starts comes to the kernel that is asked for."""
    path = tmp_path / "ours"
    kernel = f"--kernel {deviceless.files.release}"
    command = f"qemu-dump-guest-memory {kernel} --memory gdbstub --range 0x100000 0x1000 {path}"
    done = run_gdb(deviceless, [command], timeout=300)
    assert "lead to the kernel's name" in done.stdout, done.stderr
    with open_dump(path) as opened:
        assert opened.vmcoreinfo_facts["OSRELEASE"] == deviceless.files.release


def test_the_kernel_points_to_its_note(deviceless):
    """A few MiB of its image are looked at, and not all memory."""
    found, searched = search_for_note(deviceless)
    assert found is not None
    assert found.release == deviceless.files.release
    assert searched < 32 << 20


def test_info_tells_where_the_note_is(deviceless, paused_linux, capsys):
    release = deviceless.files.release
    assert qemu_dump(["info", "--qmp", str(deviceless.qmp_sockets[0])]) == 0
    told = capsys.readouterr().out
    assert f"kernel {release}\n" in told
    assert f"VMCOREINFO of kernel {release} was found in guest memory at 0x" in told
    done = run_gdb(deviceless, ["qemu-info-guest"])
    assert f"VMCOREINFO of kernel {release} was found in guest memory at 0x" in done.stdout
    assert qemu_dump(["info", "--qmp", str(paused_linux.qmp_sockets[0])]) == 0
    assert "VMCOREINFO is known to QEMU, by its vmcoreinfo device" in capsys.readouterr().out


def test_info_of_a_machine_without_kernel(bare_machine, capsys):
    assert qemu_dump(["info", "--qmp", str(bare_machine.qmp_sockets[0])]) == 0
    assert "VMCOREINFO was not found in guest memory" in capsys.readouterr().out


def test_a_kernel_that_is_not_there_is_refused(deviceless, tmp_path, capsys):
    socket = str(deviceless.qmp_sockets[0])
    words = ["--qmp", socket, "--kernel", "9.9.9", str(tmp_path / "x")]
    assert dump_guest_memory(words) == 2
    assert f"found: {deviceless.files.release} at 0x" in capsys.readouterr().err


def without_callers(log: str) -> str:
    """Return a log of makedumpfile's as it was before it told who printed each message (1.7.6)."""
    caller = r"\[ *[TC]\d+\] "
    lines = log.splitlines(keepends=True)
    if not re.match(rf"\[[ \d.]+\] {caller}", log):
        return log
    stamp = re.compile(rf"^(\[[ \d.]+\] ){caller}|^( {{15}}) {{11}}")
    return "".join(stamp.sub(lambda found: found[1] or found[2], line) for line in lines)


def test_log_is_makedumpfiles_and_the_consoles(deviceless, tmp_path, capsys):
    path = dump(deviceless, tmp_path / "dump")
    subprocess.run(
        ["makedumpfile", "--dump-dmesg", path, tmp_path / "log"], check=True, capture_output=True
    )
    expected = without_callers((tmp_path / "log").read_text())
    kdump = dump(deviceless, tmp_path / "kdump", "-z")
    bare = dump(deviceless, tmp_path / "bare", "--no-vmcoreinfo")
    capsys.readouterr()
    live = ["--qmp", str(deviceless.qmp_sockets[0])]
    for words in ([str(path)], [str(kdump)], [str(bare)], live):
        assert qemu_dump(["dmesg", *words]) == 0
        assert capsys.readouterr().out == expected, words
    console = deviceless.console_text()
    lines = expected.splitlines()
    assert len(lines) > 200
    missing = [line for line in lines if line not in console]
    # The emulated serial line loses a letter now and then when the host is busy.
    assert len(missing) < len(lines) // 3, missing


def test_note_found_is_the_one_given_to_the_device(paused_linux, tmp_path):
    """In one guest: QEMU's own note, and ours from memory."""
    with open_dump(dump(paused_linux, tmp_path / "device")) as opened:
        (theirs,) = (note for note in opened.notes if note.name == "VMCOREINFO")
    words = ("--kernel", paused_linux.files.release)
    with open_dump(dump(paused_linux, tmp_path / "memory", *words)) as opened:
        (ours,) = (note for note in opened.notes if note.name == "VMCOREINFO")
    assert ours.descriptor == theirs.descriptor
    assert (tmp_path / "device").read_bytes() == (tmp_path / "memory").read_bytes()
