from __future__ import annotations

import pytest

from qemu_dump_ext.qemu.address import format_tcp_address, is_loopback, socket_address, tcp_address


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/run/x", None),
        ("x", None),
        ("/run/x:5", None),
        ("unix:/run/x", None),
        ("unix:x:5", None),
        ("host:", None),
        ("host:65536", None),
        ("host:-1", None),
        ("host:٣", None),
        ("localhost:5", ("localhost", 5)),
        (":5", ("localhost", 5)),
        ("[::1]:5", ("::1", 5)),
        ("::1:5", ("::1", 5)),
        ("tcp:host:5", ("host", 5)),
        ("tcp6:[fe80::1%eth0]:5", ("fe80::1%eth0", 5)),
    ],
)
def test_address(address: str, expected: tuple[str, int] | None):
    assert tcp_address(address) == expected


def test_a_path_is_what_is_no_address_of_tcp():
    assert socket_address("unix:/run/x") == "/run/x"
    assert socket_address("/run/x:5") == "/run/x:5"
    assert socket_address("[::1]:5") == ("::1", 5)


@pytest.mark.parametrize("host", ["::1", "127.0.0.1", "localhost"])
def test_an_address_that_was_written_is_read(host: str):
    assert tcp_address(format_tcp_address(host, 5)) == (host, 5)


def test_loopback():
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert not is_loopback("0.0.0.0")  # noqa: S104 - that is what is refused
