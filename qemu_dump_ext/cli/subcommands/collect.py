"""`qemu-dump collect`: `qemu-crash-collector` by another name."""

from __future__ import annotations

from collections.abc import Sequence

from qemu_dump_ext.cli._declaration import Program


def _main(words: Sequence[str], program: str) -> int:
    from qemu_dump_ext.cli.crash_collector_command import main  # noqa: PLC0415 - needs much more

    return main(words, program)


COMMAND = Program("collect", "crashes of a host's guests: as qemu-crash-collector does", _main)
