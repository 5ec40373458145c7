"""`qemu-dump images`: guests to take dumps of, made of public packages."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import sys
import time
from pathlib import Path

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.subcommands._guest_matrix import matrix_lines, try_guest
from qemu_dump_ext.errors import EXIT_FAILURE, EXIT_SUCCESS, RequestError
from qemu_dump_ext.guest_images.machine import BootedGuest
from qemu_dump_ext.guest_images.manifest import default_cache, find_image, load_manifest
from qemu_dump_ext.guest_images.store import ImageStore
from qemu_dump_ext.options.parsers import epilog_of
from qemu_dump_ext.printable import printable

_CONSOLE_POLL_SECONDS = 0.05


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    lister = _add_action(actions, "list", "show which guests there are", "", "--json")
    lister.add_argument("--json", action="store_true", help="answer in JSON")
    lister.set_defaults(action=_list)

    fetcher = _add_action(actions, "fetch", "download a guest", "x86_64 --debug-symbols")
    fetcher.add_argument("name", metavar="NAME")
    fetcher.add_argument(
        "--debug-symbols",
        action="store_true",
        help="download the kernel's vmlinux as well, for crash",
    )
    fetcher.set_defaults(action=_fetch)

    matrix = _add_action(
        actions,
        "matrix",
        "fetch, boot and dump guests, verify the dumps, and print a table",
        "x86_64 aarch64",
    )
    matrix.add_argument("names", nargs="*", metavar="NAME", help="default: all guests")
    matrix.set_defaults(action=_matrix)

    booter = _add_action(
        actions,
        "boot",
        "boot a guest under TCG, with QMP and gdbstub sockets",
        "x86_64 --detach --qmp /tmp/vm.qmp",
    )
    booter.add_argument("name", metavar="NAME")
    booter.add_argument(
        "--fill", type=_count, default=0, metavar="MIB", help="fill so much of guest memory"
    )
    booter.add_argument("--memory", type=_count, metavar="MIB", help="guest RAM")
    booter.add_argument("--smp", type=_count, metavar="N", help="number of vCPUs")
    booter.add_argument("--qmp", type=Path, metavar="PATH", help="where the QMP socket shall be")
    booter.add_argument("--gdb", type=Path, metavar="PATH", help="where the gdbstub shall be")
    booter.add_argument("--detach", action="store_true", help="leave it running once it has booted")
    booter.add_argument("--json", action="store_true", help="with --detach: answer in JSON")
    booter.set_defaults(action=_boot)


def _add_action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    description: str,
    *examples: str,
) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        name,
        help=description,
        description=description,
        epilog=epilog_of("qemu-dump images", [f"{name} {words}".strip() for words in examples]),
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        metavar="DIR",
        help="where downloads are kept; default: images/cache of the checkout, or"
        " ~/.cache/qemu_dump_ext",
    )
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _run(arguments: argparse.Namespace) -> int:
    status: int = arguments.action(arguments)
    return status


def _list(arguments: argparse.Namespace) -> int:
    store = ImageStore(arguments.cache)
    guests = []
    for image in load_manifest().values():
        files = store.find(image)
        guests.append(
            {
                "name": image.name,
                "target": image.target,
                "description": image.description,
                "memory_mib": image.memory_mib,
                "cpus": image.cpus,
                "release": files.release if files else None,
                "vmlinux": str(files.vmlinux) if files and files.vmlinux else None,
            }
        )
    if arguments.json:
        print(json.dumps(guests, indent=2))
        return EXIT_SUCCESS
    for guest in guests:
        state = guest["release"] or "not fetched"
        symbols = ", with debug symbols" if guest["vmlinux"] else ""
        print(f"{guest['name']:<12} {guest['description']} ({state}{symbols})")
    return EXIT_SUCCESS


def _fetch(arguments: argparse.Namespace) -> int:
    image = find_image(arguments.name)
    files = ImageStore(arguments.cache).fetch(
        image, debug_symbols=arguments.debug_symbols, report=_report
    )
    print(f"kernel {files.release} ({files.version}): {files.kernel}")
    if files.vmlinux:
        print(f"debug symbols: {files.vmlinux}")
    return EXIT_SUCCESS


def _matrix(arguments: argparse.Namespace) -> int:
    store = ImageStore(arguments.cache)
    rows = []
    for name in arguments.names or load_manifest():

        def report(step: str, name: str = name) -> None:
            print(f"{name}: {step}", file=sys.stderr)

        rows.append(try_guest(find_image(name), store, report))
    print("\n".join(matrix_lines(rows)))
    return EXIT_SUCCESS if all(row.succeeded for row in rows) else EXIT_FAILURE


def _boot(arguments: argparse.Namespace) -> int:
    if arguments.json and not arguments.detach:
        raise RequestError("--json needs --detach", hint="the console would be in between")
    image = find_image(arguments.name)
    store = ImageStore(arguments.cache)
    files = store.fetch(image, report=_report)
    progress = _ProgressLine()
    with BootedGuest(
        image,
        files,
        memory_mib=arguments.memory,
        cpus=arguments.smp,
        fill_mib=arguments.fill,
        fill_disk=store.fill_disk(arguments.fill) if arguments.fill else None,
        qmp_socket=arguments.qmp,
        gdb_socket=arguments.gdb,
        on_progress=progress.show,
    ) as guest:
        progress.finish()
        if arguments.detach:
            _describe(guest, as_json=arguments.json)
            guest.release()
        else:
            _describe(guest, as_json=False)
            print("typed lines go to the guest's shell; Ctrl-C ends it", flush=True)
            _stay_on_console(guest)
    return EXIT_SUCCESS


def _describe(guest: BootedGuest, *, as_json: bool) -> None:
    facts = {
        "name": guest.image.name,
        "release": guest.files.release,
        "pid": guest.pid,
        "qmp": str(guest.qmp_sockets[0]),
        "qmp2": str(guest.qmp_sockets[1]),
        "gdb": str(guest.gdb_socket),
        "console": str(guest.console_socket),
        "console_log": str(guest.console_log),
        "folder": str(guest.folder),
    }
    if as_json:
        print(json.dumps(facts))
        return
    print(f"{facts['name']}: kernel {facts['release']}, process {facts['pid']}")
    print(f"QMP:     {facts['qmp']} and {facts['qmp2']}")
    print(f"gdbstub: gdb -ex 'target remote {facts['gdb']}'")
    print(f"console: {facts['console']}, so far in {facts['console_log']}")
    print(f"to end:  kill {facts['pid']}; rm -r {facts['folder']}", flush=True)


def _stay_on_console(guest: BootedGuest) -> None:
    """Show the console and pass on typed lines, until QEMU ends or the user interrupts."""
    shown = len(guest.console_text())
    with selectors.DefaultSelector() as selector:
        with contextlib.suppress(PermissionError):  # a plain file, /dev/null: nothing to type
            selector.register(sys.stdin, selectors.EVENT_READ)
        while guest.is_running():
            text = guest.console_text()
            print(printable(text[shown:], keep="\r\n\t"), end="", flush=True)
            shown = len(text)
            if not selector.get_map():
                time.sleep(_CONSOLE_POLL_SECONDS)
            elif selector.select(_CONSOLE_POLL_SECONDS):
                line = os.read(sys.stdin.fileno(), 4096)
                if line:
                    guest.send_console(line.decode("utf-8", "replace"))
                else:
                    selector.unregister(sys.stdin)


def _report(step: str) -> None:
    print(step, file=sys.stderr)


class _ProgressLine:
    """One line on stderr, rewritten in place on a terminal and silent elsewhere."""

    def __init__(self) -> None:
        self._shown = False

    def show(self, seconds: float, last_line: str) -> None:
        if sys.stderr.isatty():
            line = f"booting, {seconds:.0f} s: {last_line}"[:100]
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            self._shown = True

    def finish(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


COMMAND = Subcommand(
    name="images",
    help="guests to take dumps of: list, fetch, boot",
    add_arguments=_add_arguments,
    run=_run,
    examples=("list", "fetch x86_64", "boot x86_64"),
)
