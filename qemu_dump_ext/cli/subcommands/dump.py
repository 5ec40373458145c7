"""`qemu-dump dump`: `qemu-dump-guest-memory` by another name."""

from __future__ import annotations

from collections.abc import Sequence

from qemu_dump_ext.cli._declaration import Program


def _main(words: Sequence[str], program: str) -> int:
    from qemu_dump_ext.cli.dump_command import main  # noqa: PLC0415 - needs much of the package

    return main(words, program)


COMMAND = Program("dump", "dump a guest: as qemu-dump-guest-memory does", _main)
