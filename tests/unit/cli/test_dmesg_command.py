from __future__ import annotations

import os
from pathlib import Path

import pytest

from qemu_dump_ext.cli import main, run_guarded
from tests.support.fake_kernel import elf_note, vmcoreinfo
from tests.support.sample_elf import Load, make_elf

TIB = 1 << 40


def test_what_the_file_does_not_hold_is_not_searched(tmp_path: Path, capsys):
    """One byte in the file, 32 TiB in memory."""
    path = tmp_path / "dump"
    path.write_bytes(make_elf([Load(0, b"a", memsz=32 * TIB + 1)]))
    assert main(["dmesg", str(path)]) == 3
    assert capsys.readouterr().err == (
        "qemu-dump dmesg: VMCOREINFO was not found in guest memory (is it a Linux guest?)\n"
    )


def test_holes_of_the_file_are_not_searched(tmp_path: Path, capsys):
    """A file of 4 TiB with a note at its end, which is found; it names no page tables."""
    path = tmp_path / "dump"
    header = make_elf([Load(0, b"", memsz=4 * TIB)])
    at = 64 + 2 * 64 + 56  # the second program header
    header[at + 8 : at + 16] = (1 << 20).to_bytes(8, "little")  # p_offset
    header[at + 32 : at + 40] = (4 * TIB).to_bytes(8, "little")  # p_filesz
    path.write_bytes(header)
    os.truncate(path, 4 * TIB + (1 << 20))
    with path.open("r+b") as file:
        file.seek(4 * TIB + (1 << 20) - 4096)
        file.write(elf_note(vmcoreinfo("6.1.0", 0)))
    assert main(["dmesg", str(path)]) == 3
    assert "does not say where the kernel's log is" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["0", "-1", "inf", "nan", "x", "9" * 400])
def test_impossible_times(word: str, capsys):
    assert main(["dmesg", "--search-seconds", word, "x"]) == 2
    assert "--search-seconds" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("leaves", "said"), [("", ""), ("nothing is left", ": nothing is left")])
def test_an_interrupt_says_no_more_than_is_true(leaves: str, said: str, capsys):
    def work() -> int:
        raise KeyboardInterrupt

    assert run_guarded("program", work, interrupted=leaves) == 130
    assert capsys.readouterr().err == f"program: interrupted{said}\n"
