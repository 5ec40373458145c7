"""`collect_crash` of a Linux guest."""

from __future__ import annotations

import pytest

from qemu_dump_ext.crash_collector.collect_now import collect_crash
from qemu_dump_ext.crash_collector.record import parse_record
from tests.support.doors import guest_status

pytestmark = pytest.mark.guest


def test_log_and_dump_of_a_running_guest_are_stored(linux_guest, tmp_path):
    before = guest_status(linux_guest)
    where = collect_crash(
        linux_guest.qmp_sockets[0], tmp_path, name="linux", console=linux_guest.console_log
    )
    assert guest_status(linux_guest) == before == "running"
    record = parse_record((where / "crash.json").read_bytes())
    assert record.dump.complete
    assert record.dump.verified_by == ("verify",)
    assert "Linux version" in (where / "dmesg.txt").read_text()
    assert (where / "console.txt").stat().st_size > 0
