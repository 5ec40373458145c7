"""`qemu-crash-collector`: watches guests, and collects their crashes."""

from __future__ import annotations

from collections.abc import Sequence

from qemu_dump_ext.cli import collector, run_subcommand


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    description = "Watch QEMU guests, and collect what their crashes leave behind."
    return run_subcommand("qemu-crash-collector", description, collector, argv)
