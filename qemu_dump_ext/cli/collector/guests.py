"""`qemu-crash-collector guests`: which guests the agent watches, and how they are."""

from __future__ import annotations

import argparse
import json

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import add_configuration, add_json, configuration_of
from qemu_dump_ext.cli.collector._presentation import table
from qemu_dump_ext.crash_collector.agent.control_socket import ask_agent
from qemu_dump_ext.errors import EXIT_SUCCESS

_HEAD = ("GUEST", "STATE", "PID", "LAST CRASH", "SOCKET")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    answer = ask_agent(configuration_of(arguments).control_socket, {"command": "guests"})
    guests = sorted(answer["guests"], key=lambda guest: str(guest["name"]))
    if arguments.json:
        print(json.dumps(guests))
        return EXIT_SUCCESS
    rows = [
        (
            str(guest["name"]),
            f"{guest['state']}, collecting" if guest["collecting"] else str(guest["state"]),
            str(guest["pid"] or "-"),
            str(guest["last_crash"] or "-"),
            str(guest["address"]),
        )
        for guest in guests
    ]
    print(table(_HEAD, rows))
    return EXIT_SUCCESS


COMMAND = Subcommand(
    "guests", "show which guests the agent watches", _add_arguments, _run, examples=("", "--json")
)
