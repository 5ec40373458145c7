"""`qemu-crash-collector prune`: remove now what the limits do not allow."""

from __future__ import annotations

import argparse
import json

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import add_configuration, add_json, configuration_of
from qemu_dump_ext.crash_collector.store.prune import prune
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.printable import printable


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    configuration = configuration_of(arguments)
    removed = [
        {
            "id": removal.record.id,
            "what": "crash" if removal.whole else "dump",
            "reason": removal.reason,
        }
        for removal in prune(
            CrashStore(configuration.store),
            configuration.limits,
            needs_upload=configuration.upload is not None,
        )
    ]
    if arguments.json:
        print(json.dumps(removed))
    else:
        for one in removed:
            print(printable(f"{one['what']} of {one['id']} removed: {one['reason']}"))
    return EXIT_SUCCESS


COMMAND = Subcommand(
    "prune", "remove what the limits of the configuration do not allow", _add_arguments, _run
)
