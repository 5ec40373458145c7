"""`qemu-crash-collector hold`: keep a crash whatever the limits say."""

from __future__ import annotations

from qemu_dump_ext.cli.collector._arguments import hold_command

COMMAND = hold_command(
    "hold", "keep crashes whatever the limits say", held=True, examples=("latest",)
)
