from __future__ import annotations

import socket
from pathlib import Path

import pytest

from qemu_dump_ext.errors import ConnectError
from qemu_dump_ext.qemu.address import (
    bindable,
    connectable,
    format_tcp_address,
    is_loopback,
    tcp_address,
)


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


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("unix:/run/x", "/run/x"),
        ("/run/x:5", "/run/x:5"),
        ("/" + "x" * 106, "/" + "x" * 106),
        ("[::1]:5", ("::1", 5)),
    ],
)
def test_what_a_socket_is_connected_to(address: str, expected: object):
    with connectable(address) as target:
        assert target == expected


@pytest.mark.parametrize("name", ["s", "é" * 40])
def test_a_path_that_is_longer_than_an_address(tmp_path: Path, name: str):
    path = tmp_path / ("d" * 100) / name
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as client:
        with bindable(path) as where:
            listening.bind(where)
        assert path.is_socket()
        listening.listen()
        with connectable(f"unix:{path}") as target:
            client.connect(target)


def test_what_is_not_there_by_a_path_that_is_longer_than_an_address(tmp_path: Path):
    with pytest.raises(FileNotFoundError), connectable(str(tmp_path / ("d" * 120))):
        pass
    with pytest.raises(FileNotFoundError), bindable(tmp_path / ("d" * 120) / "s"):
        pass
    with pytest.raises(ConnectError, match="the name of a socket has at most"):
        bindable(tmp_path / ("d" * 120)).__enter__()


@pytest.mark.parametrize("host", ["::1", "127.0.0.1", "localhost"])
def test_an_address_that_was_written_is_read(host: str):
    assert tcp_address(format_tcp_address(host, 5)) == (host, 5)


def test_loopback():
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert not is_loopback("0.0.0.0")  # noqa: S104 - that is what is refused
