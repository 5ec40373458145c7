"""What the subcommands that set the state of a signature have in common."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import SIGNATURE_HELP, add_json, add_store, store_of
from qemu_dump_ext.cli.collector._presentation import state_lines, states_dict
from qemu_dump_ext.crash_collector.forms import utc_text
from qemu_dump_ext.crash_collector.store.lookup import find_signature
from qemu_dump_ext.crash_collector.store.states import SignatureState, SignatureStates
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.printable import printable


def state_command(
    name: str,
    description: str,
    make: Callable[[argparse.Namespace, SignatureState], SignatureState],
    add_more: Callable[[argparse.ArgumentParser], None],
    *,
    examples: tuple[str, ...],
) -> Subcommand:
    """Return the subcommand that changes the state of one signature.

    Args:
        name: The name of its file.
        description: One line.
        make: Returns the new state, given the words and the state there was; `changed` is set.
        add_more: Declares what it takes besides.
        examples: As of `Subcommand`.
    """

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_store(parser)
        add_json(parser)
        parser.add_argument("signature", metavar="SIGNATURE", help=SIGNATURE_HELP)
        add_more(parser)

    def run(arguments: argparse.Namespace) -> int:
        store = store_of(arguments)
        signature_id = find_signature(store, arguments.signature)
        now = utc_text(datetime.now(UTC))

        def change(states: SignatureStates) -> None:
            state = make(arguments, states.of(signature_id))
            states.known[signature_id] = SignatureState(
                state.state, state.note, state.fixed_in, state.into, now
            )

        states = store.change_states(change)
        if arguments.json:
            print(json.dumps(states_dict(signature_id, states)))
        else:
            lines = [f"signature: {signature_id}", *state_lines(signature_id, states)]
            print(printable("\n".join(lines)))
        return EXIT_SUCCESS

    return Subcommand(name, description, add_arguments, run, examples=examples)


def add_note(parser: argparse.ArgumentParser) -> None:
    """Declare `--note`."""
    parser.add_argument("--note", metavar="TEXT", help="what to remember; without, what there was")


def note_of(arguments: argparse.Namespace, known: SignatureState) -> str:
    """Return the note, old or new."""
    return str(known.note if arguments.note is None else arguments.note)[:2000]
