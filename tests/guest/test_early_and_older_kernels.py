"""Kernels that stand before they have said anything of themselves, and older ones."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from qemu_dump_ext.cli import main as qemu_dump
from qemu_dump_ext.cli.dump_command import main as dump_guest_memory
from qemu_dump_ext.crash_collector.record import CrashRecord
from qemu_dump_ext.engine import stopped_guest
from qemu_dump_ext.guest_images.machine import BootedGuest, QemuMachine
from qemu_dump_ext.guest_images.manifest import GuestImage, default_cache, find_image
from qemu_dump_ext.guest_images.store import ImageStore
from tests.support.crash_agent import CrashAgent, run_collector
from tests.support.raw_qmp import RawQmp

pytestmark = [pytest.mark.qemu, pytest.mark.guest]

# What has each kernel say its first words at once and get no further, however late it is stopped:
# it waits for 10 s before each line (for more, it would not wait); where it cannot wait (s390x), it
# panics before it has written its VMCOREINFO, for want of memory in pieces so large.
HELD_EARLY = {
    "x86_64": "earlyprintk=ttyS0 boot_delay=10000",
    "aarch64": "earlycon=pl011,0x9000000 boot_delay=10000",
    "s390x": "earlyprintk slub_min_order=20",
}


def older(name: str) -> GuestImage:
    """Return an image with the kernel of Debian 11, which is 5.10."""
    image = find_image(name)
    packages = {"debian": replace(image.packages["debian"], suite="bullseye", debug_symbols=None)}
    return replace(image, name=f"{name}-bullseye", packages=packages, devices=(), modules=())


@contextmanager
def stopped_early(image: GuestImage) -> Iterator[QemuMachine]:
    """Stop at the kernel's first words."""
    files = ImageStore(default_cache()).fetch(image)
    words = image.kernel_arguments.replace("quiet", "ignore_loglevel")
    arguments = [
        *(*image.machine, "-m", f"{image.memory_mib}M", "-kernel", str(files.kernel)),
        *("-append", f"{words} {HELD_EARLY[image.target]}", "-action", "panic=pause"),
    ]
    with QemuMachine([image.qemu], arguments) as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("cont")
            machine.wait_for_console(
                re.compile("Linux version"), timeout_seconds=image.timeout_seconds
            )
            qmp.execute("stop")
        yield machine


@pytest.mark.parametrize(
    "image",
    [*map(find_image, HELD_EARLY), older("x86_64")],
    ids=lambda image: image.name,
)
def test_the_log_of_a_kernel_that_is_still_booting(
    image: GuestImage, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    # What both say is compared, and not how soon a busy host finds it.
    monkeypatch.setattr(stopped_guest, "_SEARCH_SECONDS", math.inf)
    with stopped_early(image) as machine:
        socket = str(machine.qmp_sockets[0])
        assert dump_guest_memory(["--qmp", socket, str(tmp_path / "dump")]) == 0
        capsys.readouterr()
        said = []
        for words in (["--qmp", socket], [str(tmp_path / "dump")]):
            assert qemu_dump(["dmesg", *words]) == 0
            said.append(capsys.readouterr())
        console = machine.console_text()
    assert said[0] == said[1]
    log, remarks = said[0]
    assert "the kernel is still booting" in remarks
    assert "without the times" not in remarks
    assert "] Linux version " in log
    lines = [line for line in log.splitlines() if "Linux version" in line]
    assert len(lines) == 1
    # The console has what the log has, and shows the first line at least.
    shown = console[console.index("Linux version") :].splitlines()[0][:60]
    assert lines[0].partition("] ")[2].startswith(shown)


def _collected(socket: str, directory: Path) -> CrashRecord:
    """Collect a guest that stands in its kernel, of which a System.map knows one function."""
    system_map = directory / "System.map"
    names = {
        "_stext": 0xFFFFFFFF81000000,
        "all_of_it": 0xFFFFFFFF81000000,
        "_etext": 0xFFFFFFFFC0000000,
    }
    lines = [f"{address:016x} T {name}\n" for name, address in names.items()]
    system_map.write_text("".join(lines))
    entry = {"socket": socket, "name": "old", "symbols": {"system_map": str(system_map)}}
    agent = CrashAgent(directory, guests=[entry])
    with agent.running():
        agent.wait_connected()
        done = run_collector("trigger", "old", "--config", agent.config)
        assert done.returncode == 0, done.stderr
    (record,) = agent.records()
    return record


def test_a_kernel_that_does_not_tell_where_its_name_is(tmp_path: Path, capsys):
    """Linux 5.10: behind a counter; its VMCOREINFO is borne out all the same."""
    image = older("x86_64")
    with BootedGuest(image, ImageStore(default_cache()).fetch(image)) as guest:
        with RawQmp(guest.qmp_sockets[1]) as qmp:
            qmp.execute("stop")
        socket = str(guest.qmp_sockets[0])
        assert qemu_dump(["info", "--qmp", socket]) == 0
        told = capsys.readouterr().out
        assert f"kernel {guest.files.release}\n" in told
        assert "the page tables of a vCPU lead to the kernel's name as it says" in told
        words = ["--qmp", socket, "-z", "-R", str(tmp_path / "dump")]
        assert dump_guest_memory(words) == 0
        record = _collected(socket, tmp_path)
    # Nor where the names of its functions are.
    assert set(record.signature.frames) == {"all_of_it"}
    capsys.readouterr()
    assert qemu_dump(["inspect", str(tmp_path / "dump")]) == 0
    told = capsys.readouterr().out
    assert re.search(rf"^  release +{re.escape(guest.files.release)}$", told, re.MULTILINE)
    assert qemu_dump(["dmesg", str(tmp_path / "dump")]) == 0
    assert image.kernel_log in capsys.readouterr().out
