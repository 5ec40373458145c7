"""`qemu-crash-collector acknowledge`: somebody looks after a signature."""

from __future__ import annotations

from qemu_dump_ext.cli.collector._state_command import add_note, note_of, state_command
from qemu_dump_ext.crash_collector.store.states import SignatureState

COMMAND = state_command(
    "acknowledge",
    "say that somebody looks after a signature",
    lambda words, known: SignatureState("acknowledged", note_of(words, known)),
    add_note,
    examples=('latest --note "Ada looks at it"',),
)
