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


def test_every_candidate_says_why_it_cannot(tmp_path):
    path = toy_dump(tmp_path, size=1 << 41)
    begins = "it does not begin like one"
    with pytest.raises(NotADumpError) as caught:
        open_dump(path)
    assert f"elf: {begins}; kdump: {begins}; libvirt_save: {begins}; " in caught.value.message
    assert "; toy: no toy is that large" in caught.value.message


def test_damage_is_told_by_who_is_sure(tmp_path):
    with pytest.raises(CorruptDumpError) as caught:
        open_dump(toy_dump(tmp_path, size=7))
    assert caught.value.message == "a toy is even"
    with pytest.raises(NotADumpError, match="toy: a toy is even"):
        open_dump(toy_dump(tmp_path, b"TOY?", size=7))
