"""`qemu-crash-collector reopen`: a signature is open again, and by itself."""

from __future__ import annotations

from qemu_dump_ext.cli.collector._state_command import add_note, note_of, state_command
from qemu_dump_ext.crash_collector.store.states import SignatureState

COMMAND = state_command(
    "reopen",
    "say that a signature is open, and merged into no other",
    lambda words, known: SignatureState("open", note_of(words, known)),
    add_note,
    examples=("0123",),
)
