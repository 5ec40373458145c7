"""`qemu-crash-collector release`: give a crash that was held back to the limits."""

from __future__ import annotations

from qemu_dump_ext.cli.collector._arguments import hold_command

COMMAND = hold_command(
    "release", "give crashes that were held back to the limits", held=False, examples=("latest",)
)
