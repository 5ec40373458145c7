"""`qemu-crash-collector`: watches guests, and collects their crashes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qemu_dump_ext.cli import collector, run_guarded, run_subcommand, subcommand_parser
from qemu_dump_ext.third_party import require_extra

_PROGRAM = "qemu-crash-collector"


def collector_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; needs the packages of the extra `collector`."""
    description = "Watch QEMU guests, and collect what their crashes leave behind."
    return subcommand_parser(_PROGRAM, description, collector)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_guarded(_PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    require_extra("collector", _PROGRAM)
    return run_subcommand(collector_parser(), argv)
