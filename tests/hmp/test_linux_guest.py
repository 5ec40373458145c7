"""The proxy in front of a Linux guest that runs."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import BootedGuest
from tests.support.hmp_proxy import (
    HmpSocket,
    Proxy,
    assert_sound,
    hmp_of,
    partial_files,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def proxy(linux_guest: BootedGuest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("p")
    with Proxy(folder, "--qmp", linux_guest.qmp_sockets[0], "--memory", "pmemsave") as proxy:
        yield proxy


@pytest.mark.parametrize("words", ["", "-p", "-z"])
def test_dump_of_a_stopped_guest_is_that_of_qemu(
    linux_guest: BootedGuest, proxy: Proxy, tmp_path: Path, words: str
):
    ours, native = tmp_path / "ours", tmp_path / "native"
    with HmpSocket(proxy.socket) as client:
        assert client.command("stop") == ""
        try:
            assert client.command(f"dump-guest-memory {words} {ours}") == ""
            assert hmp_of(linux_guest, f"dump-guest-memory {words} {native}") == ""
        finally:
            client.command("cont")
    assert filecmp.cmp(ours, native, shallow=False)


def test_running_guest_is_dumped_and_runs_again(
    linux_guest: BootedGuest, proxy: Proxy, tmp_path: Path
):
    with HmpSocket(proxy.socket) as client, HmpSocket(proxy.socket) as leaving:
        assert client.command(f"dump-guest-memory -d -z zstd -R {tmp_path / 'dump'}") == ""
        assert client.command("info status") == "VM status: paused (save-vm)\n"
        client.wait(b"is complete\r\n(qemu) ")
        assert_sound(tmp_path / "dump")
        assert hmp_of(linux_guest, "info status") == "VM status: running\n"
        leaving.send(f"dump-guest-memory {tmp_path / 'cancelled'}\n".encode())
        wait_until(lambda: client.command("info dump").endswith("%\n"))
        leaving.close()
        wait_until(lambda: client.command("info dump") == "Status: failed\n")
    assert hmp_of(linux_guest, "info status") == "VM status: running\n"
    assert [path.name for path in tmp_path.iterdir()] == ["dump"]
    assert partial_files(tmp_path) == []
