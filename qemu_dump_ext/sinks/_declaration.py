"""What one file of this folder must declare."""

from __future__ import annotations

from collections.abc import Callable

from qemu_dump_ext.sinks._sink import Sink
from qemu_dump_ext.value import Value


class Target(Value):
    """Where the user wants the dump.

    Attributes:
        word: What the user wrote.
        force: Replace an existing file.
        standard_output: Descriptor behind `-`; None where there is none to give away.
    """

    word: str
    force: bool
    standard_output: int | None


class SinkKind(Value):
    """One kind of target.

    Attributes:
        name: Equal to the name of the file.
        rank: The lowest is asked first whether a target is of its kind.
        form: How users write such a target, for the help; empty where it is written as another
            kind is.
        make: Returns the sink, which entering opens, or None where the target is of another
            kind. Refuses what is impossible, and touches nothing.
    """

    name: str
    rank: int
    form: str
    make: Callable[[Target], Sink | None]
