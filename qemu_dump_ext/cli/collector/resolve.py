"""`qemu-crash-collector resolve`: a signature is fixed, from a kernel on."""

from __future__ import annotations

import argparse

from qemu_dump_ext.cli.collector._state_command import add_note, note_of, state_command
from qemu_dump_ext.crash_collector.store.states import SignatureState


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_note(parser)
    parser.add_argument(
        "--fixed-in",
        metavar="RELEASE",
        help="the first kernel that has the fix, as 'uname -r' prints it: a crash of an older one"
        " is no regression; without, every crash is one",
    )


COMMAND = state_command(
    "resolve",
    "say that a signature is fixed; when it comes back, it is a regression",
    lambda words, known: SignatureState("resolved", note_of(words, known), words.fixed_in),
    _add_arguments,
    examples=('latest --fixed-in 6.1.0-45-amd64 --note "commit 0123456"',),
)
