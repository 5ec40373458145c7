"""A dump written to a descriptor that is open already."""

from __future__ import annotations

import fcntl
import os

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.sinks._declaration import SinkKind, Target
from qemu_dump_ext.sinks._sink import Sink, is_terminal


class DescriptorSink(Sink):
    """A descriptor that is open already.

    It is looked at when this is made, before a connection of ours takes a number that was free.
    """

    def __init__(self, name: str, descriptor: int) -> None:
        super().__init__(name)
        self._given = descriptor
        try:
            access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        except (OSError, OverflowError) as error:
            raise RequestError(
                f"{name} is no open descriptor", hint="a shell opens one by 3>FILE"
            ) from error
        if access == os.O_RDONLY:
            raise RequestError(f"{name} is open for reading only")
        if os.isatty(descriptor):
            raise is_terminal(name)

    def _open(self) -> int:
        return self._given


def _make(target: Target) -> DescriptorSink | None:
    word = target.word
    if word == "-":
        if target.standard_output is None:
            raise RequestError("- is not possible here", hint="name a file, fd:N or |command")
        return DescriptorSink(word, target.standard_output)
    if not word.startswith("fd:"):
        return None
    number = word.removeprefix("fd:")
    if not (number.isascii() and number.isdecimal()):
        raise RequestError(f"{word}: fd: wants the number of an open descriptor, as in fd:3")
    return DescriptorSink(word, int(number))


SINK = SinkKind("descriptor", 20, "fd:N (an open descriptor)", _make)
