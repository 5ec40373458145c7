"""A guest's driver from outside: QEMU's qtest protocol reaches ports, PCI and memory of a machine.

The vCPUs need not run for it: a stopped machine plugs memory all the same.

Source: QEMU softmmu/qtest.c for the protocol; virtio 1.2, sections 2.7 (split virtqueues), 4.1.4
(PCI capabilities, common configuration) and 5.15 (memory device).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.support.waiting import SECONDS, wait_until

_CONFIG_ADDRESS, _CONFIG_DATA = 0xCF8, 0xCFC
_COMMAND, _BARS, _CAPABILITIES = 0x04, 0x10, 0x34
_MEMORY_AND_BUS_MASTER = 6
ROM_BAR = 8
_ROM_ENABLED = 1
_VENDOR_CAPABILITY = 9
_COMMON, _NOTIFY = 1, 2
_VERSION_1, _UNPLUGGED_INACCESSIBLE = 1 << 32, 1 << 1
_QUEUE_SIZE = 8
_PAGE = 0x1000
_NEXT, _WRITE = 1, 2
_PLUG, _UNPLUG = 0, 1
_ACKNOWLEDGED = 0


def qtest_arguments(path: Path) -> list[str]:
    """Return what makes QEMU serve its qtest protocol at `path`, whatever runs the vCPUs."""
    return ["-qtest", f"unix:{path},server=on,wait=off", "-qtest-log", "/dev/null"]


@dataclass(frozen=True)
class Board:
    """Where a machine has what a driver of its first PCI bus needs.

    Attributes:
        bars_at: Room for BARs.
        queue_at: RAM that nobody uses.
        ecam_at: The configuration of its devices; None: it is reached by ports.
    """

    bars_at: int
    queue_at: int
    ecam_at: int | None = None


PC = Board(bars_at=0xD0000000, queue_at=0x10000)
ARM_VIRT = Board(bars_at=0x10000000, queue_at=0x40010000, ecam_at=0x4010000000)


class Qtest:
    """Connected to a machine's qtest socket."""

    def __init__(self, path: Path, board: Board = PC) -> None:
        self.board = board
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")

    def ask(self, command: str) -> str:
        """Return what is behind the OK of an answer."""
        self._socket.sendall(command.encode() + b"\n")
        while (line := self._lines.readline().decode().rstrip()).startswith("IRQ"):
            pass
        assert line.startswith("OK"), f"{command}: {line}"
        return line.removeprefix("OK").strip()

    def read(self, address: int, size: int) -> bytes:
        """Return guest physical memory."""
        return bytes.fromhex(self.ask(f"read {address:#x} {size:#x}").removeprefix("0x"))

    def write(self, address: int, data: bytes) -> None:
        """Change guest physical memory, or registers of a device in it."""
        self.ask(f"write {address:#x} {len(data):#x} 0x{data.hex()}")

    def pci_config(self, slot: int, register: int) -> int:
        """Return 32 bits of the configuration of a device on the first PCI bus."""
        if self.board.ecam_at is not None:
            return int.from_bytes(self.read(self._ecam(slot, register), 4), "little")
        self._select(slot, register)
        return int(self.ask(f"inl {_CONFIG_DATA:#x}"), 16)

    def set_pci_config(self, slot: int, register: int, value: int) -> None:
        """Change 32 bits of it."""
        if self.board.ecam_at is not None:
            self.write(self._ecam(slot, register), value.to_bytes(4, "little"))
            return
        self._select(slot, register)
        self.ask(f"outl {_CONFIG_DATA:#x} {value:#x}")

    def _ecam(self, slot: int, register: int) -> int:
        return (self.board.ecam_at or 0) + (slot << 15) + (register & 0xFC)

    def _select(self, slot: int, register: int) -> None:
        self.ask(f"outl {_CONFIG_ADDRESS:#x} {1 << 31 | slot << 11 | register & 0xFC:#x}")

    def map_bar(self, slot: int, bar: int, address: int) -> None:
        """Put a memory BAR where the guest can reach it."""
        enabled = _ROM_ENABLED if bar == ROM_BAR else 0
        self.set_pci_config(slot, _BARS + 4 * bar, address | enabled)
        self.set_pci_config(slot, _COMMAND, _MEMORY_AND_BUS_MASTER)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()


