"""`qemu-crash-collector list`: the crashes of the store, or the signatures."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import (
    SIGNATURE_HELP,
    add_json,
    add_store,
    configuration_of,
    store_of,
    store_path_of,
)
from qemu_dump_ext.cli.collector._presentation import (
    age_text,
    record_with_state,
    size_text,
    states_dict,
    table,
)
from qemu_dump_ext.crash_collector.store.lookup import crash_ids, find_signature, short_ids
from qemu_dump_ext.crash_collector.store.states import (
    STATE_NAMES,
    STATES_FILE,
    SignatureStates,
    read_states,
)
from qemu_dump_ext.crash_collector.store.summary import CrashSummary, summaries
from qemu_dump_ext.errors import EXIT_SUCCESS, RequestError

if TYPE_CHECKING:
    from qemu_dump_ext.crash_collector.store.store import CrashStore

_HEAD = ("ID", "AGE", "STATE", "CAUSE", "DUMP", "MESSAGE")
_SIGNATURES_HEAD = ("SIGNATURE", "COUNT", "FIRST", "LAST", "STATE", "MESSAGE")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    add_json(parser)
    parser.add_argument("--guest", metavar="NAME", help="only the crashes of this guest")
    parser.add_argument(
        "--signature", metavar="SIGNATURE", help=f"only the crashes of one: {SIGNATURE_HELP}"
    )
    parser.add_argument("--state", choices=STATE_NAMES, help="only those of this state")
    parser.add_argument(
        "--signatures",
        action="store_true",
        help="instead of crashes, each signature and how often it was seen",
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.signatures:
        return _signatures(arguments, store_of(arguments))
    path = store_path_of(arguments)
    states = read_states(path / STATES_FILE)
    found = _chosen(arguments, path, states)
    if arguments.json:
        wanted = {crash.id: crash for crash in found}
        records = [record for record in store_of(arguments).records() if record.id in wanted]
        records.sort(key=lambda record: record.time)
        print(json.dumps([record_with_state(record, states) for record in records]))
        return EXIT_SUCCESS
    short = short_ids(path)
    rows = [
        (
            short.get(crash.id, crash.id),
            age_text(crash.moment),
            states.effective(crash.signature).state + (", held" if crash.held else ""),
            crash.cause,
            size_text(crash.dump_bytes),
            crash.message,
        )
        for crash in found
    ]
    print(table(_HEAD, rows))
    return EXIT_SUCCESS


def _chosen(
    arguments: argparse.Namespace, store: Path, states: SignatureStates
) -> list[CrashSummary]:
    if arguments.guest is not None and not (store / arguments.guest).is_dir():
        _require_guest(arguments, store)
    family = (
        None
        if arguments.signature is None
        else states.family(find_signature(store_of(arguments), arguments.signature))
    )
    found = [
        crash
        for crash in summaries(store)
        if arguments.guest in {None, crash.guest}
        and (family is None or crash.signature in family)
        and arguments.state in {None, states.effective(crash.signature).state}
    ]
    return sorted(found, key=lambda crash: crash.time)


def _require_guest(arguments: argparse.Namespace, store: Path) -> None:
    if arguments.store is None:
        from qemu_dump_ext.crash_collector.watch.guests import find_guests  # noqa: PLC0415 - large

        if arguments.guest in find_guests(configuration_of(arguments)):
            return
    known = sorted({crash_id.partition("/")[0] for crash_id in crash_ids(store)})
    raise RequestError(
        f"there is no guest {arguments.guest!r}, nor a crash of one",
        hint=f"crashed so far: {', '.join(known[:10]) or 'none'}",
    )


def _signatures(arguments: argparse.Namespace, store: CrashStore) -> int:
    counts, states = store.signatures(), store.states()
    counts = {
        name: count
        for name, count in counts.items()
        if arguments.state in {None, states.of(name).state}
    }
    if arguments.json:
        content = {
            name: asdict(count) | {"state": states_dict(name, states)}
            for name, count in counts.items()
        }
        print(json.dumps(content))
        return EXIT_SUCCESS
    rows = [
        (
            name,
            str(count.count),
            age_text(datetime.fromisoformat(count.first_seen)),
            age_text(datetime.fromisoformat(count.last_seen)),
            states.of(name).state,
            count.message,
        )
        for name, count in sorted(counts.items(), key=lambda item: item[1].last_seen)
    ]
    print(table(_SIGNATURES_HEAD, rows))
    return EXIT_SUCCESS


COMMAND = Subcommand(
    "list",
    "list the crashes, the oldest first",
    _add_arguments,
    _run,
    examples=("", "--guest web1", "--state regression", "--signatures"),
)
