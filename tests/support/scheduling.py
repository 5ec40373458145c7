"""Which tests one worker runs: what a file shares stays in one process, and so does a guest."""

from __future__ import annotations

import re

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

_SHARE_GUESTS = {
    f"tests/guest/test_{name}.py" for name in ("every_guest", "kernel_page_tables", "programs")
}
"""All their tests have guests, the last parameter, of which each is booted once for all files."""
_GUEST = re.compile(r"[\[-](\w+)\]$")


class _ByFileOrGuest(LoadFileScheduling):  # type: ignore[misc]
    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        guest = _GUEST.search(nodeid) if file in _SHARE_GUESTS else None
        return f"{guest[1]} guest" if guest else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _ByFileOrGuest | None:
    """Keep together what shares a guest, too, where `--dist loadfile` keeps files together."""
    return _ByFileOrGuest(config, log) if config.getoption("dist") == "loadfile" else None
