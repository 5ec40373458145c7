"""The option that says what was saved of a guest whose monitor does not answer any more."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_description_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--description`."""
    parser.add_argument(
        "--description",
        type=Path,
        metavar="FILE",
        help="with --memory process and --guest or --pid: what 'qemu-dump info --save FILE' has"
        " written, for a guest whose monitor does not answer any more; without, what the crash"
        " collector keeps, or QEMU's command line, tells where its RAM is",
    )
