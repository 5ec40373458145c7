"""`qemu-crash-collector guests`: which guests the agent watches."""

from __future__ import annotations

import argparse
import json

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import add_configuration, add_json, configuration_of
from qemu_dump_ext.crash_collector.agent.control_socket import ask_agent
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.printable import printable


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    answer = ask_agent(configuration_of(arguments).control_socket, {"command": "guests"})
    if arguments.json:
        print(json.dumps(answer["guests"]))
        return EXIT_SUCCESS
    for guest in answer["guests"]:
        state = "collecting" if guest["collecting"] else "watched"
        state = state if guest["connected"] else "not there"
        print(printable(f"{guest['name']}: {state}, {guest['address']}"))
    return EXIT_SUCCESS


COMMAND = Subcommand("guests", "show which guests the agent watches", _add_arguments, _run)
