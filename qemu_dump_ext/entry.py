"""What the installed commands start: an interrupt ends them while there is nothing to clean up.

The version is told without importing anything else.
"""

from __future__ import annotations

import atexit
import gc
import signal
import sys

from qemu_dump_ext import __version__
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.standard_error import fill_standard_descriptors

_OBJECTS_BETWEEN_COLLECTIONS = 100_000


def _prepare(program: str) -> bool:
    """Return whether there is more to do than to tell the version, which is done."""
    fill_standard_descriptors()
    # The imports take a moment, and Python would answer an interrupt with a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.argv[1:] != ["--version"]:
        # What is imported stays: to look through it again and again takes a tenth of a dump.
        gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS, 10, 10)
        # Nor is it looked through in the end: it is given back with the process.
        atexit.register(gc.freeze)
        return True
    try:
        print(program, __version__, flush=True)  # noqa: T201 - for a door
    except OSError:  # nobody reads it
        sys.stdout = None
    return False


def qemu_dump() -> int:
    """Run `qemu-dump`; returns the exit status."""
    if not _prepare("qemu-dump"):
        return EXIT_SUCCESS
    from qemu_dump_ext.cli import main  # noqa: PLC0415 - behind the call above

    return main()


def qemu_dump_guest_memory() -> int:
    """Run `qemu-dump-guest-memory`; returns the exit status."""
    if not _prepare("qemu-dump-guest-memory"):
        return EXIT_SUCCESS
    from qemu_dump_ext.cli.dump_command import main  # noqa: PLC0415 - behind the call above

    return main()


def qemu_hmp_proxy() -> int:
    """Run `qemu-hmp-proxy`; returns the exit status."""
    if not _prepare("qemu-hmp-proxy"):
        return EXIT_SUCCESS
    from qemu_dump_ext.cli.hmp_proxy_command import main  # noqa: PLC0415 - behind the call above

    return main()


def qemu_crash_collector() -> int:
    """Run `qemu-crash-collector`; returns the exit status."""
    if not _prepare("qemu-crash-collector"):
        return EXIT_SUCCESS
    from qemu_dump_ext.cli.crash_collector_command import main  # noqa: PLC0415 - behind the call

    return main()
