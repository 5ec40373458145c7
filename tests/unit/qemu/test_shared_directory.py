from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_dump_ext.qemu import shared_directory as module
from qemu_dump_ext.qemu.shared_directory import shared_directory

_HOLD = """
import sys
from pathlib import Path
from qemu_dump_ext.qemu import shared_directory as module
module._IN_MEMORY = Path(sys.argv[1])
with module.shared_directory() as path:
    (path / "memory0").write_bytes(b"piece")
    print(path, flush=True)
    sys.stdin.read()
"""

_COME_AND_GO = """
import os, signal, sys
from pathlib import Path
from qemu_dump_ext.qemu import shared_directory as module
module._IN_MEMORY = Path(sys.argv[1])
for number in range(int(sys.argv[2])):
    with module.shared_directory() as path:
        (path / "memory0").write_bytes(b"piece")
        if os.fork() == 0:
            with module.shared_directory():
                os.kill(os.getpid(), signal.SIGKILL)
        os.wait()
        assert (path / "memory0").read_bytes() == b"piece", number
"""


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "_IN_MEMORY", tmp_path)
    return tmp_path


@pytest.fixture
def another(parent: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has a directory."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def test_a_directory_is_private_and_removed(parent: Path):
    with shared_directory() as path:
        assert path.parent == parent
        assert path.stat().st_mode & 0o777 == 0o700
        (path / "memory0").touch()
    assert list(parent.iterdir()) == []


def test_what_a_dead_process_left_is_removed_and_nothing_else(
    parent: Path, another: subprocess.Popen[str]
):
    assert another.stdout is not None
    used = Path(another.stdout.readline().rstrip())
    unmarked = parent / "qemu-dump-unmarked"
    unmarked.mkdir()
    (unmarked / "content").touch()
    (parent / "qemu-dump-file").touch()
    (parent / "other").mkdir()
    (parent / "other" / "owner").touch()
    (parent / "qemu-dump-link").symlink_to(parent / "other")
    kept = {unmarked, *(parent / name for name in ("qemu-dump-file", "other", "qemu-dump-link"))}
    with shared_directory():
        assert (used / "memory0").exists()
    another.kill()
    another.wait()
    assert set(parent.iterdir()) == {used, *kept}
    with shared_directory() as path:
        assert set(parent.iterdir()) == {path, *kept}
    assert set(parent.iterdir()) == kept
    assert (parent / "other" / "owner").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a directory of another user")
def test_a_directory_of_another_user_is_left_alone(parent: Path):
    foreign = parent / "qemu-dump-foreign"
    foreign.mkdir()
    (foreign / "owner").touch()
    os.chown(foreign, 65534, 65534)
    with shared_directory():
        assert (foreign / "owner").exists()


def test_many_at_a_time_take_nothing_from_each_other_and_leave_nothing(parent: Path):
    """Each has a neighbour that is killed, whose directory any of them removes."""
    argv = [sys.executable, "-c", _COME_AND_GO, str(parent), "60"]
    processes = [
        subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said
    with shared_directory() as path:
        assert list(parent.iterdir()) == [path]
