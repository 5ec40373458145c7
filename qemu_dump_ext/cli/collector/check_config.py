"""`qemu-crash-collector check-config`: what is wrong, and which guests there are."""

from __future__ import annotations

import argparse
import json

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import add_configuration, add_json, configuration_of
from qemu_dump_ext.crash_collector.outlets.destination import check_upload
from qemu_dump_ext.crash_collector.watch.guests import Guest, GuestFinder, obstacle
from qemu_dump_ext.crash_collector.watch.libvirt import domain_of
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
    guests = [_facts(guest) for guest in GuestFinder().find(configuration).values()]
    if arguments.json:
        print(json.dumps({"store": str(configuration.store), "guests": guests}))
        return EXIT_SUCCESS
    head = f"{arguments.config}: ok; store {configuration.store}, {len(guests)} guests now"
    print(printable(head))
    for facts in guests:
        print(printable(f"{facts['name']}: {facts['address']}: {facts['remark']}"))
    return EXIT_SUCCESS


def _facts(guest: Guest) -> dict[str, str | None]:
    command_line = find_command_line(guest.address)
    action = None if command_line is None else panic_action(command_line)
    domain = None if command_line is None else domain_of(command_line)
    remark = obstacle(guest.address) or _REMARK.get(action, _LOST)
    if domain is not None and action != "none":
        remark = domain.remark
    return {
        "name": guest.name,
        "address": guest.address,
        "panic_action": action,
        "libvirt_on_crash": None if domain is None else domain.on_crash,
        "obstacle": obstacle(guest.address),
        "remark": remark,
    }


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
    "check_config",
    "check the configuration, and show its guests",
    _add_arguments,
    _run,
    examples=("", "--config ./collector.yaml"),
)
