from __future__ import annotations

import os

import pytest

from qemu_dump_ext.errors import DumpWriteError
from qemu_dump_ext.sinks import _writeback as writeback
from qemu_dump_ext.sinks import open_sink
from qemu_dump_ext.sinks._writeback import Writeback


def test_a_sync_that_fails_is_told_though_a_later_one_would_not_fail(monkeypatch):
    def fail(_: int) -> None:
        raise OSError(5, "EIO")

    monkeypatch.setattr(os, "fdatasync", fail)
    flusher = Writeback(0)
    flusher.advance(64 << 20)
    with pytest.raises(OSError, match="EIO"):
        flusher.close()
    flusher.close()


def test_a_file_whose_blocks_do_not_reach_the_disk_is_not_left(monkeypatch, tmp_path):
    def fail(_: int) -> None:
        raise OSError(5, "EIO")

    monkeypatch.setattr(os, "fdatasync", fail)
    monkeypatch.setattr(writeback, "_STEP", 4096)
    path = tmp_path / "x"
    with (
        pytest.raises(DumpWriteError, match="Input/output error"),
        open_sink(str(path), force=False, standard_output=None) as sink,
    ):
        sink.write(bytes(8192))
    assert not list(tmp_path.iterdir())
