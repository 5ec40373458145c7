"""`qemu-crash-collector list`: the crashes of the store, or the signatures."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import add_json, add_store, store_of
from qemu_dump_ext.crash_collector.record import CrashRecord
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.printable import printable


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    add_json(parser)
    parser.add_argument("--guest", metavar="NAME", help="only the crashes of this guest")
    parser.add_argument("--signature", metavar="ID", help="only the crashes of this signature")
    parser.add_argument(
        "--signatures",
        action="store_true",
        help="instead of crashes, each signature and how often it was seen",
    )


def _run(arguments: argparse.Namespace) -> int:
    store = store_of(arguments)
    if arguments.signatures:
        counts = store.signatures()
        if arguments.json:
            print(json.dumps({name: asdict(count) for name, count in counts.items()}))
        else:
            for name, count in sorted(counts.items(), key=lambda item: item[1].last_seen):
                text = f"{count.count:5}  {count.first_seen}  {count.last_seen}  {count.message}"
                print(printable(f"{name}  {text}", keep="\t"))
        return EXIT_SUCCESS
    records = [record for record in store.records() if _is_asked_for(record, arguments)]
    records.sort(key=lambda record: record.time)
    if arguments.json:
        print(json.dumps([record.as_dict() for record in records]))
    else:
        for record in records:
            dump = f"{record.dump.bytes >> 20} MiB" if record.dump.file else "no dump"
            held = ", held" if record.held else ""
            text = f"{record.cause.kind}  {dump}{held}  {record.signature.message}"
            print(printable(f"{record.id}  {text}", keep="\t"))
    return EXIT_SUCCESS


def _is_asked_for(record: CrashRecord, arguments: argparse.Namespace) -> bool:
    return arguments.guest in {None, record.guest} and arguments.signature in {
        None,
        record.signature.id,
    }


COMMAND = Subcommand("list", "list the crashes, the oldest first", _add_arguments, _run)
