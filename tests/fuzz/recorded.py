"""What a monitor and a stub once answered, as a guest that can be asked again."""

from __future__ import annotations

import base64
import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qemu_dump_ext.guest.access import GuestAccess

SEEDS = Path(__file__).parent / "seeds"


@dataclass(frozen=True)
class Recorded:
    """Answers of one guest.

    Attributes:
        target: QEMU's name of it.
        answers: Of the monitor, by command.
        replies: Of the stub, by packet.
        native: QEMU's own dump of one byte; empty where it refuses.
    """

    target: str
    answers: Mapping[str, str]
    replies: Mapping[str, str]
    native: bytes

    def access(self) -> GuestAccess:
        """Return the ways to it."""
        return GuestAccess.by_monitor(_Monitor(self.answers), (), _Stub(self.replies))


class _Monitor:
    def __init__(self, answers: Mapping[str, str]) -> None:
        self._answers = answers

    def execute(self, command: str) -> str:
        return self._answers.get(command, "")


class _Stub:
    def __init__(self, replies: Mapping[str, str]) -> None:
        self._replies = replies

    def addresses(self) -> Sequence[str]:
        return ()

    def packet(self, text: str) -> str:
        return self._replies.get(text, "")

    def read(self, address: int, buffer: memoryview) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        pass

    def vcpus(self) -> Iterator[int]:
        yield 0


@cache
def recorded_guests() -> Mapping[str, Recorded]:
    """Return every guest that was recorded, by target."""
    guests = {}
    for path in sorted(SEEDS.glob("guest-*.json.xz")):
        content = json.loads(lzma.decompress(path.read_bytes()))
        native = base64.b64decode(content.pop("native"))
        guests[content["target"]] = Recorded(**content, native=native)
    return guests