class VirtioMem:
    """The driver of a virtio-mem-pci device."""

    def __init__(self, qtest: Qtest, slot: int, memory_at: int, block_size: int) -> None:
        """Take the device at a PCI slot of the first bus.

        Args:
            qtest: Of the machine.
            slot: The device's `addr`.
            memory_at: The device's `memaddr`.
            block_size: The device's `block-size`.
        """
        self._qtest = qtest
        self._memory_at = memory_at
        self._block_size = block_size
        self._requests = 0
        first = qtest.board.queue_at
        self._descriptors, self._available, self._used, self._asked, self._answered = range(
            first, first + 5 * _PAGE, _PAGE
        )
        places = dict(self._capabilities(slot))
        self._common, _ = places[_COMMON]
        notify, multiplier = places[_NOTIFY]
        bar = qtest.board.bars_at + (slot << 20)
        self._common += bar
        qtest.map_bar(slot, 4, bar)
        for status in (0, 1, 3):
            self._set(20, "B", status)
        self._set(0, "I", 0)
        self._set(8, "I", 0)
        (offered,) = struct.unpack("<I", qtest.read(self._common + 4, 4))
        self._set(12, "I", offered & _UNPLUGGED_INACCESSIBLE)
        self._set(8, "I", 1)
        self._set(12, "I", _VERSION_1 >> 32)
        self._set(20, "B", 0xB)
        self._set(22, "H", 0)
        self._set(24, "H", _QUEUE_SIZE)
        for offset, address in ((32, self._descriptors), (40, self._available), (48, self._used)):
            self._set(offset, "I", address)
            self._set(offset + 4, "I", 0)
        (queue,) = struct.unpack("<H", qtest.read(self._common + 30, 2))
        self._set(28, "H", 1)
        self._set(20, "B", 0xF)
        self._doorbell = bar + notify + queue * multiplier
        for page in (self._available, self._used):
            qtest.write(page, bytes(64))

    def plug(self, blocks: Sequence[int]) -> None:
        """Plug blocks, by number; `requested-size` must allow them."""
        for block in blocks:
            self._request(_PLUG, block)

    def unplug(self, blocks: Sequence[int]) -> None:
        """Unplug blocks, by number; `requested-size` must be less than what is plugged."""
        for block in blocks:
            self._request(_UNPLUG, block)

    def _request(self, kind: int, block: int) -> None:
        address = self._memory_at + block * self._block_size
        self._qtest.write(self._asked, struct.pack("<H6xQH6x", kind, address, 1))
        self._qtest.write(self._answered, b"\xff" * 10)
        self._qtest.write(
            self._descriptors,
            struct.pack("<QIHH", self._asked, 24, _NEXT, 1)
            + struct.pack("<QIHH", self._answered, 10, _WRITE, 0),
        )
        self._requests += 1
        self._qtest.write(self._available + 2, struct.pack("<H", self._requests))
        self._qtest.write(self._doorbell, struct.pack("<H", 0))
        wait_until(
            lambda: self._qtest.read(self._used + 2, 2) == struct.pack("<H", self._requests),
            "the device answers",
        )
        answer = self._qtest.read(self._answered, 2)
        assert answer == struct.pack("<H", _ACKNOWLEDGED), f"block {block}: {answer.hex()}"

    def _set(self, offset: int, kind: str, value: int) -> None:
        self._qtest.write(self._common + offset, struct.pack(f"<{kind}", value))

    def _capabilities(self, slot: int) -> Iterator[tuple[int, tuple[int, int]]]:
        place = self._qtest.pci_config(slot, _CAPABILITIES) & 0xFC
        while place:
            head = self._qtest.pci_config(slot, place)
            if head & 0xFF == _VENDOR_CAPABILITY:
                offset = self._qtest.pci_config(slot, place + 8)
                yield head >> 24, (offset, self._qtest.pci_config(slot, place + 16))
            place = head >> 8 & 0xFC


@contextmanager
def virtio_mem(
    path: Path, slot: int, memory_at: int, block_size: int, board: Board = PC
) -> Iterator[VirtioMem]:
    """Drive the virtio-mem-pci device at a slot for the time of a `with` block."""
    with Qtest(path, board) as qtest:
        yield VirtioMem(qtest, slot, memory_at, block_size)
