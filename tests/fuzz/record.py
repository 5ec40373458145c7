"""Record what QEMU's monitor and its stub answer to a probe: `python -m tests.fuzz.record`.

Writes tests/fuzz/seeds/guest-TARGET.json.xz, from which the fuzzers of both begin.
"""

from __future__ import annotations

import base64
import json
import lzma
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest_images.machine import stopped_machine
from qemu_dump_ext.qemu.native_dump import NativeDumps
from qemu_dump_ext.qemu.probe import probe_guest
from qemu_dump_ext.qemu.qmp import connect_qmp
from tests.fuzz.recorded import SEEDS, Recorded
from tests.support.raw_gdbstub import RawGdbstub

_MACHINES = {
    "x86_64": ("-smp", "2"),
    "aarch64": ("-M", "virt", "-cpu", "max"),
    "s390x": ("-smp", "2"),
    "ppc64": ("-m", "256"),
    "mips64el": (),
    "hppa": ("-m", "256"),
    "riscv64": (
        "-M",
        "virt",
    ),
    "sparc64": ("-m", "256"),
    "loongarch64": ("-m", "1024"),
}


class _RecordingMonitor:
    def __init__(self, monitor: object) -> None:
        self._monitor = monitor
        self.answers: dict[str, str] = {}

    def execute(self, command: str) -> str:
        answer: str = self._monitor.execute(command)  # type: ignore[attr-defined]
        self.answers[command] = answer
        return answer


class _RecordingStub:
    def __init__(self, path: Path) -> None:
        self._stub = RawGdbstub(path)
        self.replies: dict[str, str] = {}

    def addresses(self) -> Sequence[str]:
        return ()

    def packet(self, text: str) -> str:
        self.replies[text] = self._stub.packet(text)
        return self.replies[text]

    def read(self, address: int, buffer: memoryview) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        pass

    def vcpus(self) -> Iterator[int]:
        yield 0


def _record(target: str, words: Sequence[str]) -> Recorded:
    with (
        stopped_machine([f"qemu-system-{target}"], ["-m", "64", *words]) as machine,
        connect_qmp(str(machine.qmp_sockets[0])) as qmp,
    ):
        monitor, stub = _RecordingMonitor(qmp), _RecordingStub(machine.gdb_socket)
        native = b""
        with suppress(SourceError):
            native = NativeDumps(qmp, qmp, None).dump_byte(0x40000000 if "virt" in words else 0)
        probe_guest(GuestAccess.by_monitor(monitor, (), stub))
        return Recorded(target, monitor.answers, stub.replies, native)


def main() -> None:
    """Record every machine that the command line names, or all."""
    for target in sys.argv[1:] or _MACHINES:
        recorded = _record(target, _MACHINES[target])
        content = {
            "target": target,
            "answers": recorded.answers,
            "replies": recorded.replies,
            "native": base64.b64encode(recorded.native).decode("ascii"),
        }
        path = SEEDS / f"guest-{target}.json.xz"
        path.write_bytes(lzma.compress(json.dumps(content).encode(), preset=9))
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
