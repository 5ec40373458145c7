from __future__ import annotations

import os

import pytest

from qemu_dump_ext.errors import DumpWriteError
from qemu_dump_ext.sinks import open_sink


def test_a_file_system_that_counts_no_blocks_has_room():
    descriptor = os.memfd_create("target")
    try:
        assert os.fstatvfs(descriptor).f_blocks == 0
        with open_sink(f"fd:{descriptor}", force=True, standard_output=None) as sink:
            sink.require_room(1 << 30)
    finally:
        os.close(descriptor)


def test_a_dump_larger_than_the_file_system_is_refused(tmp_path):
    sink = open_sink(str(tmp_path / "dump"), force=True, standard_output=None)
    with pytest.raises(DumpWriteError, match="no room for"), sink:
        sink.require_room(1 << 62)
    assert list(tmp_path.iterdir()) == []
