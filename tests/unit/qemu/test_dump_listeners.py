from __future__ import annotations

import pytest

from qemu_dump_ext.qemu.dump_listeners import why_listeners_forbid_dumps

_OTHERS = "serial0: filename=pty:/dev/pts/3\r\nmon0: filename=unix:/run/q,server=on\r\n"
_LIBVIRT = "charmonitor: filename=unix:/run/web1/monitor.sock,server=on\r\n"


@pytest.mark.parametrize("answer", [_LIBVIRT, _OTHERS + _LIBVIRT, _LIBVIRT + _OTHERS])
def test_libvirt_is_known_by_its_monitor(answer: str):
    assert "libvirt listens" in (why_listeners_forbid_dumps(answer) or "")


@pytest.mark.parametrize("answer", ["", "unknown command: 'info chardev'\r\n", "Error: no\r\n"])
def test_who_listens_is_not_guessed(answer: str):
    assert "does not tell who listens" in (why_listeners_forbid_dumps(answer) or "")


@pytest.mark.parametrize(
    "answer", [_OTHERS, "gdb: filename=disconnected:unix:/run/stub,server=on\r\n"]
)
def test_others_may_hear_of_a_dump(answer: str):
    assert why_listeners_forbid_dumps(answer) is None


def test_a_path_that_names_libvirts_monitor_is_none():
    assert why_listeners_forbid_dumps("mon0: filename=unix:/run/charmonitor: filename=x\n") is None
