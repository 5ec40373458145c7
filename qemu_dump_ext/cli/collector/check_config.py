"""`qemu-crash-collector check-config`: what is wrong, and which guests there are."""

from __future__ import annotations

import argparse
import json

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import add_configuration, add_json, configuration_of
from qemu_dump_ext.crash_collector.outlets.destination import check_upload
from qemu_dump_ext.crash_collector.watch.guests import GuestFinder
from qemu_dump_ext.crash_collector.watch.panic_action import panic_action
from qemu_dump_ext.crash_collector.watch.session import find_command_line
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.printable import printable


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    configuration = configuration_of(arguments)
    if configuration.upload is not None:
        check_upload(configuration.upload)
    guests = []
    for guest in GuestFinder().find(configuration).values():
        command_line = find_command_line(guest.address)
        action = None if command_line is None else panic_action(command_line)
        guests.append({"name": guest.name, "address": guest.address, "panic_action": action})
    if arguments.json:
        print(json.dumps({"store": str(configuration.store), "guests": guests}))
        return EXIT_SUCCESS
    head = f"{arguments.config}: ok; store {configuration.store}, {len(guests)} guests now"
    print(printable(head))
    for facts in guests:
        print(f"{facts['name']}: {facts['address']}: {_REMARK.get(facts['panic_action'], _LOST)}")
    return EXIT_SUCCESS


_REMARK = {
    None: "its QEMU is not seen on this host",
    "pause": "a panic pauses it",
    "none": "a panic is reported, and it goes on",
}
_LOST = (
    "a panic would end it before it can be dumped: start QEMU with -action panic=pause;"
    " the agent sets that when it connects"
)
COMMAND = Subcommand(
    "check_config", "check the configuration, and show its guests", _add_arguments, _run
)
