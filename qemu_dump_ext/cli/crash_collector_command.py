"""`qemu-crash-collector`: watches guests, and collects their crashes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qemu_dump_ext.cli import (
    collector,
    is_version_wanted,
    run_guarded,
    run_program,
    subcommand_parser,
    wants_json,
)
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.third_party import require_extra

_PROGRAM = "qemu-crash-collector"
_DESCRIPTION = "Watch QEMU guests, and collect what their crashes leave behind."


def collector_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; needs the packages of the extra `collector`."""
    return subcommand_parser(_PROGRAM, _DESCRIPTION, collector)


def main(argv: Sequence[str] | None = None, program: str = _PROGRAM) -> int:
    """Entry point; returns the exit status."""
    if not is_version_wanted(argv):
        status = run_guarded(program, _require_packages, as_json=wants_json(argv))
        if status:
            return status
    return run_program(program, _DESCRIPTION, collector, argv)


def _require_packages() -> int:
    require_extra("collector", _PROGRAM)
    return EXIT_SUCCESS
