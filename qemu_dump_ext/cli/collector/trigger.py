"""`qemu-crash-collector trigger`: collect now."""

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
    parser.add_argument("guest", metavar="NAME", help="the name of the guest, as 'guests' shows it")
    parser.add_argument(
        "--detail",
        metavar="TEXT",
        default="",
        help="why the guest is collected; stored with the crash",
    )


def _run(arguments: argparse.Namespace) -> int:
    request = {"command": "trigger", "guest": arguments.guest, "detail": arguments.detail}
    answer = ask_agent(configuration_of(arguments).control_socket, request)
    print(json.dumps(answer) if arguments.json else printable(str(answer["id"])))
    return EXIT_SUCCESS


COMMAND = Subcommand(
    "trigger",
    "have the agent collect a guest as if it had crashed",
    _add_arguments,
    _run,
    examples=('web1 --detail "it answers no more"',),
)
