"""A reader of one file opens, describes and verifies; who cannot read a file says why."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_dump_ext import dump_readers
from qemu_dump_ext.cli import main
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.errors import CorruptDumpError, NotADumpError
from tests.support.toys import toy_in


def toy_dump(directory: Path, magic: bytes = b"TOY1", size: int = 6, content: bytes = b"abcdef"):
    path = directory / "dump"
    path.write_bytes(magic + struct.pack("<Q", size) + content)
    return path


@pytest.fixture(autouse=True)
def _toy() -> Iterator[None]:
    with toy_in(dump_readers):
        yield


def run(capsys, *words: str) -> tuple[int, str]:
    status = main([*words])
    return status, capsys.readouterr().out


@pytest.mark.parametrize("magic", [b"TOY1", b"TOY?"])
def test_it_opens(tmp_path, magic):
    with open_dump(toy_dump(tmp_path, magic)) as dump:
        assert (dump.format, dump.reader, dump.read(2, 3)) == ("toy", "toy", b"cde")


def test_it_describes(tmp_path, capsys):
    path = str(toy_dump(tmp_path))
    status, text = run(capsys, "inspect", "--json", path)
    assert status == 0
    facts = json.loads(text)
    assert (facts["format"], facts["colour"], facts["wheels"]) == ("toy", "red", {"front": 2})
    assert facts["memory"]["size_bytes"] == 6
    assert "colour: red" in run(capsys, "inspect", path)[1]


def test_it_verifies(tmp_path, capsys):
    path = str(toy_dump(tmp_path))
    assert run(capsys, "verify", path) == (0, "ok: 0.0 MiB of guest memory, toy\n")
    toy_dump(tmp_path, size=8)
    status, text = run(capsys, "verify", path)
    assert (status, text.splitlines()[0]) == (5, "problem: a toy of another size")


def test_whom_a_file_looks_like_says_why_it_cannot_be_read_and_nobody_else(tmp_path):
    path = toy_dump(tmp_path, size=1 << 41)
    with pytest.raises(NotADumpError) as caught:
        open_dump(path)
    reason = "no dump of a format that is read: no toy is that large"
    assert caught.value.message == f"{path}: {reason}"


@pytest.mark.parametrize("magic", [b"TOY1", b"TOY?"])
def test_damage_is_told_as_such(tmp_path, magic):
    path = toy_dump(tmp_path, magic, size=7)
    with pytest.raises(CorruptDumpError) as caught:
        open_dump(path)
    assert not isinstance(caught.value, NotADumpError)
    assert caught.value.message == f"{path}: a toy is even"
