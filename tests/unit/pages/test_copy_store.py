"""Room for copies of guest memory: what is promised to one is not promised to another."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_dump_ext.pages import _copy_store as copy_store

_MIB = 1 << 20


def test_copies_at_the_same_time_share_what_is_available(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(copy_store, "available_memory", lambda: 10 * _MIB)
    first, where = copy_store.open_copy_store(4 * _MIB, tmp_path)
    assert where == "in memory"
    second, where = copy_store.open_copy_store(4 * _MIB, tmp_path)
    assert where.startswith("in a nameless file")
    second.close()
    first.close()
    first.close()
    third, where = copy_store.open_copy_store(4 * _MIB, tmp_path)
    assert where == "in memory"
    third.close()
