"""`qemu-crash-collector prune`: remove now what the limits do not allow."""

from __future__ import annotations

import argparse
import json

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import add_configuration, add_json, configuration_of
from qemu_dump_ext.crash_collector.store.limits import Removal
from qemu_dump_ext.crash_collector.store.prune import prune
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.printable import printable

_MIB = 1 << 20


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)
    add_json(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="remove nothing, and say what would be removed"
    )


def _run(arguments: argparse.Namespace) -> int:
    configuration = configuration_of(arguments)
    removals = prune(
        CrashStore(configuration.store),
        configuration.limits,
        needs_upload=configuration.upload is not None,
        dry_run=arguments.dry_run,
    )
    if arguments.json:
        print(json.dumps([_as_dict(removal) for removal in removals]))
        return EXIT_SUCCESS
    done = "would be removed" if arguments.dry_run else "removed"
    for removal in removals:
        what = "crash" if removal.whole else "dump"
        print(printable(f"{what} of {removal.record.id} {done}: {removal.reason}"))
    freed = sum(map(_bytes, removals))
    nothing = "nothing" if not removals else f"{len(removals)} of them, {freed / _MIB:.1f} MiB"
    print(f"{done}: {nothing}")
    return EXIT_SUCCESS


def _as_dict(removal: Removal) -> dict[str, object]:
    return {
        "id": removal.record.id,
        "what": "crash" if removal.whole else "dump",
        "reason": removal.reason,
        "bytes": _bytes(removal),
    }


def _bytes(removal: Removal) -> int:
    record = removal.record
    if not removal.whole:
        return record.dump.bytes
    return sum(facts.bytes for facts in record.files.values())


COMMAND = Subcommand(
    "prune",
    "remove what the limits of the configuration do not allow",
    _add_arguments,
    _run,
    examples=("--dry-run", ""),
)
