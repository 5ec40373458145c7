from __future__ import annotations

import pytest

from qemu_dump_ext.crash_collector.watch.patience import Patience
from qemu_dump_ext.errors import SourceError


@pytest.fixture
def seconds() -> list[float]:
    """What a clock shows."""
    return [100.0]


def test_time_is_over_behind_the_limit_and_counts_from_the_beginning(seconds):
    patience = Patience(15, 5, lambda: seconds[0])
    seconds[0] += 1000
    patience.check()
    patience.begin()
    seconds[0] += 14.9
    patience.check()
    seconds[0] += 0.2
    with pytest.raises(SourceError, match=r"not done within 15 s \(collection_timeout\)"):
        patience.check()


def test_qemu_is_slow_that_was_waited_for_too_long_altogether(seconds):
    patience = Patience(15, 5, lambda: seconds[0])
    patience.begin()
    seconds[0] += 14  # of our own work
    found = [patience.is_slow]
    for _ in range(3):
        with patience.waiting():
            found.append(patience.is_slow)
            seconds[0] += 2
            found.append(patience.is_slow)
    assert found == [False, False, False, False, False, False, True]
    assert patience.is_slow


@pytest.mark.parametrize(
    "command",
    [
        *("cont", "query-status", "query-migrate"),
        *("migrate_cancel", "migrate-set-capabilities", "closefd"),
    ],
)
def test_what_ends_a_pause_or_a_stream_is_asked_when_the_time_is_over(seconds, command):
    patience = Patience(15, 5, lambda: seconds[0])
    patience.begin()
    seconds[0] += 16
    with patience.asking(command):
        pass
    with pytest.raises(SourceError, match="collection_timeout"), patience.asking("getfd"):
        pass
