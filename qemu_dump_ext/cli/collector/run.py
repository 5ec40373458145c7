"""`qemu-crash-collector run`: the agent."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import add_configuration, configuration_of
from qemu_dump_ext.crash_collector.agent.agent import Agent
from qemu_dump_ext.crash_collector.config.settings import Configuration, GuestEntry
from qemu_dump_ext.errors import EXIT_SUCCESS, RequestError

# What these log is in their exceptions as well.
_TOLD_BY_EXCEPTIONS = ("paramiko", "botocore", "aiobotocore")
_FIELDS = ("guest", "cause", "crash", "signature")


class _JsonFormatter(logging.Formatter):
    # One object in one line.
    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        content |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        guest = getattr(record, "guest", None)
        about = [str(getattr(record, name)) for name in _FIELDS[2:] if hasattr(record, name)]
        text = f"{guest}: " if guest else ""
        text += record.getMessage() + (f" ({', '.join(about)})" if about else "")
        if record.exc_info:
            text += f"\n{self.formatException(record.exc_info)}"
        return text


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)
    parser.add_argument(
        "--store", metavar="DIR", type=Path, help="instead of a configuration: the store"
    )
    parser.add_argument(
        "--qmp",
        metavar="SOCKET",
        action="append",
        default=[],
        help="a guest beside those of the configuration; may be repeated",
    )
    parser.add_argument(
        "--log",
        choices=("auto", "json", "text"),
        default="auto",
        help="form of the log on standard error; auto: text at a terminal",
    )


def _load(arguments: argparse.Namespace) -> Configuration:
    if arguments.store is None:
        configuration = configuration_of(arguments)
    elif arguments.qmp:
        configuration = Configuration(store=arguments.store)
    else:
        raise RequestError("which guests?", hint="--qmp SOCKET, or --config FILE")
    given = tuple(GuestEntry(socket=address) for address in arguments.qmp)
    return replace(configuration, guests=(*given, *configuration.guests))


def _run(arguments: argparse.Namespace) -> int:
    as_text = sys.stderr.isatty() if arguments.log == "auto" else arguments.log == "text"
    handler = logging.StreamHandler()
    handler.setFormatter(_TextFormatter() if as_text else _JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    for name in _TOLD_BY_EXCEPTIONS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    agent_of = partial(Agent, _load(arguments), partial(_load, arguments))

    async def watch() -> None:
        await agent_of().run()

    asyncio.run(watch())
    return EXIT_SUCCESS


COMMAND = Subcommand(
    "run", "watch guests until SIGTERM; SIGHUP reads the configuration again", _add_arguments, _run
)
