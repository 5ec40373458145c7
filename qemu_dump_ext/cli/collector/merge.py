"""`qemu-crash-collector merge`: two signatures are one."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import SIGNATURE_HELP, add_json, add_store, store_of
from qemu_dump_ext.cli.collector._presentation import states_dict
from qemu_dump_ext.crash_collector.forms import utc_text
from qemu_dump_ext.crash_collector.store.lookup import find_signature
from qemu_dump_ext.crash_collector.store.states import (
    SignatureState,
    SignatureStates,
    check_merge,
)
from qemu_dump_ext.errors import EXIT_SUCCESS


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    add_json(parser)
    parser.add_argument("signature", metavar="SIGNATURE", help=SIGNATURE_HELP)
    parser.add_argument("into", metavar="INTO", help="the signature that stands for both, likewise")


def _run(arguments: argparse.Namespace) -> int:
    store = store_of(arguments)
    signature_id, into = (
        find_signature(store, word) for word in (arguments.signature, arguments.into)
    )
    now = utc_text(datetime.now(UTC))

    def change(states: SignatureStates) -> None:
        check_merge(states, signature_id, into)
        note = states.of(signature_id).note
        states.known[signature_id] = SignatureState("merged", note, into=into, changed=now)

    states = store.change_states(change)
    if arguments.json:
        print(json.dumps(states_dict(signature_id, states)))
    else:
        print(f"{signature_id} is merged into {states.canonical(signature_id)}")
    return EXIT_SUCCESS


COMMAND = Subcommand(
    "merge", "say that two signatures are one", _add_arguments, _run, examples=("0123 4567",)
)
