"""`dump-guest-memory` at the proxy: QEMU's syntax, QEMU's words, QEMU's file."""

from __future__ import annotations

import filecmp
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from tests.conftest import loaded_content
from tests.support.hmp_proxy import (
    HmpSocket,
    Proxy,
    assert_sound,
    hmp_of,
    monitor_arguments,
    partial_files,
)
from tests.support.newer_qemu import newer_qemu_command, refusal_of_own_qemu
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu

IN_PROCESS = "Error: There is a dump in process, please wait.\n"


@dataclass(frozen=True)
class Bench:
    """A machine whose monitor is reached directly, and through the proxy."""

    machine: QemuMachine
    proxy: Proxy
    direct: HmpSocket
    proxied: HmpSocket


@pytest.fixture(scope="module", params=["7.2", "11"])
def bench(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("m")
    command = ["qemu-system-x86_64"] if request.param == "7.2" else newer_qemu_command()
    arguments = [*loaded_content(folder), *monitor_arguments(folder / "monitor")]
    with (
        stopped_machine(command, arguments) as machine,
        Proxy(folder, "--qmp", machine.qmp_sockets[0]) as proxy,
        HmpSocket(folder / "monitor") as direct,
        HmpSocket(proxy.socket) as proxied,
    ):
        yield Bench(machine, proxy, direct, proxied)


@pytest.mark.parametrize(
    "line",
    [
        "dump-guest-memory {}",
        "dump-guest-memory -p {}",
        "dump-guest-memory -z {}",
        "  dump-guest-memory\t-z  {}".replace("\t", " "),
        'dump-guest-memory "{}"',
        "dump-guest-memory {} 0x100000 0x3000",
        "dump-guest-memory {} 1024*1024+0x1000 (2 + 1)*16",
        "dump-guest-memory -p {} $pc&0 0x2000",
    ],
)
def test_file_is_that_of_qemu(bench: Bench, tmp_path: Path, line: str):
    ours, native = tmp_path / "ours", tmp_path / "native"
    assert bench.proxied.command(line.format(ours)) == ""
    assert bench.direct.command(line.format(native)) == ""
    assert native.stat().st_size
    assert filecmp.cmp(ours, native, shallow=False)
    assert bench.proxied.command("info dump") == "Status: completed\n"


def test_raw_kdump_is_that_of_qemu_where_qemu_has_it(bench: Bench, tmp_path: Path):
    ours, native = tmp_path / "ours", tmp_path / "native"
    assert bench.proxied.command(f"dump-guest-memory -z -R {ours}") == ""
    assert_sound(ours)
    if not bench.direct.command(f"dump-guest-memory -z -R {native}"):
        assert filecmp.cmp(ours, native, shallow=False)


@pytest.mark.parametrize("words", ["{}/no/such/folder", "{}", '"{}/x', "{}/x 0 0", "/dev/full"])
def test_refusal_leaves_nothing_behind(bench: Bench, tmp_path: Path, words: str):
    assert bench.proxied.command("dump-guest-memory " + words.format(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        ("aarch64", ["-M", "virt", "-cpu", "cortex-a57"]),
        ("s390x", []),
        ("riscv64", ["-M", "virt", "-bios", "none"]),
    ],
)
def test_file_is_that_of_qemu_on_other_targets(tmp_path: Path, target: str, arguments: list[str]):
    program = shutil.which(f"qemu-system-{target}")
    if program is None:
        pytest.skip(f"qemu-system-{target} is not installed")
    ours, native = tmp_path / "ours", tmp_path / "native"
    with (
        stopped_machine([program], arguments) as machine,
        Proxy(tmp_path, "--qmp", machine.qmp_sockets[0]) as proxy,
        HmpSocket(proxy.socket) as client,
    ):
        assert client.command(f"dump-guest-memory -z {ours}") == ""
        assert hmp_of(machine, f"dump-guest-memory -z {native}") == ""
    assert filecmp.cmp(ours, native, shallow=False)


def test_target_that_we_do_not_know_is_left_to_qemu(tmp_path: Path):
    program = shutil.which("qemu-system-tricore")
    if program is None:
        pytest.skip("qemu-system-tricore is not installed")
    with (
        stopped_machine([program], ["-M", "tricore_testboard"]) as machine,
        Proxy(tmp_path, "--qmp", machine.qmp_sockets[0]) as proxy,
        HmpSocket(proxy.socket) as client,
    ):
        answer = client.command(f"dump-guest-memory {tmp_path / 'dump'}")
    assert answer == f"Error: {refusal_of_own_qemu()}\n"


def test_what_we_add(bench: Bench, tmp_path: Path):
    additions = (
        *(
            "-z zstd",
            "-z none -R",
            "-l",
            "-s",
            "--mended",
            "--memory pmemsave -z lzo",
            "--snapshot",
        ),
        "--dump-level 31 -l",
        "--mini",
        "-z zstd --mini=smallest",
        "--max-bytes 1GiB -z",
    )
    for index, words in enumerate(additions):
        path = tmp_path / f"dump{index}"
        assert bench.proxied.command(f"dump-guest-memory {words} {path}") == ""
        assert_sound(path)
    answer = bench.proxied.command(f"dump-guest-memory --memory nosuch {tmp_path / 'x'}")
    assert answer.startswith("Error: --memory: one of ")
    answer = bench.proxied.command(f"dump-guest-memory --dump-level 32 {tmp_path / 'x'}")
    assert answer == "Error: --dump-level: '32' is no dump level from 0 to 31\n"
    answer = bench.proxied.command(f"dump-guest-memory --mini=tiny {tmp_path / 'x'}")
    assert answer == "Error: --mini: one of usual, smallest expected\n"
    answer = bench.proxied.command(f"dump-guest-memory --max-bytes 2GB {tmp_path / 'x'}")
    assert answer.startswith("Error: --max-bytes: '2GB' is no size: a size is a number of bytes")
    answer = bench.proxied.command(f"dump-guest-memory --max-bytes 1KiB {tmp_path / 'x'}")
    assert answer == "Error: given up: the dump takes more than 1024 bytes\n"
    answer = bench.proxied.command(f"dump-guest-memory --exact --mini {tmp_path / 'x'}")
    assert answer.startswith("Error: QEMU has no mini dumps")
    answer = bench.proxied.command(f"dump-guest-memory --dump-level 31! {tmp_path / 'x'}")
    assert answer.startswith("Error: there is no VMCOREINFO")
    assert not (tmp_path / "x").exists()


def test_native_reaches_that_of_qemu(bench: Bench, tmp_path: Path):
    ours, native = tmp_path / "ours", tmp_path / "native"
    assert bench.proxied.command(f"dump-guest-memory -z --native {native}") == ""
    assert native.stat().st_mode & 0o777 == 0o400
    assert bench.proxied.command(f"dump-guest-memory -z {ours}") == ""
    assert ours.stat().st_mode & 0o777 == 0o600
    assert filecmp.cmp(ours, native, shallow=False)


def test_existing_file_is_replaced_as_by_qemu(bench: Bench, tmp_path: Path):
    ours = tmp_path / "ours"
    ours.write_bytes(b"before" * 100)
    assert bench.proxied.command(f"dump-guest-memory {ours}") == ""
    assert ours.read_bytes().startswith(b"\x7fELF")


def test_relative_name_is_relative_to_qemu(bench: Bench):
    here = Path(f"/proc/{bench.machine.pid}/cwd").readlink()
    name = f".test-{bench.machine.pid}"
    try:
        assert bench.proxied.command(f"dump-guest-memory {name} 0 16") == ""
        assert (here / name).is_file()
    finally:
        (here / name).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A machine that takes a second to dump, and runs."""
    folder = tmp_path_factory.mktemp("m")
    arguments = ["-M", "q35", "-m", "768", *monitor_arguments(folder / "monitor")]
    with (
        stopped_machine(["qemu-system-x86_64"], arguments) as machine,
        Proxy(folder, "--qmp", machine.qmp_sockets[0], "--memory", "pmemsave") as proxy,
        HmpSocket(folder / "monitor") as direct,
        HmpSocket(proxy.socket) as proxied,
    ):
        direct.command("cont")
        yield Bench(machine, proxy, direct, proxied)


def _assert_as_before(bench: Bench, folder: Path) -> None:
    assert hmp_of(bench.machine, "info status") == "VM status: running\n"
    assert partial_files(folder) == []


def _wait_for_pages(client: HmpSocket) -> None:
    wait_until(lambda: client.command("info dump").endswith("%\n"))
    wait_until(lambda: "Finished: 0.00 %" not in client.command("info dump"))


def test_running_guest_runs_again(slow: Bench, tmp_path: Path):
    assert slow.proxied.command(f"dump-guest-memory {tmp_path / 'dump'}") == ""
    _assert_as_before(slow, tmp_path)


def test_detached_dump(slow: Bench, tmp_path: Path):
    path = tmp_path / "dump"
    with HmpSocket(slow.proxy.socket) as other:
        assert slow.proxied.command(f"dump-guest-memory -d {path}") == ""
        assert slow.proxied.command("info status") == "VM status: paused (save-vm)\n"
        for refused in ("cont", "stop", "c", "s", f"dump-guest-memory {path}"):
            assert other.command(refused) == IN_PROCESS
        assert other.command(f"dump-guest-memory --native {path}2") == IN_PROCESS
        _wait_for_pages(other)
        assert re.match(r"\d+\.\d+\.\d+", other.command("info version"))
        told = slow.proxied.wait(b"is complete\r\n(qemu) ")
        assert told == f"\r\x1b[Kdump-guest-memory: {path} is complete\r\n(qemu) ".encode()
        assert other.command("info dump") == "Status: completed\n"
    assert_sound(path)
    _assert_as_before(slow, tmp_path)


def test_dump_is_cancelled(slow: Bench, tmp_path: Path):
    path = tmp_path / "dump"
    with HmpSocket(slow.proxy.socket) as other:
        slow.proxied.send(f"dump-guest-memory {path}\n".encode())
        _wait_for_pages(other)
        assert other.command("dump-cancel") == ""
        assert slow.proxied.wait().endswith(b"\r\nError: dump: cancelled\r\n(qemu) ")
        assert other.command("info dump") == "Status: failed\n"
        assert other.command("dump-cancel") == "Error: There is no dump in process.\n"
    assert not path.exists()
    _assert_as_before(slow, tmp_path)


def test_client_gone_cancels_its_foreground_dump(slow: Bench, tmp_path: Path):
    path = tmp_path / "dump"
    with HmpSocket(slow.proxy.socket) as leaving:
        leaving.send(f"dump-guest-memory {path}\n".encode())
        _wait_for_pages(slow.proxied)
    wait_until(lambda: slow.proxied.command("info dump") == "Status: failed\n")
    assert not path.exists()
    _assert_as_before(slow, tmp_path)


def test_client_gone_leaves_its_detached_dump(slow: Bench, tmp_path: Path):
    path = tmp_path / "dump"
    with HmpSocket(slow.proxy.socket) as leaving:
        leaving.command(f"dump-guest-memory -d {path}")
    wait_until(lambda: slow.proxied.command("info dump") == "Status: completed\n")
    assert_sound(path)
    _assert_as_before(slow, tmp_path)


def test_end_of_input_is_not_the_end_of_the_client(slow: Bench, tmp_path: Path):
    """As with `echo dump-guest-memory FILE | socat - UNIX-CONNECT:...`."""
    import socket  # noqa: PLC0415

    path = tmp_path / "dump"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(slow.proxy.socket))
        client.sendall(f"dump-guest-memory {path}\n".encode())
        client.shutdown(socket.SHUT_WR)
        while client.recv(1 << 16):
            pass
    assert_sound(path)
    _assert_as_before(slow, tmp_path)


def test_qemu_dumps_meanwhile(slow: Bench, tmp_path: Path):
    """A native dump that is in process is a dump in process for us as well."""
    native = tmp_path / "native"
    assert slow.proxied.command(f"dump-guest-memory --native -d -z {native}") == ""
    answers = slow.proxied.command(f"dump-guest-memory {tmp_path / 'ours'}")
    assert answers in ("", IN_PROCESS)
    wait_until(lambda: "active" not in slow.proxied.command("info dump"))
    # QEMU says that its dump is complete, and then lets the guest run.
    wait_until(lambda: hmp_of(slow.machine, "info status") == "VM status: running\n")
    _assert_as_before(slow, tmp_path)


def test_proxy_ends_in_the_middle(slow: Bench, tmp_path: Path):
    path = tmp_path / "dump"
    (tmp_path / "other").mkdir()
    slow.proxied.close()
    with (
        Proxy(tmp_path / "other", "--hmp", slow.proxy.socket, "--memory", "pmemsave") as second,
        HmpSocket(second.socket) as client,
        HmpSocket(slow.proxy.socket) as watching,
    ):
        client.send(f"dump-guest-memory {path}\n".encode())
        wait_until(lambda: partial_files(tmp_path))
        wait_until(lambda: "paused" in watching.command("info status"))
        assert second.stop()[0] == 130
    assert not path.exists()
    _assert_as_before(slow, tmp_path)


def test_a_target_that_qemu_refuses_is_dumped(tmp_path: Path):
    ours, native = tmp_path / "ours", tmp_path / "native"
    command = "qemu-system-or1k"
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not installed")
    with (
        stopped_machine([command]) as machine,
        Proxy(tmp_path, "--qmp", machine.qmp_sockets[0]) as proxy,
        HmpSocket(proxy.socket) as client,
    ):
        refusal = client.command(f"dump-guest-memory --native {native}")
        assert refusal == f"Error: {refusal_of_own_qemu()}\n"
        client.command(f"dump-guest-memory {ours}")
        assert ours.read_bytes()[:4] == b"\x7fELF"
