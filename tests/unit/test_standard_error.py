from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from qemu_dump_ext.errors import DumpWriteError
from qemu_dump_ext.sinks import open_sink
from tests.support.doors import child_environment
from tests.support.sample_elf import Load, make_elf


def refuse(path: Path, **_: bool) -> None:
    raise OSError(122, os.strerror(122), str(path))


_SAY = "import sys; from qemu_dump_ext.standard_error import *; fill_standard_descriptors();"


def run(script: str, shell: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {shell}', sys.executable, script],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
    )


@pytest.mark.parametrize("shell", ["2>&-", "2>/dev/full", "2> >(exec true)", ""])
def test_whoever_hears_it_the_status_is_the_same(shell: str):
    script = f"{_SAY} [tell('x' * 1000) for _ in range(200)]; is_terminal(); sys.exit(3)"
    done = run(script, shell)
    assert done.returncode == 3
    assert done.stdout == ""


def test_closed_numbers_are_filled_and_take_nothing():
    script = (
        f"{_SAY} import os; fd = os.open('/', os.O_RDONLY); assert fd == 3, fd\n"
        "for number in (1, 2):\n"
        "    try: os.write(number, b'x')\n"
        "    except OSError: continue\n"
        "    sys.exit(9)\n"
    )
    assert run(script, "0<&- 1>&- 2>&-").returncode == 0


@pytest.mark.parametrize("command", ["inspect", "verify", "dmesg"])
def test_a_dump_is_looked_at_without_standard_error(tmp_path: Path, command: str):
    path = tmp_path / "dump"
    path.write_bytes(make_elf([Load(0x1000, b"a" * 5000)]))
    main = (
        "import sys; from qemu_dump_ext.entry import qemu_dump as run;"
        f" sys.argv[1:] = ['{command}', '{path}']; sys.exit(run())"
    )
    with_it, without = run(main, ""), run(main, "2>&-")
    assert (with_it.returncode, with_it.stdout) == (without.returncode, without.stdout)


def test_a_partial_dump_that_cannot_be_removed_is_told(tmp_path, monkeypatch):
    """As where a quota does not allow a directory to change."""
    failure = DumpWriteError("no room", hint="-z takes less")
    with (
        suppress(DumpWriteError),
        open_sink(str(tmp_path / "dump"), force=False, standard_output=None) as sink,
    ):
        sink.write(b"x")
        monkeypatch.setattr(Path, "unlink", refuse)
        raise failure
    (left,) = tmp_path.iterdir()
    assert str(failure) == (
        f"no room; {left} was left behind, it cannot be removed: Disk quota exceeded"
        " (-z takes less)"
    )


def test_a_complete_dump_of_two_names_is_complete(tmp_path, monkeypatch):
    with open_sink(str(tmp_path / "dump"), force=False, standard_output=None) as sink:
        sink.write(b"x")
        monkeypatch.setattr(Path, "unlink", refuse)
    assert (tmp_path / "dump").read_bytes() == b"x"
    (remark,) = sink.remarks
    assert "is complete; its other name" in remark
    assert remark.endswith("Disk quota exceeded")
