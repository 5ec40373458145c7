"""What convert, dmesg and estimate have in common: the guest in a dump, and what is lost of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_dump_ext.cli import main
from tests.support.sample_elf import Load, make_elf
from tests.support.sample_kdump import BLOCK, make_kdump, prstatus
from tests.support.sample_ranges import make_lime, ram_with_kernel

COMMANDS = {
    "convert": ("convert", "IN", "OUT"),
    "convert, with a dump level": ("convert", "IN", "OUT", "--dump-level", "31", "-z"),
    "dmesg": ("dmesg", "IN"),
    "estimate": ("estimate", "IN"),
}
VMCOREINFO = b"OSRELEASE=6.1.0\nPAGESIZE=4096\n"
ELF = make_elf([Load(0x100000, b"text" * 4096)], notes=prstatus(1))
KDUMP = make_kdump({0: b"text" * 1024}, vmcoreinfo=VMCOREINFO)


def _with_all_left_out() -> bytes:
    """The second of the two bitmaps, of one block each behind two, has nothing."""
    data = bytearray(KDUMP.data)
    assert data[3 * BLOCK] == 1
    data[3 * BLOCK] = 0
    return bytes(data)


NOTHING_IN = {
    "elf, cut": (bytes(ELF[: 64 + 2 * 56 + 500]), ": cut off or lost"),
    "elf, of notes alone": (bytes(make_elf([], notes=prstatus(1))), ""),
    "kdump, cut": (bytes(KDUMP.data[: KDUMP.page_data - 8]), ": cut off or lost"),
    "kdump, filtered": (_with_all_left_out(), ": all was left out"),
    "lime, cut": (make_lime({0: bytes(BLOCK)})[:100], ": cut off or lost"),
}


def run(capsys, name: str, path: Path, *words: str) -> tuple[int, str, str]:
    out = f"{path}.out"
    command = [{"IN": str(path), "OUT": out}.get(word, word) for word in COMMANDS[name]]
    status = main([*command, *words])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", NOTHING_IN)
def test_a_dump_without_any_memory_is_damaged(tmp_path, capsys, name, kind):
    content, why = NOTHING_IN[kind]
    path = tmp_path / "in"
    path.write_bytes(content)
    status, out, err = run(capsys, name, path)
    assert (status, out) == (5, "")
    said = (
        f"qemu-dump {name.partition(',')[0]}: nothing of the guest's memory is in the dump{why}\n"
    )
    assert err == said
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_lost_of_a_guest_is_told(tmp_path, capsys, name):
    path = tmp_path / "in"
    path.write_bytes(make_elf([Load(0, ram_with_kernel())], notes=prstatus(1))[:-3000])
    err = run(capsys, name, path)[2]
    assert (
        "incomplete: 4 KiB of guest memory (0x3ff000-0x3fffff) are not in the earlier dump" in err
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_the_target_may_be_named_and_may_not_contradict(tmp_path, capsys, name):
    path = tmp_path / "in"
    path.write_bytes(make_lime({0: b"text" * 1024}))
    status, _, err = run(capsys, name, path)
    assert (status, "nothing tells of what target the dump is (--target NAME)" in err) == (2, True)
    assert "--target" not in run(capsys, name, path, "--target", "x86_64")[2]
    path = tmp_path / "elf"
    path.write_bytes(ELF)
    status, _, err = run(capsys, name, path, "--target", "aarch64")
    assert (status, "the dump is of machine 62, and not of aarch64" in err) == (2, True)


@pytest.mark.parametrize("command", ["dmesg", "estimate"])
@pytest.mark.parametrize("word", ["--part", "--layout", "--snapshot-name", "--target"])
def test_what_is_said_of_a_dump_is_not_for_live_guests(capsys, command, word):
    assert main([command, "--qmp", "/nonexistent", word, "x86_64"]) == 2
    said = f"qemu-dump {command}: {word} is for dumps, and not for guests that are there\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("command", "word"),
    [("dmesg", "--memory"), ("estimate", "--memory"), ("dmesg", "--description")],
)
def test_what_is_said_of_a_live_guest_is_not_for_dumps(tmp_path, capsys, command, word):
    path = tmp_path / "in"
    path.write_bytes(ELF)
    assert main([command, str(path), word, "process"]) == 2
    said = f"qemu-dump {command}: {word} is for guests that are there, and not for dumps of them\n"
    assert capsys.readouterr().err == said


def test_dumps_of_windows_have_no_levels_to_estimate(tmp_path, capsys):
    path = tmp_path / "in"
    path.write_bytes(ELF)
    assert main(["estimate", "--format", "win-dmp", str(path)]) == 2
    assert "--format: invalid choice: 'win-dmp'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["convert", "dmesg", "estimate", "inspect", "verify"])
def test_a_dump_is_read_from_a_file(capsys, command, tmp_path):
    out = [str(tmp_path / "out")] if command == "convert" else []
    assert main([command, "-", *out]) == 2
    assert "a dump is read from a file, and not from standard input" in capsys.readouterr().err
