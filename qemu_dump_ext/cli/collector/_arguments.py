"""What the subcommands of `qemu-crash-collector` have in common."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.crash_collector.config.places import (
    CONFIGURATION_VARIABLE,
    SYSTEM_CONFIGURATION,
    default_configuration,
)
from qemu_dump_ext.crash_collector.store.lookup import find_crash
from qemu_dump_ext.errors import EXIT_SUCCESS, RequestError
from qemu_dump_ext.printable import printable

if TYPE_CHECKING:
    from qemu_dump_ext.crash_collector.config.settings import Configuration
    from qemu_dump_ext.crash_collector.store.store import CrashStore

# A value of YAML that is what it looks like.
_PLAIN_STORE = re.compile(r"^store: +(/[\w./+-]+) *(?: #.*)?$", re.MULTILINE)
CRASH_HELP = "the crash: its ID or the beginning of it, 'latest', or a guest's name for its latest"
SIGNATURE_HELP = "a signature or the beginning of it, or a crash that has it"


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """Declare where the configuration is."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        default=default_configuration(),
        help=f"the configuration; default: ${CONFIGURATION_VARIABLE}; or"
        f" ~/.config/{SYSTEM_CONFIGURATION.name}, if there is one;"
        f" or {SYSTEM_CONFIGURATION}",
    )


def add_store(parser: argparse.ArgumentParser) -> None:
    """Declare where the store is."""
    add_configuration(parser)
    parser.add_argument(
        "--store", metavar="DIR", type=Path, help="the store, instead of the configuration's"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declare `--json`."""
    parser.add_argument("--json", action="store_true", help="answer in JSON")


def configuration_of(arguments: argparse.Namespace) -> Configuration:
    """Return the configuration that the words ask for.

    Raises:
        RequestError: It cannot be read, or is wrong.
    """
    # Not needed where the store is given, and takes longer to import than all else.
    from qemu_dump_ext.crash_collector.config.file import load_configuration  # noqa: PLC0415

    return load_configuration(arguments.config)


def store_of(arguments: argparse.Namespace) -> CrashStore:
    """Return the store that the words ask for; errors as those of `store_path_of`."""
    from qemu_dump_ext.crash_collector.store.store import CrashStore  # noqa: PLC0415 - large

    return CrashStore(store_path_of(arguments))


def store_path_of(arguments: argparse.Namespace) -> Path:
    """Return where the store is that the words ask for.

    Raises:
        RequestError: The configuration cannot be read, or does not tell, or there is no such store.
    """
    store: Path = (
        arguments.store or _store_in(arguments.config) or configuration_of(arguments).store
    )
    if not store.is_dir():
        raise RequestError(f"there is no store {store}", hint="the agent makes it")
    return store


def _store_in(configuration: Path) -> Path | None:
    """Return what a configuration says in so many words; None: all of it must be read."""
    try:
        found = _PLAIN_STORE.findall(configuration.read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return Path(found[0]) if len(found) == 1 else None


def hold_command(
    name: str, description: str, *, held: bool, examples: tuple[str, ...]
) -> Subcommand:
    """Return the subcommand that sets whether crashes are held."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_store(parser)
        parser.add_argument("crashes", metavar="ID", nargs="+", help=CRASH_HELP)

    def run(arguments: argparse.Namespace) -> int:
        store = store_of(arguments)
        with store.locked():
            records = [store.record(find_crash(store, words)) for words in arguments.crashes]
            for record in records:
                store.update(replace(record, held=held))
        for record in records:
            same = " already" if record.held == held else ""
            told = "is held: limits never remove it" if held else "is held no more"
            print(printable(f"{record.id} {told}{same and f' (it was so{same})'}"))
        return EXIT_SUCCESS

    return Subcommand(name, description, add_arguments, run, examples=examples)
