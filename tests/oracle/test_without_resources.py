"""A host that has none of what a dump takes: one line, and the guest runs again."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.support.doors import child_environment, cli_argv, guest_status
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can limit itself so"),
]

_OTHER_USER = 100_000 + os.getpid()
"""Of nobody, nor of tests beside these: a limit of processes does not hold for root, and counts all
those of a user."""
_AS_OTHER_USER = (
    *("setpriv", f"--reuid={_OTHER_USER}", f"--regid={_OTHER_USER}", "--clear-groups"),
    *("--inh-caps=+dac_override", "--ambient-caps=+dac_override"),
)
_NO_MORE = re.compile(r"cannot start .*(no more|Resource temporarily unavailable)")
_SMALL = "mount -t tmpfs -o size=64k tmpfs"


@pytest.fixture(scope="module")
def machine() -> Iterator[QemuMachine]:
    with QemuMachine(["qemu-system-x86_64"], ["-m", "64", "-display", "none"]) as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("cont")
        yield machine


def dump(argv: Sequence[str], machine: QemuMachine, folder: Path, *words: str) -> tuple[int, str]:
    """Dump into `folder`, where only a whole dump may be left; return status and what is said."""
    done = _dump_limited(argv, machine, folder, *words)
    assert guest_status(machine) == "running"
    if done.returncode:
        assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def _dump_limited(
    argv: Sequence[str], machine: QemuMachine, folder: Path, *words: str
) -> subprocess.CompletedProcess[str]:
    path = folder / "dump"
    done = subprocess.run(
        [*argv, *cli_argv("--qmp", machine.qmp_sockets[0], *words, path)],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(TMPDIR=str(folder), OPENBLAS_NUM_THREADS=None),
        timeout=300,
    )
    if done.returncode:
        assert list(folder.iterdir()) == []
    else:
        assert list(folder.iterdir()) == [path]
        path.unlink()
    return done


@pytest.mark.parametrize("words", [(), ("-z", "--threads", "4")], ids=["elf", "kdump"])
def test_any_number_of_processes(machine: QemuMachine, tmp_path: Path, words: Sequence[str]):
    statuses = []
    for number in range(1, 9):
        limited = [*_AS_OTHER_USER, "prlimit", f"--nproc={number}"]
        status, said = dump(limited, machine, tmp_path, *words)
        assert status in {0, 3}, said
        assert status == 0 or _NO_MORE.search(said), said
        statuses.append(status)
    assert statuses[0] == 3
    assert statuses == sorted(statuses, reverse=True)
    assert statuses[4:] == [0] * 4, "fewer threads do the same, more slowly"


@pytest.mark.parametrize("words", [(), ("-z",), ("-z", "-R"), ("--snapshot",)])
def test_files_of_limited_size(machine: QemuMachine, tmp_path: Path, words: Sequence[str]):
    status, said = dump(["prlimit", "--fsize=100000"], machine, tmp_path, *words)
    assert status == 4
    assert said.endswith(": File too large\n")


@pytest.mark.parametrize("number", [6, 8, 10, 12, 16])
def test_any_number_of_descriptors(machine: QemuMachine, tmp_path: Path, number: int):
    status, said = dump(["prlimit", f"--nofile={number}"], machine, tmp_path, "-z")
    assert status in {0, 3, 4}
    assert status == 0 or "Too many open files" in said


@pytest.mark.parametrize(
    "kib", [48_128, 49_152, 56_320, 60_416, 112_640, 122_880, 256_000, 271_360, 291_840, 307_200]
)
def test_hardly_memory_enough(machine: QemuMachine, tmp_path: Path, kib: int):
    """A thread or a library that hangs, or ends the process, without memory is not begun."""
    done = _dump_limited(["prlimit", f"--as={kib << 10}"], machine, tmp_path, "-z")
    assert done.returncode in {0, 3, 4}, done.stderr
    if done.returncode:
        assert len(done.stderr.splitlines()) == 1, done.stderr
    # Which the guardian has seen to where there was no memory left for that.
    wait_until(lambda: guest_status(machine) == "running", "the guest runs again")


def mounted(script: str) -> list[str]:
    """Return what runs a program where `script` has mounted something; nobody else sees it."""
    return ["unshare", "--mount", "sh", "-c", f'{script} && exec "$@"', "sh"]


@pytest.mark.parametrize(
    ("script", "words", "status", "says"),
    [
        ("mount -t tmpfs tmpfs /proc", (), 0, ""),
        ("mount -t tmpfs tmpfs /proc", ("--snapshot",), 0, ""),
        ("mount -t tmpfs tmpfs /proc", ("--memory", "process"), 3, "cannot look at /proc/self/fd"),
        ("mount -t tmpfs tmpfs /proc", ("--memory", "backing_file"), 3, "cannot look at /proc"),
        ("mount -t tmpfs tmpfs /dev", ("-z",), 0, ""),
        ("mount -t tmpfs tmpfs /dev", ("--memory", "pmemsave"), 0, "memory by pmemsave"),
        (f"{_SMALL} /dev/shm", ("--memory", "pmemsave"), 0, "memory by pmemsave"),
        ("mount -t tmpfs -o ro tmpfs /dev/shm", ("--memory", "pmemsave"), 0, "by pmemsave"),
    ],
)
def test_without_a_part_of_the_file_system(
    machine: QemuMachine,
    tmp_path: Path,
    script: str,
    words: Sequence[str],
    status: int,
    says: str,
):
    ended, said = dump(mounted(script), machine, tmp_path, *words)
    assert ended == status
    assert says in said


def test_no_room_for_what_qemu_hands_over(machine: QemuMachine, tmp_path: Path):
    """Neither in memory nor in the folder for temporary files; another source has it."""
    small = f"{_SMALL} /dev/shm && {_SMALL} /var/tmp && export TMPDIR=/var/tmp"
    status, said = dump(mounted(small), machine, tmp_path, "--memory", "pmemsave")
    assert status == 3
    assert "/dev/shm and /var/tmp have less room than the 16 MiB that QEMU's files take" in said
    assert dump(mounted(small), machine, tmp_path, "--memory", "auto")[0] == 0


@pytest.mark.parametrize("words", [("-z",), ("-z", "-R"), ()])
def test_no_room_for_the_dump(machine: QemuMachine, tmp_path: Path, words: Sequence[str]):
    small = f"{_SMALL} {shlex.quote(str(tmp_path))}"
    status, said = dump(mounted(small), machine, tmp_path, *words)
    assert status == 4
    assert "No space left on device" in said or "no room for" in said


@pytest.mark.parametrize("shell", ["2>&-", "2> >(exec true)", "2>/dev/full"])
@pytest.mark.parametrize("words", [(), ("--progress", "always"), ("--json",)], ids=str)
def test_nobody_hears_of_the_dump(
    machine: QemuMachine, tmp_path: Path, shell: str, words: Sequence[str]
):
    """The dump is complete, and the status says so."""
    path = tmp_path / "dump"
    command = [*cli_argv("--qmp", machine.qmp_sockets[0], "-z", *words, path)]
    stdout = "1> >(exec true)" if "--json" in words else ""
    done = subprocess.run(
        ["bash", "-c", f'"$@" {stdout} {shell}', "bash", *command],
        stdout=subprocess.PIPE,
        check=False,
        env=child_environment(),
        timeout=300,
    )
    assert guest_status(machine) == "running"
    assert done.returncode == 0
    assert done.stdout == b""
    with open_dump(path) as dump:
        assert not verify_dump(dump).problems
