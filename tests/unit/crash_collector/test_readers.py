"""What readers say of a dump that is none."""

from __future__ import annotations

import pytest

from qemu_dump_ext.crash_collector.collect.readers import ReaderError, prove_open, trace_by_drgn


def test_what_drgn_does_not_open_gives_no_trace(tmp_path):
    dump = tmp_path / "vmcore"
    dump.write_bytes(b"no dump")
    with pytest.raises(ReaderError, match=r"^drgn does not open it: .*not an ELF core file"):
        trace_by_drgn(dump, tmp_path / "vmlinux")
    assert "not an ELF core file" in str(prove_open("drgn", dump, None))
