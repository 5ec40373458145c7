"""What is saved of a guest is read back as it was; whatever else is in such a file is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.guest.silent import LocatedGuest
from qemu_dump_ext.qemu.qemu_processes import QemuProcess
from qemu_dump_ext.qemu.saved_guest import (
    SavedGuest,
    keep,
    kept_of,
    load,
    parse_saved_guest,
    saved_now,
)

_SAVED = SavedGuest(
    4711,
    12.5,
    "5f3c",
    1_700_000_000.0,
    LocatedGuest(
        "x86_64",
        0,
        "pc-q35-7.2-machine",
        (7, 2, 22),
        2,
        {
            RamBlock(0, 0xA0000, "pc.ram", 0): 0x7F0000000000,
            RamBlock(0xC0000, 0x40000, "pc.ram", 0xC0000): 0x7F00000C0000,
        },
    ),
)


def test_what_is_saved_is_read_back():
    assert parse_saved_guest(_SAVED.to_json().encode()) == _SAVED


def test_of_each_process_the_last_is_kept_and_nothing_of_those_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    ours = QemuProcess(os.getpid(), (), "x86_64")
    folder = tmp_path / "qemu-dump"
    keep(saved_now(ours, _SAVED.located))
    (folder / "4194305.guest").write_text(_SAVED.to_json())  # more than there can be
    keep(replace(saved_now(ours, _SAVED.located), saved=2.0**31))
    assert [path.name for path in folder.iterdir()] == [f"{os.getpid()}.guest"]
    kept = kept_of(ours)
    assert kept is not None
    assert (kept.saved, kept.located) == (2.0**31, _SAVED.located)
    keep(replace(kept, started=ours.started + 1))
    assert kept_of(ours) is None, "that was another process with this number"
    assert kept_of(QemuProcess(os.getppid(), (), "x86_64")) is None


def _with(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.__setitem__(name, value)


def _block(index: int, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["blocks"][1].__setitem__(index, value)


@pytest.mark.parametrize(
    "change",
    [
        _with("form", "something else"),
        _with("pid", -1),
        _with("pid", True),
        _with("pid", 1 << 40),
        _with("started", "now"),
        _with("boot", 3),
        _with("core", 64),
        _with("vcpus", 1 << 20),
        _with("version", [7, 2]),
        _with("version", "7.2"),
        _with("blocks", []),
        _with("blocks", [[0, 1 << 12, "ram", 0, 0]] * 5000),
        _with("blocks", [[0, 1 << 12]]),
        _block(0, 0x9F000),  # in the block before
        _block(1, 0),
        _block(1, 1 << 64),
        _block(2, "n" * 1000),
        _block(3, None),
        _block(4, 1 << 63),  # the kernel's
    ],
)
def test_what_no_guest_is_is_refused(change: Callable[[dict[str, Any]], object]):
    content = json.loads(_SAVED.to_json())
    change(content)
    with pytest.raises(ValueError, match=r"."):
        parse_saved_guest(json.dumps(content).encode())


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b" " * (2 << 20)])
def test_another_file_is_refused_in_words(tmp_path: Path, text: bytes):
    path = tmp_path / "file"
    path.write_bytes(text)
    with pytest.raises(RequestError, match="is no description of a guest"):
        load(path)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path):
    with pytest.raises(RequestError, match="cannot read"):
        load(tmp_path / "absent")
    with pytest.raises(RequestError, match="directory"):
        load(tmp_path)
