"""`qemu-dump proxy`: `qemu-hmp-proxy` by another name."""

from __future__ import annotations

from collections.abc import Sequence

from qemu_dump_ext.cli._declaration import Program


def _main(words: Sequence[str], program: str) -> int:
    from qemu_dump_ext.cli.hmp_proxy_command import main  # noqa: PLC0415 - needs much more

    return main(words, program)


COMMAND = Program("proxy", "QEMU's monitors for many clients: as qemu-hmp-proxy does", _main)
